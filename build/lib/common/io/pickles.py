"""Read the arrays of published pickled files without importing or running anything that they name.

A pickle is a small program that looks names up and calls them. Here each name on the lists below becomes an inert
record of the call (arguments, state, items), and any other name is refused. Only when the pickle has ended are the
records of tensors and arrays, and no others, turned into values, each checked against the bytes that it lies in.
So nothing in a file can act; a hostile one can still be slow or ask for much memory.

Readable: torch.save archives and the streams torch.save wrote before 1.6, whole modules that pickle.dump wrote,
TorchScript archives (their data only, never their code), and .npy anchors, plain or holding a pickled dictionary.
"""

import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from common.core.errors import InputError
from common.io.pickle_records import (
    ARRAYS,
    DTYPES,
    TENSORS,
    Record,
    Storage,
    array_of,
    is_value,
    members,
    named_records,
    plain_record,
    strided_tensor,
)

NAMES = {
    *DTYPES, *(str(dtype) for dtype in DTYPES.values()), *TENSORS, *ARRAYS, "torch.storage._load_from_bytes",
    "torch.Tensor", "torch.Size", "torch.device", "numpy.ndarray", "numpy.dtype",
    "collections.OrderedDict", "collections.defaultdict", "builtins.set", "__builtin__.set", "builtins.dict",
    "__builtin__.dict", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "_codecs.encode",
    "argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath",
}  # fmt: skip
MODULES = (
    "torch.nn", "torch.jit._pickle", "torchvision.transforms", "open_clip", "clip", "src", "transformers", "__torch__",
)  # fmt: skip
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """Every tensor of a pickled module, state dict or dict of tensors, under the name that `state_dict` gives it.

    Tensors that are plain attributes of a module count too (the released merged_*.pt keep their weights so);
    non-persistent buffers do not. Each tensor is contiguous, of the stored type, and owns its memory. From an archive
    one tensor is read at a time, so the peak is about the file's size; a pickle.dump'ed module takes twice that.

    InputError: the file names something outside the lists (nothing has been executed), is truncated or damaged,
    places a tensor outside its storage, or holds no tensor under a name.
    """
    with lazy_tensors(path) as found:
        return {name: pickled.read() for name, pickled in found.items()}


class Pickled(NamedTuple):
    """A tensor still in its file: what the pickle says of it, and how to read it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@contextmanager
def lazy_tensors(path: Path | str, strict: bool = False) -> Iterator[dict[str, Pickled]]:
    """The tensors of a pickled file by name, each read when asked for while the file is open.

    A stream from before torch 1.6 is read whole.

    InputError also, if `strict`, where the file is anything but one flat dictionary of tensors.
    """
    with _reported(path), open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        content, read = (_read_archive if is_archive else _read_stream)(file, str(path))
        more = [key for key, value in members(content) if not is_value(value)] if strict else []
        if more:
            step = "scripts/convert_checkpoint.py takes the model out of it"
            raise InputError(f"{path} holds more than tensors: {more[0]!r} is none; {step}")
        found = [(name, record) for name, record in named_records(content) if record.origin in TENSORS]
        if not found:
            raise InputError(f"{path} holds no tensor under a name")
        yield {name: _pickled(record, read, f"{path}: {name}") for name, record in found}


def read_anchors(path: Path | str) -> dict[str, np.ndarray]:
    """The arrays of a published anchor file, with the axes in the order in which they are stored.

    A plain array (vision: tokens, anchors, width; Llama: anchors, width) comes back as {"input": array}; a pickled
    dictionary (RoBERTa) comes back with its arrays `input` and `gt` (anchors, tokens, width) and `attention_mask`.

    InputError: as `read_tensors`, or `input` is not a float array of two or three axes, or `gt` has another shape.
    """
    with _reported(path), open(path, "rb") as file:
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
        if read_header(file)[2].hasobject:
            *_, (content,) = _Recorder(file, str(path)).load().state  # an array of one object
            arrays = {name: _array(record, f"{path}: {name}") for name, record in named_records(content)}
        else:
            file.seek(0)
            arrays = {"input": npy.read_array(file, allow_pickle=False)}
    anchors = arrays.get("input")
    if anchors is None or anchors.ndim not in (2, 3) or anchors.dtype.kind != "f":
        found = ", ".join(f"{name} {array.dtype}{array.shape}" for name, array in arrays.items()) or "no array"
        raise InputError(f"{path} should hold anchors `input`, floats with two or three axes; it holds {found}")
    if "gt" in arrays and arrays["gt"].shape != anchors.shape:
        raise InputError(f"{path}: gt {arrays['gt'].shape} and input {anchors.shape} should have the same shape")
    return arrays


@contextmanager
def _reported(path: Path | str):
    """One sentence for whatever goes wrong: a malformed pickle can raise almost any exception."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is truncated, damaged or not of a published format ({why})") from error


# ---- the pickle, recorded --------------------------------------------------------------------------------------------

Read = Callable[[str], bytearray]  # key of a storage -> a copy of its bytes


class _Recorder(pickle.Unpickler):
    def __init__(self, file: BinaryIO, where: str):
        super().__init__(file, encoding="utf-8")
        self.where = where
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> type[Record]:
        origin = f"{module}.{name}"
        if origin not in NAMES and not f"{module}.".startswith(tuple(f"{known}." for known in MODULES)):
            raise InputError(
                f"{self.where} names `{origin}`, which no published file needs: refused, and nothing was executed"
            )
        return type("Record", (Record,), {"__slots__": (), "origin": origin})

    def persistent_load(self, pid: tuple) -> Storage | type[Record]:
        if pid[0] == "module":  # a class with its source code, in streams from before torch 1.6
            return pid[1]
        _, storage_class, key, _, _, *view = pid
        if any(view):
            raise ValueError("a storage that is part of another one")
        return self.storages.setdefault(key, Storage(DTYPES[storage_class.origin], key))


def _read_archive(file: BinaryIO, where: str) -> tuple[Any, Read]:
    archive = zipfile.ZipFile(file)
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if re.fullmatch("[^/]+/data.pkl", name)]
    if len(roots) != 1:
        raise InputError(f"{where} is a zip archive, but not one of torch.save or TorchScript: it has no data.pkl")

    def read(name: str) -> bytearray:
        if archive.getinfo(roots[0] + name).compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")  # torch never does, and a small file could unfold without end
        return bytearray(archive.read(roots[0] + name))

    return _Recorder(io.BytesIO(read("data.pkl")), where).load(), lambda key: read(f"data/{key}")


def _read_stream(file: BinaryIO, where: str) -> tuple[Any, Read]:
    """One pickle, or the five pickles and the raw storages behind them that torch.save wrote before 1.6."""
    content = _Recorder(file, where).load()
    storages: dict[str, bytes] = {}
    if content == LEGACY_MAGIC:
        for _ in ("protocol version", "description of the machine"):
            _Recorder(file, where).load()
        recorder = _Recorder(file, where)
        content = recorder.load()
        for key in _Recorder(file, where).load():
            count = file.read(8)
            size = int.from_bytes(count, "little") * recorder.storages[key].dtype.itemsize
            storages[key] = file.read(size)
            if len(count) < 8 or len(storages[key]) < size:
                raise EOFError(f"storage {key} ends early")
    return content, lambda key: bytearray(storages[key])


# ---- the record, read ------------------------------------------------------------------------------------------------


def _unwrapped(storage: Any, read: Read, where: str) -> tuple[Storage, Read]:
    """A storage and how to read it; torch.storage._load_from_bytes holds both in a stream within the pickle."""
    return _read_stream(io.BytesIO(storage.args[0]), where) if isinstance(storage, Record) else (storage, read)


def _pickled(record: Record, read: Read, where: str) -> Pickled:
    storage, _, size, *_ = plain_record(record).args
    return Pickled(_unwrapped(storage, read, where)[0].dtype, tuple(size), partial(_tensor, record, read, where))


def _tensor(record: Record, read: Read, where: str) -> Tensor:
    storage, read = _unwrapped(plain_record(record).args[0], read, where)
    return strided_tensor(record, storage.dtype, read(storage.key), where)


def _array(record: Record, where: str) -> np.ndarray:
    if record.origin in TENSORS:
        return _tensor(record, {}.__getitem__, where).numpy()  # its storage lies within the pickle
    return array_of(record, where)
