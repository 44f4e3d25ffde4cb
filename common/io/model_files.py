"""Which files of a folder are the model: those that the stock library of that kind of folder would open.

transformers 5 (modeling_utils): what transformers_weights in config.json names; else model.safetensors; else the shards
of model.safetensors.index.json. open_clip 3 (factory, local-dir): open_clip_model.safetensors,
open_clip_pytorch_model.safetensors, then pickles of its own, then model.safetensors, then the only .safetensors file.
A folder is open_clip's if it has one of open_clip's own files, else it is read as transformers reads it.

Two files that one library could open must hold the same tensors, byte for byte; else neither is taken.
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.core.errors import InputError, NotFetched, in_short
from common.io.absent_models import NOT_FETCHED, nothing_at, nothing_in
from common.io.headers import CONVERT, StoredTensor, absent, mistaken_for, opened, tensor_rows

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_INDEX = "pytorch_model.bin.index.json"
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
OPEN_CLIP_PICKLES = ("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth")
OPEN_CLIP_CONFIG = "open_clip_config.json"
GENERATION_FILE = "generation_config.json"  # how a model begins and ends an answer
WEIGHT_FILES = (MODEL_FILE, *OPEN_CLIP_FILES)
CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class ModelFiles:
    """The safetensors files of a model, in order, and what else of that kind lies beside them and is not read."""

    files: tuple[Path, ...]
    index: Path | None = None
    unread: tuple[str, ...] = ()

    def rows(self) -> list[StoredTensor]:
        """All tensors, from the headers. InputError if one is in two shards, or not in that which the index says."""
        rows: dict[str, StoredTensor] = {}
        for row in (row for file in self.files for row in tensor_rows(file)):
            if row.stored in rows:
                where = f"{rows[row.stored].file} and {row.file.name}"
                raise InputError(f"the tensor {row.stored} is in two shards, {where}; save the model again")
            rows[row.stored] = row
        if self.index:
            for name, shard in weight_map(self.index).items():
                if name not in rows or rows[name].file != self.index.parent / shard:
                    named = f"{self.index} has the tensor {name} in {shard}"
                    raise InputError(f"{named}, which lacks it; save the model again")
        return list(rows.values())

    def __str__(self) -> str:
        """For the dry run: what is read, and what is not."""
        read = self.files[0].name if len(self.files) == 1 else f"{len(self.files)} shards"
        return read + (f"; not read: {', '.join(self.unread)}" if self.unread else "")


def folder_of(path: Path, saved: Collection[str] = WEIGHT_FILES) -> Path:
    """Where a model's config and tokenizer are: the folder of a file that a library has `saved` a folder's model as.

    A file of a name of one's own is its own place, with nothing beside it, for its neighbours may be of other models.
    """
    return path.parent if path.name in saved else path


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint. InputError says what was looked for."""
    return list(find_model(path).files)


def find_model(path: Path) -> ModelFiles:
    """The files of the model at a path, a folder or a .safetensors file.

    Raises: InputError if there is none, if two candidates differ, or if one is a link to nothing; it says what the path
        is instead and what to do.
    """
    if path in NOT_FETCHED:
        raise NotFetched(NOT_FETCHED[path])
    if path.is_dir():
        return in_folder(path)
    if not path.exists():
        raise InputError(nothing_at(path))
    if path.suffix != ".safetensors":
        known = mistaken_for(path) or (f"is an index; name its folder, {path.parent}" if path.suffix == ".json" else "")
        raise InputError(f"{path} {known or f'is no .safetensors file; if it is a pickled module, {CONVERT}'}")
    return ModelFiles((path,))


def in_folder(folder: Path) -> ModelFiles:
    """The model in a folder; see `find_model`."""
    candidates = candidates_in(folder)
    if not candidates:
        raise InputError(f"{folder} holds none of {', '.join((*WEIGHT_FILES, INDEX_FILE))}{nothing_in(folder)}")
    (chosen, files), *others = candidates.items()
    for name, other in others:
        different = difference(state_of(files), state_of(other))
        if different:
            raise InputError(
                f"{folder} holds two models, {chosen} and {name}, which differ in {different}: stock libraries open "
                f"{chosen}; remove the one that is not meant"
            )
    read = {file.name for file in files}
    unread = [file.name for file in sorted(folder.glob("*.safetensors*")) if file.name not in {*read, INDEX_FILE}]
    index = within(folder / CONFIG_FILE, Path(chosen)) if chosen.endswith(".json") else None
    return ModelFiles(tuple(files), index, tuple(in_short(unread)))


def candidates_in(folder: Path) -> dict[str, list[Path]]:
    """{name: files} of what the stock library of a folder would open, in its order of preference."""
    own = {name: [folder / name] for name in OPEN_CLIP_FILES if is_there(folder / name)}
    pickled = [name for name in OPEN_CLIP_PICKLES if is_there(folder / name)]
    if pickled and not own:
        raise InputError(f"open_clip opens {folder / pickled[0]}, which is a pickle; {CONVERT}")
    if own:
        return own | alike(folder, next(iter(own.values()))[0])
    found = transformers_candidates(folder)
    if found or not is_there(folder / OPEN_CLIP_CONFIG):
        return found
    return {file.name: [file] for file in sorted(folder.glob("*.safetensors")) if is_there(file)}


def alike(folder: Path, own: Path) -> dict[str, list[Path]]:
    """Files for transformers that have the very tensor names of open_clip's file, so that one should be the other."""
    names = {row.stored for row in tensor_rows(own)}
    try:
        found = transformers_candidates(folder)
        return {n: files for n, files in found.items() if names == {r.stored for f in files for r in tensor_rows(f)}}
    except InputError:  # damaged, or a link to nothing: open_clip does not look at them
        return {}


def transformers_candidates(folder: Path) -> dict[str, list[Path]]:
    """What transformers would open in a folder, its choice first."""
    named = json_of(folder / CONFIG_FILE).get("transformers_weights")
    if isinstance(named, str) and named.endswith((".safetensors", INDEX_FILE)):
        file = within(folder / CONFIG_FILE, Path(named))
        return {named: whole(file) if named.endswith(".json") else [file]}
    found = {MODEL_FILE: [folder / MODEL_FILE]} if is_there(folder / MODEL_FILE) else {}
    if not found and is_there(folder / INDEX_FILE):
        return {INDEX_FILE: whole(folder / INDEX_FILE)}
    if (folder / INDEX_FILE).is_file():
        try:
            found[INDEX_FILE] = whole(folder / INDEX_FILE)
        except InputError:  # left over from an earlier save: it opens nothing
            return found
    return found


def whole(index: Path) -> list[Path]:
    """The shards that an index names; InputError if one is not there."""
    shards = indexed_files(index)
    for shard in shards:
        if not is_there(shard):
            raise InputError(
                f"there is no file {shard}, which {index.name} names; download it, or save the model again"
            )
    return shards


def is_there(file: Path) -> bool:
    """Whether there is a file; InputError if there is a link to nothing in its place."""
    if file.is_symlink() and not file.exists():
        raise InputError(absent(file))
    return file.is_file()


def json_of(file: Path) -> Mapping[str, Any]:
    """The fields of a JSON file; none if it is not there or no such file, which others report."""
    try:
        fields = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names, in order.

    InputError if it is none, names one outside its folder, or fewer than the shards' own names count (x-1-of-3).
    """
    shards = sorted({Path(shard) for shard in weight_map(index).values()})
    for shard in shards:
        within(index, shard)
        numbered = re.fullmatch(r".+-\d+-of-(\d+)\.\w+", shard.name)
        if numbered and int(numbered[1]) > len(shards):
            raise InputError(f"{index} names only {len(shards)} of {int(numbered[1])} shards, {shard} among them")
    return [index.parent / shard for shard in shards]


def weight_map(index: Path) -> dict[str, str]:
    """{tensor: shard} of an index; InputError if it is none."""
    text = ""
    try:
        text = index.read_text()
        found = json.loads(text)["weight_map"]
        return {name: str(Path(shard)) for name, shard in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        known = mistaken_for(index) if text else ""
        raise InputError(f"{index} {known or f'is no index of shards, JSON with a weight_map ({error!r})'}") from error


def within(index: Path, shard: Path) -> Path:
    """The file that an index names; InputError if it lies outside the index's folder."""
    if shard.is_absolute() or ".." in shard.parts:
        raise InputError(f"{index} names the shard {shard}, which lies outside its folder")
    return index.parent / shard


# ---- the same tensors? -----------------------------------------------------------------------------------------------


State = tuple[tuple[str, int, int, int, int], ...]


def state_of(files: Iterable[Path]) -> State:
    """Files with what changes when they do; a comparison of the same state is made once."""
    stats = [(str(file), os.stat(file)) for file in files]
    return tuple((file, at.st_size, at.st_dev, at.st_ino, at.st_mtime_ns) for file, at in stats)


@lru_cache
def difference(one: State, other: State) -> str:
    """The first tensor in which two groups of files differ, in name, type, shape or a byte; "" if they hold the same.

    Headers are compared first. Bytes are read only where those agree.
    """
    if [at[1:] for at in one] == [at[1:] for at in other]:
        return ""  # one file under two names
    first, second = ({row.stored: row for at in group for row in tensor_rows(Path(at[0]))} for group in (one, other))
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second:
            return name
        if (first[name].dtype, first[name].shape) != (second[name].dtype, second[name].shape):
            return name
    return next((name for name, row in first.items() if not same_bytes(row, second[name])), "")


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors of one type and shape hold the same bytes."""
    with opened(one.file), open(one.file, "rb") as a, open(other.file, "rb") as b:
        for at in range(0, one.nbytes, CHUNK_BYTES):
            count = min(CHUNK_BYTES, one.nbytes - at)
            if os.pread(a.fileno(), count, one.begin + at) != os.pread(b.fileno(), count, other.begin + at):
                return False
    return True
