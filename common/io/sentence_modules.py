"""What sentence-transformers has around an encoder: modules.json, and a folder of each further module, as pooling.

Without them the library takes the mean over the tokens of any encoder, with a line in its log: a merged model would
embed otherwise than its experts. So it gets the base's, and where the base has none those that the experts agree on.
Those of a classifier go with each task's head, as the merged encoder has none.
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
WEIGHTS, PICKLES = ("*.safetensors",), ("*.bin", "*.pt", "*.pth", "*.ckpt")
READING = frozenset({"do_lower_case", "prompts", "default_prompt_name"})
WEIGHTLESS = ("Transformer", "MLMTransformer", "Pooling", "SpladePooling", "LogitScore", "Normalize", "Dropout")
HEADLESS, CLASSIFIER, WORDS = "feature-extraction", "sequence-classification", ("text-generation", "any-to-any")
TASK_OF = {"Transformer": HEADLESS, "MLMTransformer": "fill-mask"}  # where the settings of an encoder name none
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


def head_of(folder: Path, modules: Sequence[Module]) -> str:
    """What head the modules want of the model in a folder, by the library's word for its task; "" if none."""
    for module in modules:
        if module.kind in TASK_OF:
            task = str(settings_beside(folder / module.folder).get("transformer_task") or TASK_OF[module.kind])
            return "" if task == HEADLESS else task
    return ""


def merged_modules(path: Path, has_words: bool) -> tuple[Path, list[Module]]:
    """The folder of a model, and those of its modules that work around a merged one: none of a classifier, whose head
    is never merged, for the library would draw one at random.

    has_words: whether the head over words is merged with the rest.
    Raises: InputError if the modules want another head that is not merged.
    """
    folder, modules = modules_of(path)
    head = head_of(folder, modules)
    if not head or (has_words and head in WORDS):
        return folder, modules
    if head != CLASSIFIER:
        which = "a SparseEncoder, with a head over words" if head == "fill-mask" else f"a model with a head for {head}"
        raise InputError(
            f"{folder / MODULES_FILE} is of {which}, which is not merged: the library would draw one at random; take "
            f"{MODULES_FILE} out of {folder} to merge the encoders alone"
        )
    return folder, []


def warn_of_classifiers(models: Mapping[str, Path]) -> None:
    """Say which models are classifiers of sentence-transformers, and where the merged one opens as such."""
    if found := [name for name, path in models.items() if head_of(*modules_of(path)) == CLASSIFIER]:
        warn(
            f"{MODULES_FILE} of {', '.join(found)} is of a CrossEncoder, whose head is not merged: none is written "
            "beside the merged encoder, and CrossEncoder opens the folders heads/<task> of the tasks in model.heads"
        )


def compare_modules(base: Path, experts: Mapping[str, Path], has_words: bool = False) -> Path | None:
    """The folder whose modules go with a merged model, if any.

    Args:
        base: Path of the base.
        experts: Path of each expert, by task. One without modules.json, as an adapter, is taken to use the others'.
        has_words: Whether the merged model has its head over words.
    Raises: InputError naming the file and the field if an expert has other modules than the base, if they want a head
        over words that is not merged, or if a file is damaged.
    """
    folder, wanted = merged_modules(base, has_words)
    warn_of_classifiers({"base": base, **experts})
    others = {task: found for task, path in experts.items() if (found := merged_modules(path, has_words))[1]}
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
    """InputError if the weights of a module are not in safetensors, as a pickle would have to be copied unread, or if
    nothing at all is there of a module that keeps something."""
    for module in modules:
        there = folder / module.folder
        if not module.folder or module.kind in WEIGHTLESS or matching(there, WEIGHTS):
            continue
        if pickles := matching(there, PICKLES):
            raise InputError(
                f"{there}, a module of sentence-transformers, holds no .safetensors to be copied beside a merge; "
                f"scripts/convert_checkpoint.py makes one of {pickles[0]}"
            )
        if not matching(there, IN_MODULE):  # of other kinds not all have weights: the library tells what it misses
            raise InputError(
                f"{there}, a module of sentence-transformers by {folder / MODULES_FILE}, holds no file; fetch or save "
                "the model again"
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


def classifier_modules(path: Path) -> Path | None:
    """The folder of a classifier of sentence-transformers, whose modules go with its head; None of any other model.

    InputError if a file is damaged, or if weights of a further module are pickled.
    """
    folder, modules = modules_of(path)
    if head_of(folder, modules) != CLASSIFIER:
        return None
    require_weights(folder, modules)
    return folder


def write_modules(source: Path | None, target: Path) -> None:
    """Copy modules.json, the settings beside it and the folder of every module; without a source, and where it has
    none, remove such files that an earlier merge has left."""
    names = [MODULES_FILE, *matching(source, SENTENCE_SETTINGS)] if source else []
    for name in {MODULES_FILE, *matching(target, SENTENCE_SETTINGS)} - set(names):
        (target / name).unlink(missing_ok=True)
    if source:
        copy_files(source, target, names)
        for module in (module for module in modules_of(source)[1] if module.folder):
            copy_files(source / module.folder, target / module.folder, matching(source / module.folder, IN_MODULE))
