"""Checkpoints in safetensors files: written as their tensors are made, or copied tensor by tensor.

Whatever happens in between, a folder has an index only when all that it names is whole.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BufferedWriter
from pathlib import Path
from typing import Any

import torch

from common.core.errors import InputError
from common.core.task_vectors import LazyTensor
from common.io.checkpoints import HEADER_KEY, replacing, write_text
from common.io.headers import tensor_rows
from common.io.model_files import INDEX_FILE
from common.io.pickles import Pickled, lazy_tensors
from common.io.tensors import DTYPES, bytes_of

SHARD_BYTES = 2 * 2**30
CHUNK_BYTES = 4 * 2**20
FLUSHED_BYTES = 2**26  # that are written before they are brought to the disk
STAGED = ".model-*.staged"
PUBLISHED = "model-*-of-*.safetensors"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type as safetensors calls it, its shape, and its bytes when asked for, in pieces."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[bytes | memoryview]]


# ---- tensors that are made as they are written -----------------------------------------------------------------------


def stage_shards(tensors: Mapping[str, Stored], folder: Path, limit: int = SHARD_BYTES) -> None:
    """Write tensors as shards under hidden names; what the folder held before stays as it was.

    A shard is at most `limit` bytes, or one tensor. `publish_shards` makes a checkpoint of them.
    """
    for left_by_a_kill in folder.glob(STAGED):
        left_by_a_kill.unlink()
    for number, shard in enumerate(in_shards(tensors, limit)):
        write_stored(folder / STAGED.replace("*", f"{number:05d}"), shard)


def in_shards(tensors: Mapping[str, Stored], limit: int) -> Iterator[dict[str, Stored]]:
    """Tensors in groups of at most `limit` bytes, or one tensor."""
    shard: dict[str, Stored] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def require_names(tensors: Iterable[str], expected: Iterable[str], file: Path) -> None:
    """InputError if one of the names `expected` is not among those of the tensors for a file."""
    for name in expected:
        if name not in tensors:
            raise InputError(f"{file}: the models have no tensor {name}, which the architecture needs")


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
        for row in tensor_rows(file)
    }


def read_range(file: Path, begin: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from `begin` to `end`, in pieces."""
    with open(file, "rb") as handle:
        for at in range(begin, end, CHUNK_BYTES):
            yield os.pread(handle.fileno(), min(CHUNK_BYTES, end - at), at)


def stored_pickle(tensor: Pickled) -> Stored:
    """A pickled tensor, which is read whole when its bytes are asked for."""

    def pieces() -> Iterator[memoryview]:
        yield bytes_of(tensor.read())

    return Stored(DTYPES[tensor.dtype], tensor.shape, math.prod(tensor.shape) * tensor.dtype.itemsize, pieces)


def stored_when_made(tensor: LazyTensor, dtype: torch.dtype) -> Stored:
    """A tensor that is made, in this type and the shape that was said, when its bytes are asked for."""

    def pieces() -> Iterator[memoryview]:
        for make in tensor.parts:
            made = make().detach().cpu().contiguous()
            if made.dtype != dtype or (len(tensor.parts) == 1 and made.shape != tensor.shape):
                raise ValueError(f"{made.dtype} {tuple(made.shape)} was made of a tensor of {dtype} {tensor.shape}")
            yield bytes_of(made)
            del made  # before the next is made

    return Stored(DTYPES[dtype], tensor.shape, math.prod(tensor.shape) * dtype.itemsize, pieces)


def copy_stored(file: Path, tensors: Mapping[str, Stored], header: Mapping[str, Any] | None = None) -> None:
    """Copy tensors byte by byte into one safetensors file, and read it back to see that it holds what was written."""
    sha = hashlib.sha256()
    with replacing(file) as temporary:
        write_pieces(temporary, tensors, header, sha.update)
        with open(temporary, "rb") as written:
            if hashlib.file_digest(written, "sha256").digest() != sha.digest():
                raise InputError(f"{file} does not read back as it was written; is the disk sound?")


def write_stored(file: Path, tensors: Mapping[str, Stored]) -> None:
    """Write tensors into one safetensors file, each once and in its place, which their types and shapes tell before.

    The file is whole or as it was.
    """
    with replacing(file) as temporary:
        write_pieces(temporary, tensors)


def write_pieces(
    file: Path,
    tensors: Mapping[str, Stored],
    header: Mapping[str, Any] | None = None,
    seen: Callable[[bytes | memoryview], None] = lambda _: None,
) -> None:
    """Write a safetensors file; in memory is one piece of one tensor at a time, which `seen` is shown."""
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
    with open(file, "wb") as out, flushed_meanwhile(out) as flush:
        for piece in (len(head).to_bytes(8, "little"), head):
            seen(piece)
            out.write(piece)
        for name, tensor in ordered:
            left = tensor.nbytes
            for piece in tensor.pieces():
                left -= len(piece)
                seen(piece)
                out.write(piece)
                flush(len(piece))
                del piece  # before the next is made
            if left:
                raise InputError(f"{name} has {tensor.nbytes - left} bytes, not {tensor.nbytes}: was a file replaced?")


@contextmanager
def flushed_meanwhile(out: BufferedWriter) -> Iterator[Callable[[int], None]]:
    """flush(count) says that so many bytes were written: now and then, what was written so far is brought to the disk
    by a thread while the next tensors are made, so that there is little to wait for in the end.

    What goes wrong there is raised by a later call, or at the end.
    """
    last, written = None, 0

    def flush(count: int) -> None:
        nonlocal last, written
        written += count
        if written >= FLUSHED_BYTES and (last is None or last.done()):
            if last:
                last.result()
            last, written = thread.submit(os.fsync, out.fileno()), 0

    with ThreadPoolExecutor(1) as thread:
        yield flush
        if last:
            last.result()
