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
from typing import Any

import torch
from torch import Tensor

from common.checkpoints import HEADER_KEY, INDEX_FILE, opened, replacing, write_tensors, write_text
from common.errors import InputError
from common.unpickling import Pickled, lazy_tensors

SHARD_BYTES = 2 * 2**30  # held in memory until it is written
CHUNK_BYTES = 16 * 2**20
STAGED = ".model-*.staged"
PUBLISHED = "model-*-of-*.safetensors"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


# ---- a stream of tensors ---------------------------------------------------------------------------------------------


def stage_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, limit: int = SHARD_BYTES
) -> dict[str, tuple[int, ...]]:
    """Write a stream of named tensors as shards under hidden names; what the folder held before stays as it was.

    A shard is at most `limit` bytes, or one tensor; that much is in memory.
    Returns: the shape of every tensor. `publish_shards` makes a checkpoint of them.
    """
    for left_by_a_kill in folder.glob(STAGED):
        left_by_a_kill.unlink()
    shapes, shard, number = {}, {}, 0
    for name, tensor in tensors:
        shapes[name] = tuple(tensor.shape)
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > limit:
            write_tensors(folder / STAGED.replace("*", f"{number:05d}"), shard)
            shard, number = {}, number + 1
        shard[name] = tensor
    write_tensors(folder / STAGED.replace("*", f"{number:05d}"), shard)
    return shapes


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


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type as safetensors calls it, its shape, and its bytes when asked for, in pieces."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[bytes | memoryview]]


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
    with opened(file), open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    found = {}
    for name, row in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in row["data_offsets"])
            found[name] = Stored(row["dtype"], tuple(row["shape"]), end - begin, partial(read_range, file, begin, end))
    return found


def read_range(file: Path, begin: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from `begin` to `end`, in pieces."""
    with open(file, "rb") as handle:
        handle.seek(begin)
        for at in range(begin, end, CHUNK_BYTES):
            yield handle.read(min(CHUNK_BYTES, end - at))


def stored_pickle(tensor: Pickled) -> Stored:
    """A pickled tensor, which is read whole when its bytes are asked for."""

    def pieces() -> Iterator[memoryview]:
        yield tensor.read().view(-1).view(torch.uint8).numpy().data

    return Stored(DTYPES[tensor.dtype], tensor.shape, math.prod(tensor.shape) * tensor.dtype.itemsize, pieces)


def write_stored(file: Path, tensors: Mapping[str, Stored], header: Mapping[str, Any]) -> None:
    """Copy tensors byte by byte into one safetensors file, and read it back to see that it holds what was written.

    In memory is one piece of one tensor at a time.
    """
    # Wide types first, as the format's own writer has it: every tensor is aligned to its type.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].nbytes // max(1, math.prod(item[1].shape)), item[0]))
    rows: dict[str, Any] = {"__metadata__": {"format": "pt", HEADER_KEY: json.dumps(header, sort_keys=True)}}
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
