"""What sentence-transformers has around an encoder: modules.json, and a folder of each further module, as pooling.

Without them the library takes the mean over the tokens of any encoder, with a line in its log: a merged model would
embed otherwise than its experts. So it gets the base's, and where the base has none those that the experts agree on.
Layout: what sentence-transformers 2 to 6 write. No weight of such a module is merged, no Python file is copied.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from common.core.errors import InputError
from common.core.notices import warn
from common.io.checkpoints import copy_files
from common.io.hashes import file_hash
from common.io.json_files import interpreted, read_object
from common.io.model_config import read_text
from common.io.model_files import CONFIG_FILE, folder_of
from common.io.tokenizer_files import IN_MODULE, MODULES_FILE, SENTENCE_SETTINGS, matching

WHAT = "list of the modules of a sentence-transformers model"
LIBRARY = "sentence_transformers."
WEIGHTS = ("*.safetensors",)
READING = frozenset({"do_lower_case", "prompts", "default_prompt_name"})
WEIGHTLESS = ("Transformer", "Pooling", "Normalize", "Dropout")
POOLING = {  # what sentence-transformers wrote before 6: a switch for each mode
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip


@dataclass(frozen=True)
class Module:
    """One of the modules: the name of its class, and its folder, which is "" for the encoder itself."""

    kind: str
    folder: str


def modules_of(path: Path) -> tuple[Path, list[Module]]:
    """The folder of a model, and its modules; none if it is no sentence-transformers model, or one with own code."""
    folder = folder_of(path)
    file = folder / MODULES_FILE
    if not file.is_file():
        return folder, []
    with interpreted(file, WHAT):
        listed = json.loads(read_text(file))
        types = [str(each["type"]) for each in listed]
        modules = [Module(kind.rpartition(".")[2], str(each["path"])) for kind, each in zip(types, listed, strict=True)]
        for module in modules:
            if PurePosixPath(module.folder).is_absolute() or ".." in PurePosixPath(module.folder).parts:
                raise ValueError(f"the path {module.folder!r} leads out of the folder")
    if own := [kind for kind in types if not kind.startswith(LIBRARY)]:
        warn(f"{file} names {own[0]}, code of its own, which is never copied: no modules are written beside a merge")
        return folder, []
    return folder, modules


def compare_modules(base: Path, experts: Mapping[str, Path]) -> Path | None:
    """The folder whose modules go with a merged model, if any.

    Args:
        base: Path of the base.
        experts: Path of each expert, by task. One without modules.json, as an adapter, is taken to use the others'.
    Raises: InputError naming the file and the field if an expert has other modules than the base, or a file is damaged.
    """
    folder, wanted = modules_of(base)
    others = {task: found for task, path in experts.items() if (found := modules_of(path))[1]}
    if wanted:
        require_weights(folder, wanted)
        for found in others.values():
            if said := next(different(found, (folder, wanted)), ""):
                raise InputError(
                    f"{said}: a merged model embeds as the base does, for which these weights are not made; merge "
                    f"models of one base, or take {MODULES_FILE} out of {folder} to merge the encoders alone"
                )
        if said := unlike_settings({task: other for task, (other, _) in others.items()}, folder):
            warn(f"settings of sentence-transformers differ from the base's, and the base's are kept: {said}")
        return folder
    above, around = modules_of(folder.parent)
    if any(module.folder == folder.name for module in around):  # as releases before 2 lay it out
        warn(f"{folder} is the encoder of the model in {above}, whose other modules are not written beside a merge")
    if not others or (folder / MODULES_FILE).is_file():  # none, or of own code
        return None
    first, *rest = others.values()
    for other in rest:
        if said := next(different(other, first), ""):
            warn(f"{said}: the base has no modules and the experts' differ, so that none are written beside a merge")
            return None
    require_weights(*first)
    warn(f"the base has no {MODULES_FILE}: a merged model gets the modules that its experts have, those of {first[0]}")
    if said := unlike_settings({task: other for task, (other, _) in others.items()}, first[0]):
        warn(f"settings of sentence-transformers differ from those of {first[0]}, which a merged model gets: {said}")
    return first[0]


def require_weights(folder: Path, modules: Sequence[Module]) -> None:
    """InputError if the weights of a module are not in safetensors: a pickle would have to be copied unread."""
    for module in modules:
        there = folder / module.folder
        if module.folder and module.kind not in WEIGHTLESS and not matching(there, WEIGHTS):
            raise InputError(
                f"{there}, a module of sentence-transformers, holds no .safetensors to be copied beside a merge; "
                "scripts/convert_checkpoint.py makes one of a pickle"
            )


def different(one: tuple[Path, Sequence[Module]], other: tuple[Path, Sequence[Module]]) -> Iterator[str]:
    """Sentences on what the modules of one model do otherwise than those of another."""
    (here, modules), (there, others) = one, other
    kinds, wanted = ([module.kind for module in each] for each in (modules, others))
    if kinds != wanted:
        yield f"{here / MODULES_FILE} has {', '.join(kinds)}, {there / MODULES_FILE} has {', '.join(wanted)}"
        return
    for module, its in zip(modules, others, strict=True):
        if not module.folder:
            continue
        own, its_own = here / module.folder, there / its.folder
        mine, theirs = (settings_of(folder / CONFIG_FILE, module.kind) for folder in (own, its_own))
        for key in sorted(mine.keys() & theirs.keys()):  # releases have added fields
            if mine[key] != theirs[key]:
                yield f"{own / CONFIG_FILE}: {key} is {mine[key]!r}, {theirs[key]!r} in {its_own / CONFIG_FILE}"
        weights = [[file_hash(folder / name) for name in matching(folder, WEIGHTS)] for folder in (own, its_own)]
        if weights[0] != weights[1]:
            yield f"{own} has other weights than {its_own}, and those of a module are not merged"


def settings_of(file: Path, kind: str) -> dict[str, Any]:
    """What the config of a module says, pooling as sentence-transformers 6 says it; nothing if it has none."""
    found = read_object(file, "config of a module") if file.is_file() else {}
    if kind == "Pooling":
        switched = [mode for name, mode in POOLING.items() if found.get(name)]
        modes = found.get("pooling_mode", switched)
        said = modes if isinstance(modes, str) else ", ".join(sorted(modes))
        return {"pooling_mode": said, "include_prompt": found.get("include_prompt", True)}
    return found


def unlike_settings(folders: Mapping[str, Path], kept: Path) -> str:
    """Fields of the settings beside modules.json, as prompts, in which models differ from the one whose are kept, each
    with their tasks; "" if they do not. Of fields that one alone writes those count that say how a text is read."""
    ours, found = settings_beside(kept), []
    for task, folder in folders.items():
        theirs = settings_beside(folder)
        both = (ours.keys() & theirs.keys()) - {"__version__", "model_type"}
        either = READING & (ours.keys() | theirs.keys())
        unlike = {key for key in both | either if plain(ours.get(key)) != plain(theirs.get(key))}
        found += [f"{key} ({task})" for key in sorted(unlike)]
    return ", ".join(found)


def settings_beside(folder: Path) -> dict[str, Any]:
    """All fields of the settings beside modules.json."""
    found = {}
    for name in matching(folder, SENTENCE_SETTINGS):
        found |= read_object(folder / name, "settings of sentence-transformers")
    return found


def plain(value: Any) -> Any:
    """A setting such that what says nothing, as an empty prompt, is None."""
    if isinstance(value, dict):
        value = {key: part for key, part in value.items() if part not in (None, "")}
    return value or None


def copy_modules(source: Path, target: Path) -> None:
    """Copy modules.json, the settings beside it and the folder of every module."""
    _, modules = modules_of(source)
    copy_files(source, target, [MODULES_FILE, *matching(source, SENTENCE_SETTINGS)])
    for module in filter(lambda module: module.folder, modules):
        copy_files(source / module.folder, target / module.folder, matching(source / module.folder, IN_MODULE))
