"""Checkpoints in several safetensors files: written as their tensors arrive, or copied tensor by tensor.

Whatever happens in between, a folder has an index only when all that it names is whole.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import torch
from torch import Tensor

from common.core.errors import InputError
from common.io.checkpoints import HEADER_KEY, replacing, write_text
from common.io.headers import rows_of
from common.io.model_files import INDEX_FILE
from common.io.pickles import Pickled, lazy_tensors

SHARD_BYTES = 2 * 2**30
CHUNK_BYTES = 4 * 2**20
STAGED = ".model-*.staged"
PUBLISHED = "model-*-of-*.safetensors"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type as safetensors calls it, its shape, and its bytes when asked for, in pieces."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[bytes | memoryview]]


# ---- a stream of tensors ---------------------------------------------------------------------------------------------


def stage_shards(
    tensors: Iterable[tuple[str, Tensor | Stored]], folder: Path, limit: int = SHARD_BYTES
) -> dict[str, tuple[int, ...]]:
    """Write a stream of named tensors as shards under hidden names; what the folder held before stays as it was.

    A shard is at most `limit` bytes, or one tensor. One tensor at a time is in memory.
    Returns: the shape of every tensor. `publish_shards` makes a checkpoint of them.
    """
    for left_by_a_kill in folder.glob(STAGED):
        left_by_a_kill.unlink()
    shapes = {}
    for number, shard in enumerate(in_shards(tensors, folder, limit)):
        write_stored(folder / STAGED.replace("*", f"{number:05d}"), shard)
        shapes |= {name: tensor.shape for name, tensor in shard.items()}
    return shapes


def write_stream(file: Path, tensors: Iterable[tuple[str, Tensor | Stored]], expected: Iterable[str] = ()) -> list[str]:
    """Write a stream of named tensors into one safetensors file that is whole or not there, one in memory at a time.

    Returns: their names. InputError if one of the names `expected` is not among them.
    """
    groups = in_shards(tensors, file.parent, math.inf)  # of which there is one; its bytes are there as long as this is
    whole = next(groups)
    for name in expected:
        if name not in whole:
            raise InputError(f"{file}: the models have no tensor {name}, which the architecture needs")
    write_stored(file, whole)
    return list(whole)


def publish_shards(folder: Path) -> None:
    """Give staged shards the names that stock libraries look for, and write their index last."""
    staged = sorted(folder.glob(STAGED))
    (folder / INDEX_FILE).unlink(missing_ok=True)
    for number, file in enumerate(staged, start=1):
        os.replace(file, folder / f"model-{number:05d}-of-{len(staged):05d}.safetensors")
    for file in folder.glob(PUBLISHED):
        if not file.stem.endswith(f"-of-{len(staged):05d}"):
            file.unlink()  # of an earlier attempt
    write_index(sorted(folder.glob(PUBLISHED)), folder)


def write_index(shards: Iterable[Path], folder: Path) -> None:
    """Write the index of the shards in a folder: which tensor is in which."""
    weight_map, size = {}, 0
    for shard in shards:
        for name, tensor in stored_tensors(shard).items():
            weight_map[name] = shard.name
            size += tensor.nbytes
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


# ---- tensors where they lie ------------------------------------------------------------------------------------------


@contextmanager
def stored_in(file: Path) -> Iterator[dict[str, Stored]]:
    """The tensors of a .safetensors file, or of a .bin of torch.save that holds nothing else."""
    if file.suffix == ".safetensors":
        yield stored_tensors(file)
        return
    with lazy_tensors(file, strict=True) as pickled:
        yield {name: stored_pickle(tensor) for name, tensor in pickled.items()}


def stored_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, from its header. InputError if the file is truncated or damaged."""
    return {
        row.stored: Stored(row.dtype, row.shape, row.nbytes, partial(read_range, file, row.begin, row.end))
        for row in rows_of(file)
    }


def read_range(file: Path, begin: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from `begin` to `end`, in pieces."""
    with open(file, "rb") as handle:
        yield from read_handle(handle, begin, end)


def read_handle(handle: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    """Bytes `begin` to `end` of an open file in pieces; the place at which it is read otherwise stays as it is."""
    for at in range(begin, end, CHUNK_BYTES):
        yield os.pread(handle.fileno(), min(CHUNK_BYTES, end - at), at)


def stored_pickle(tensor: Pickled) -> Stored:
    """A pickled tensor, which is read whole when its bytes are asked for."""

    def pieces() -> Iterator[memoryview]:
        yield bytes_of(tensor.read())

    return Stored(DTYPES[tensor.dtype], tensor.shape, math.prod(tensor.shape) * tensor.dtype.itemsize, pieces)


def in_shards(
    tensors: Iterable[tuple[str, Tensor | Stored]], folder: Path, limit: float
) -> Iterator[dict[str, Stored]]:
    """A stream in groups of at most `limit` bytes, or one tensor.

    A file begins with what is in it, which is known when all of it has come. Until then the bytes wait in a file
    without a name, and there a group is found until the next one is asked for.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as waiting:
            shard: dict[str, Stored] = {}
            for name, tensor in tensors:
                if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > limit:
                    yield shard
                    shard = {}
                    waiting.seek(0)
                shard[name] = tensor if isinstance(tensor, Stored) else appended(waiting, tensor)
                del tensor  # before the next is made
            yield shard
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error}") from error


def appended(handle: BinaryIO, tensor: Tensor) -> Stored:
    """A tensor whose bytes are written where a file stands."""
    begin = handle.tell()
    put(handle, begin, tensor)
    handle.seek(begin + tensor.nbytes)
    return stored_at(handle, begin, tensor.dtype, tuple(tensor.shape))


def waiting_in(folder: Path) -> BinaryIO:
    """A new file without a name in a folder; InputError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return TemporaryFile(dir=folder)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error}") from error


def put(handle: BinaryIO, begin: int, tensor: Tensor) -> None:
    """Write the bytes of a tensor at a place of a file."""
    handle.seek(begin)
    handle.write(bytes_of(tensor.detach().cpu().contiguous()))
    handle.flush()


def stored_at(handle: BinaryIO, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Stored:
    """The tensor whose bytes lie at a place of an open file, which is there as long as this is."""
    nbytes = math.prod(shape) * dtype.itemsize
    return Stored(DTYPES[dtype], shape, nbytes, partial(read_handle, handle, begin, begin + nbytes))


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, where they are."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def write_stored(file: Path, tensors: Mapping[str, Stored], header: Mapping[str, Any] | None = None) -> None:
    """Copy tensors byte by byte into one safetensors file, and read it back to see that it holds what was written.

    In memory is one piece of one tensor at a time.
    """
    # Wide types first, as the format's own writer has it: every tensor is aligned to its type.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].nbytes // max(1, math.prod(item[1].shape)), item[0]))
    own = {} if header is None else {HEADER_KEY: json.dumps(header, sort_keys=True)}
    rows: dict[str, Any] = {"__metadata__": {"format": "pt"} | own}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        rows[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    head = json.dumps(rows).encode()
    head += b" " * (-len(head) % 8)
    pieces = chain((len(head).to_bytes(8, "little"), head), *(tensor.pieces() for _, tensor in ordered))
    sha = hashlib.sha256()
    with replacing(file) as temporary:
        with open(temporary, "wb") as out:
            for piece in pieces:
                sha.update(piece)
                out.write(piece)
        with open(temporary, "rb") as written:
            if hashlib.file_digest(written, "sha256").digest() != sha.digest():
                raise InputError(f"{file} does not read back as it was written; is the disk sound?")
