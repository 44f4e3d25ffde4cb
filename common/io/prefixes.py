"""Prefixes that training tools put before the names of a model's tensors, and how they are told from the model's own.

    module.                              DistributedDataParallel, DataParallel, AveragedModel
    _orig_mod.                           torch.compile
    _fsdp_wrapped_module.                FullyShardedDataParallel
    _checkpoint_wrapped_module.          activation checkpointing
    _forward_module.                     Lightning Fabric
    model., net., …                      the attribute in which a Lightning module or a classifier keeps its model

Those with an underscore are no name of any model, so they go wherever they stand. A word such as model. is also a real
name (Llama has model.layers.0.…): it goes only where what follows it is known to begin the names of an architecture.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.core.errors import InputError

WRAPPER = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\."
)
ATTRIBUTES = ("module", "model", "net", "network", "image_encoder", "clip", "clip_model", "encoder_model")
# Beginnings of names in files that stock libraries write, of the architectures that can be merged.
ENCODERS = "albert|bert|camembert|deberta|distilbert|electra|mpnet|roberta|xlm_roberta"
BEGINS = re.compile(
    r"visual\.(?:conv1|class_embedding|positional_embedding|proj\b|ln_pre|ln_post|transformer\.resblocks|trunk\.|attnpool)"
    r"|model\.(?:layers\.\d+\.|embed_tokens\.)"
    rf"|(?:{ENCODERS})\.(?:embeddings|encoder)\."
    r"|embeddings\.word_embeddings\.|encoder\.layer\.\d+\."
    r"|transformer\.(?:h\.\d+\.|wte\.)"
)
PREFIX = re.compile(rf"((?:\w+\.)*?)(?:{BEGINS.pattern})")
TOWER = "visual."  # which an image tower of open_clip lacks that was saved without the model around it
FLAT = re.compile(r"(^|\.)_?flat_param(_\d+)?$")
COUNTER = "n_averaged"  # beside the module of torch.optim.swa_utils.AveragedModel


@dataclass(frozen=True)
class Unwrapped:
    """The names of a model's tensors without the prefixes of its wrappers, {stored: name}, those prefixes, and the one
    that the names of an image tower alone were given."""

    names: Mapping[str, str]
    removed: tuple[str, ...] = ()
    added: str = ""

    def renamings(self) -> dict[str, str]:
        """What transformers' from_pretrained takes as key_mapping to read the same names."""
        patterns = []
        for prefix in self.removed:
            inner, plain = WRAPPER.match(prefix), re.escape(prefix)
            times = max(map(len, map(WRAPPER.findall, self.names))) if inner else 1
            # one substitution each: a name may have a wrapper several times, and keys must differ
            patterns += [f"(?<![^.]){plain}(?#{time})" for time in range(times)] if inner else [f"^{plain}"]
        return dict.fromkeys(patterns, "")

    def __str__(self) -> str:
        """What was removed and added, "" if nothing was."""
        without = f"without the prefix {' and '.join(self.removed)}" if self.removed else ""
        return ", ".join(filter(None, (without, f"names behind {self.added}" if self.added else "")))


def unwrapped(stored: Iterable[str], where: Path | str) -> Unwrapped:
    """The names that tensors have without what training tools put before them.

    Raises: InputError if a tensor would have the name of another, if there are two models, or if FSDP's flat parameters
        stand in place of the model's tensors.
    """
    stored = list(stored)
    flat = next((name for name in stored if FLAT.search(name)), None)
    if flat:
        raise InputError(
            f"{where}: {flat} is a flat parameter of FSDP, not a tensor of the model; save it with "
            "StateDictType.FULL_STATE_DICT"
        )
    names = {name: WRAPPER.sub("", name) for name in stored}
    removed = dict.fromkeys(found for name in stored for found in WRAPPER.findall(name))
    prefix = outer_prefix(names.values(), where)
    if prefix:
        names = {old: without(prefix, name) for old, name in names.items() if name != COUNTER}
        removed[prefix] = None
    added = TOWER if is_tower_alone(list(names.values())) else ""
    names = {old: added + name for old, name in names.items()}
    seen: dict[str, str] = {}
    for old, name in names.items():
        if seen.setdefault(name, old) != old:
            raise InputError(f"{where} has {name} twice, as {seen[name]} and as {old}; save one model alone")
    return Unwrapped(names, tuple(removed), added)


def is_tower_alone(names: Sequence[str]) -> bool:
    """Whether names are those of an image tower of open_clip, a ViT of its own or of timm, and of nothing besides: the
    text tower has blocks of the same names, but never without the embedding of tokens."""
    of_own, of_timm, of_whole = (
        any(name.startswith(start) for name in names)
        for start in ("transformer.resblocks.0.", "trunk.blocks.0.", (TOWER, "text.", "token_embedding."))
    )
    return ((of_own and "conv1.weight" in names) or of_timm) and not of_whole


def outer_prefix(names: Iterable[str], where: Path | str) -> str:
    """The prefix that stands before a model's own names, such as module.model.; "" if there is none."""
    names = [name for name in names if name != COUNTER]
    found = sorted({match[1] for match in map(PREFIX.match, names) if match})
    known = [prefix for prefix in found if prefix and set(prefix[:-1].split(".")) <= set(ATTRIBUTES)]
    if known and "" not in found:
        if len(found) > 1:
            raise InputError(
                f"{where} holds several models, behind {' and '.join(found)}; save the one that is meant alone"
            )
        return known[0]
    prefix = ""
    while names and "" not in found and all(name.startswith(f"{prefix}module.") for name in names):
        prefix += "module."
    return prefix


def without(prefix: str, name: str) -> str:
    """A name without a prefix, or without as many words of it as the name begins with."""
    for word in prefix[:-1].split("."):
        if not name.startswith(f"{word}."):
            break
        name = name.removeprefix(f"{word}.")
    return name
