"""Files told by their bytes alone, wherever they lie: what of other models decides how one is scored.

Nothing is opened for it: each hash is kept with the file's state, see hashes.py.
"""

from collections.abc import Iterable
from pathlib import Path

from common.io.adapters import CONFIG_FILE, WEIGHT_FILE, is_adapter
from common.io.checkpoints import surroundings
from common.io.hashes import file_hash
from common.io.model_files import folder_of, weight_files
from common.io.tokenizer_files import matching

Told = list[list[str]]
"""[[name within the folder, hash] of each file]."""


def whole_model(path: Path) -> Told:
    """What tells the model at a path, or an adapter, from another: its weights, and what lies beside them."""
    weights = [path / CONFIG_FILE, path / WEIGHT_FILE] if is_adapter(path) else weight_files(path)
    return told(path, weights) + beside_model(path)


def beside_model(path: Path) -> Told:
    """What tells the configs, tokenizer and processor beside a model from others."""
    folder = folder_of(path)
    return told(folder, surroundings(folder))


def files_in(folder: Path, patterns: Iterable[str]) -> Told:
    """What tells those files in a folder that one of the patterns describes."""
    return told(folder, (folder / name for name in matching(folder, patterns)))


def told(place: Path, files: Iterable[Path]) -> Told:
    """The files of a place under their names within it; one that is the place itself has no name of its own."""
    return [[file.relative_to(place).as_posix(), file_hash(file)] for file in files]
