"""What a pickle builds when pickles.py records it: inert records. Tensors and arrays are made of them here.

Nothing here reads a pickle or calls what one names. A record says which class or function the pickle named, with which
arguments, state and items; tensors and arrays are made of it once the pickle has ended.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.core.errors import InputError

DTYPES = {
    "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}  # fmt: skip
PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
TYPED = "torch._tensor._rebuild_from_type_v2"  # a tensor that carries attributes
TENSORS = {"torch._utils._rebuild_tensor_v2", TYPED, *PARAMETERS}
ARRAYS = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}


class Record(dict):
    """Whatever the pickle builds: the name of its class or function, the arguments, the state, the items."""

    __slots__ = ("args", "state")
    origin = ""
    args: tuple
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> "Record":
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __init__(self, *_: Any, **__: Any):
        """The arguments are no items."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Storage(NamedTuple):
    """The element type of a storage, and the key of its bytes in the file."""

    dtype: torch.dtype
    key: str


def named_records(node: Any, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Record]]:
    """Dotted name and record of each tensor or array. What is met twice is entered once: a loop would have no end."""
    seen = set() if seen is None else seen
    if not isinstance(node, dict) or id(node) in seen:
        return
    seen.add(id(node))
    for key, value in members(node):
        if is_value(value):
            yield f"{prefix}{key}", value
        else:
            yield from named_records(value, f"{prefix}{key}.", seen)


def members(node: dict) -> Iterator[tuple[str, Any]]:
    """The items of a mapping, or what a module keeps in its state dict."""
    state = node.state if isinstance(node, Record) and not node else None
    if not isinstance(state, dict):
        yield from node.items()
        return
    transient = state.get("_non_persistent_buffers_set", ())
    if isinstance(transient, Record):  # a set, as pickle protocol 2 spells it
        transient = transient.args[0]
    for key, value in state.items():
        if key in ("_parameters", "_buffers", "_modules"):
            yield from ((name, member) for name, member in value.items() if name not in transient)
        elif is_value(value) or (isinstance(value, Record) and value.origin.startswith("__torch__.")):
            yield key, value  # TorchScript keeps tensors and submodules side by side


def is_value(node: Any) -> bool:
    """Whether a node is the record of a tensor or of an array."""
    return isinstance(node, Record) and node.origin in TENSORS | ARRAYS


def plain_record(record: Record) -> Record:
    """The record of the tensor itself, within those of a parameter or of a tensor that carries attributes."""
    if record.origin == TYPED:
        rebuild, _, args, *_ = record.args
        return plain_record(rebuild(*args))  # calling a record's class makes a record
    return plain_record(record.args[0]) if record.origin in PARAMETERS else record


def strided_tensor(record: Record, dtype: torch.dtype, data: bytearray, where: str) -> Tensor:
    """The tensor of a record from the bytes of its storage; contiguous, and with memory of its own size.

    Raises: InputError, which begins with `where`, if its shape is impossible or it exceeds its storage.
    """
    _, offset, size, stride, *_ = plain_record(record).args
    flat = torch.from_numpy(np.frombuffer(data, np.uint8)).view(dtype)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise InputError(f"{where} has the impossible shape {size}, strides {stride}, offset {offset}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > len(flat) or (math.prod(size) and last >= len(flat)):
        raise InputError(f"{where}, {size} in strides of {stride} from {offset}, exceeds its storage of {len(flat)}")
    tensor = flat.as_strided(size, stride, offset) if math.prod(size) else flat.new_empty(size)
    return tensor.contiguous() if tensor.numel() == len(flat) else tensor.clone(memory_format=torch.contiguous_format)


def array_of(record: Record, where: str) -> np.ndarray:
    """The numpy array of a record; InputError, which begins with `where`, if it is not one of numbers."""
    _, shape, dtype, is_fortran, raw = record.state
    if not re.fullmatch("[fiub][1248]", dtype.args[0]):
        raise InputError(f"{where} is an array of type {dtype.args[0]!r}, not of numbers")
    array = np.frombuffer(bytearray(raw), np.dtype(dtype.args[0]).newbyteorder(dtype.state[1]))
    return array.reshape(shape, order="F" if is_fortran else "C")
