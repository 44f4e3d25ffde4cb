"""The model in a pickled training checkpoint: which entry holds it, and what lies beside it and is no weight.

    open_clip, timm      {"epoch": 3, "state_dict": {"module.…"}, "optimizer": {…}, "scaler": {…}}
    Lightning            {"state_dict": {"model.…"}, "optimizer_states": […], "callbacks": {…}, "loops": {…}}
    DeepSpeed            {"module": {…}, "optimizer": …, "param_shapes": …}
    others               {"model": {…}, "optimizer": {…}, "ema": {…}}
Names are dotted paths as `pickles.lazy_tensors` gives them: state_dict.module.visual.proj.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from common.core.errors import InputError
from common.io.prefixes import unwrapped

T = TypeVar("T")
ENTRIES = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
)
CERTAIN = ENTRIES[:4]  # names that no module of a model has
TRAINING = re.compile(
    r"optim|opt$|sched|scaler|amp$|rng|callbacks?$|loops?$|hyper_parameters$|hparams$|metrics?$|args$|config$|history$"
)
COPY = re.compile(r"ema|swa|avg|averag|teacher|best")  # another copy of the model, in a file without training state
STEP = re.compile(r"state\.\d+\.\w+$")  # what an optimiser keeps for each parameter
# Files of transformers' Trainer, accelerate and DeepSpeed that hold no model
TRAINER_FILE = re.compile(
    r"(optimizer(_\d+)?|scheduler(_\d+)?|scaler|sampler(_\d+)?|training_args|rng_state(_\d+)?|random_states_\d+"
    r"|custom_checkpoint_\d+|dl_state_dict|.*_?optim_states)\.\w+"
)
# Beside a model: the mask follows from the context length, the numbers describe OpenAI's archive and are in the config.
BUFFERS = ("attn_mask", "input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class Contents(Generic[T]):
    """The tensors of a model by the names that stock libraries give them, and what was taken off and left out."""

    tensors: Mapping[str, T]
    said: tuple[str, ...] = ()


def model_in(found: Mapping[str, T], where: Path | str, entry: str = "") -> Contents[T]:
    """The model among the tensors of a pickled file, and no training state.

    Args:
        found: The tensors by dotted path.
        where: The file, for messages.
        entry: Key of the entry that holds the model; "" to find it.

    Raises: InputError if there is none, or if several entries could be it; it names them.
    """
    entry = entry or entry_of(found, where)
    chosen = below(found, entry) if entry else found
    if not chosen:
        raise InputError(f"{where} has no entry {entry}; it has {', '.join(tops(found))}")
    deeper = entry_of(chosen, where) if entry else ""
    if deeper:
        chosen, entry = below(chosen, deeper), f"{entry}.{deeper}"
    beside = [top for top in tops(found) if (not f"{entry}.".startswith(f"{top}.") if entry else TRAINING.search(top))]
    if not entry:
        chosen = {name: tensor for name, tensor in found.items() if name.split(".")[0] not in beside}
    inner = unwrapped(chosen, where)
    tensors = {n: chosen[old] for old, n in inner.names.items() if n.rpartition(".")[2] not in BUFFERS}
    said = (f"from {entry}" if entry else "", str(inner), f"left out: {', '.join(beside)}" if beside else "")
    return Contents(tensors, tuple(filter(None, said)))


def below(found: Mapping[str, T], entry: str) -> dict[str, T]:
    """The tensors of an entry, without its key."""
    return {name.removeprefix(f"{entry}."): t for name, t in found.items() if name.startswith(f"{entry}.")}


def tops(found: Mapping[str, T]) -> list[str]:
    """The first words of the names, in order."""
    return list(dict.fromkeys(name.split(".")[0] for name in found))


def entry_of(found: Mapping[str, T], where: Path | str) -> str:
    """The key of the entry that holds the model; "" if the tensors are the model's own."""
    keys = tops(found)
    training = [key for key in keys if TRAINING.search(key)]
    if len(training) == len(keys) or all(map(STEP.match, found)):
        raise InputError(f"{where} holds the state of training, {keys[0]}, and no model")
    certain = [key for key in keys if key in CERTAIN]
    entries = certain or [key for key in keys if key in ENTRIES]
    copies = [key for key in keys if key not in training and key not in entries and is_copy(found, entries, key)]
    if not certain and not training and not any(map(COPY.search, copies)):
        return ""  # a word such as model. begins the names of the tensors themselves
    several = entries + copies
    if len(several) > 1:
        raise InputError(f"{where} holds several models, {', '.join(several)}; --entry {several[0]} takes that one")
    return several[0] if several else ""


def is_copy(found: Mapping[str, T], entries: list[str], key: str) -> bool:
    """Whether an entry has half of the names of the first that may hold the model, DDP's prefix aside."""
    names = ({n.removeprefix("module.") for n in below(found, k)} for k in (*entries[:1], key))
    first, *second = names
    return bool(second) and 2 * len(first & second[0]) >= len(first)
