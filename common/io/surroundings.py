"""What surrounds the weights of a merged model: the base's own files, with no more changed than must be.

Code is never copied, so a field auto_map that names some beside the weights is left out; transformers opens what is
merged here by classes of its own.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from common.core.notices import warn
from common.io.checkpoints import BESIDE, copy_files, write_text
from common.io.json_files import read_object
from common.io.model_config import edited, read_text
from common.io.model_files import CONFIG_FILE, folder_of
from common.io.tokenizer_files import (
    PROCESSOR_FILES,
    SENTENCE_FILES,
    TOKENIZER_FILES,
    VOCABULARIES,
    contents,
    has_tokenizer,
    matching,
)

AUTO_MAP = "auto_map"
SEEING = frozenset({"vision_config", "image_size"})  # fields that the config of a model which sees images has
ELSEWHERE = "--"  # in an auto_map: what is before it is a place on the hub, from which the code is fetched
LARGEST = 2**24  # bytes of what is copied for no other reason than that it is there
# Of the base's folder: weights and code, by their endings; then what is written or copied by others, and what says that
# there is an adapter, shards or a merge.
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".tflite", ".ot",
    ".npy", ".npz", ".pkl", ".pickle", ".joblib", ".zip", ".tar", ".gz",
)  # fmt: skip
CODE = (".py", ".pyc", ".sh", ".so", ".ipynb", ".js", ".cpp", ".cu")
NOT_COPIED = (
    *BESIDE, *TOKENIZER_FILES, *SENTENCE_FILES, "README.md", "adapter_*", "*.index.json", "provenance.json",
    "adaptation.json", ".*",
)  # fmt: skip


def copy_surroundings(source: Path, target: Path) -> None:
    """Copy the tokenizer of the base's folder, and all else that lies there and is neither weights nor code nor large:
    licences, terms of use, what some tool may look for."""
    copy_tokenizer(source, target)
    copy_files(source, target, rest_of(source))


def rest_of(folder: Path) -> list[str]:
    """Names of the files in a folder that are nothing in particular, in order."""
    known = set(matching(folder, NOT_COPIED))
    small = {name for name in matching(folder, ["*"]) if (folder / name).stat().st_size <= LARGEST}
    return sorted(name for name in small - known if not name.lower().endswith((*WEIGHTS, *CODE)))


def copy_tokenizer(source: Path, target: Path, left: Collection[str] = ()) -> None:
    """Make the tokenizer files of a folder those of another, and remove others that were there; none that are left."""
    wanted = matching(source, TOKENIZER_FILES)
    for name in matching(target, TOKENIZER_FILES):
        if name not in (*wanted, *left):
            (target / name).unlink()
    copy_settings(source, target, [name for name in wanted if name not in left])


def copy_settings(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the named files that exist, each as it is but for the code that it names."""
    for name in names:
        file = source / name
        if name.endswith("config.json") and file.is_file() and f'"{AUTO_MAP}"'.encode() in file.read_bytes():
            write_edited(read_text(file), target / name, {})
        else:
            copy_files(source, target, [name])


def lend_surroundings(folder: Path, experts: Mapping[str, Path]) -> None:
    """Give a merged model whose base has no tokenizer that of the experts, if those that have one have the same
    vocabulary, byte by byte; say which it has, or why none. So with what says how images are prepared.

    experts: the folder or file of each, by task.
    """
    folders = {task: folder_of(path) for task, path in experts.items()}
    lend_processor(folder, folders)
    having = {task: place for task, place in folders.items() if has_tokenizer(place)}
    if not having or has_tokenizer(folder):
        return
    first, *others = having.values()
    if all(contents(other, VOCABULARIES) == contents(first, VOCABULARIES) for other in others):
        copy_tokenizer(first, folder, PROCESSOR_FILES)
        warn(f"the base has no tokenizer; the merged model has that of {', '.join(having)}")
    else:
        warn(
            f"the base has no tokenizer and those of {', '.join(having)} differ, so the merged model has none; put the "
            "one that is meant beside the base"
        )


def lend_processor(folder: Path, experts: Mapping[str, Path]) -> None:
    """Give a merged model that sees images, and has no files that say how one is prepared, those of the experts, if
    they say the same.

    experts: the folder of each, by task.
    """
    having = {task: place for task, place in experts.items() if matching(place, PROCESSOR_FILES)}
    own = read_object(folder / CONFIG_FILE, "config") if (folder / CONFIG_FILE).is_file() else {}
    if not having or matching(folder, PROCESSOR_FILES) or not SEEING & own.keys():
        return
    said = [
        {name: prepares(read_object(place / name, "settings of a processor")) for name in names}
        for place in having.values()
        if (names := matching(place, PROCESSOR_FILES))
    ]
    tasks = ", ".join(having)
    if all(other == said[0] for other in said):
        copy_settings(next(iter(having.values())), folder, said[0])
        warn(
            f"the base does not say how an image is prepared; the merged model has the {', '.join(said[0])} of {tasks}"
        )
    else:
        warn(
            f"the base does not say how an image is prepared and the files of {tasks} differ, so the merged model has "
            f"none; put the {PROCESSOR_FILES[0]} that is meant beside the base"
        )


def prepares(fields: Any) -> Any:
    """The settings of a processor without the names of classes, which differ between releases."""
    if not isinstance(fields, dict):
        return fields
    return {key: prepares(value) for key, value in fields.items() if not key.endswith(("_type", "_class"))}


def write_edited(text: str, target: Path, changes: Mapping[str, Any], dropped: tuple[str, ...] = ()) -> None:
    """Write a JSON text with some fields changed or dropped, those that name code left out, and otherwise as it is."""
    code = code_beside(json.loads(text))
    if code:
        warn(
            f"{target}: {AUTO_MAP} is left out, for it names {', '.join(code)}, and code is never copied; transformers "
            "opens the merged model by its own classes"
        )
        dropped = (*dropped, AUTO_MAP)
    write_text(target, edited(text, changes, dropped))


def code_beside(fields: Any) -> list[str]:
    """Names of the Python files beside a model that the auto_map of its settings names, in order."""
    named = fields.get(AUTO_MAP) if isinstance(fields, dict) else None
    classes = [one for each in (named or {}).values() for one in (each if isinstance(each, list) else [each])]
    beside = (name for name in classes if isinstance(name, str) and ELSEWHERE not in name)
    return sorted({f"{name.rpartition('.')[0]}.py" for name in beside})
