"""Tensors out of safetensors files: whole, or some of their rows, in float32."""

import math
from io import FileIO

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import is_finite
from common.io.headers import StoredTensor, absent, opened

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
READ_ALONE = {  # and not written
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
TYPES = {stored: dtype for dtype, stored in DTYPES.items()} | READ_ALONE
PIECE = 8 * 2**20  # weights
WHOLE = slice(None)


def read_tensor(row: StoredTensor, rows: slice = WHOLE) -> Tensor:
    """A tensor of a file in float32, or some of its rows, one behind the other.

    It is read and not mapped: what is mapped is memory in use, and comes a page fault at a time. Of a large tensor of
    another type no more than a piece is in memory as it is stored.
    """
    if row.dtype not in TYPES:
        with opened(row.file) as handle:
            tensor = handle.get_tensor(row.stored) if rows == WHOLE else handle.get_slice(row.stored)[rows]
            return tensor.to(torch.float32, copy=True)
    begin, end, _ = rows.indices(row.shape[0]) if row.shape else (0, 1, 1)
    stride = row.nbytes // row.shape[0] if row.shape and row.shape[0] else row.nbytes
    tensor = torch.empty((max(0, end - begin), *row.shape[1:]) if row.shape else ())
    try:
        with open(row.file, "rb", buffering=0) as handle:
            handle.seek(row.begin + begin * stride)
            if row.dtype == "F32":
                fill(tensor.view(-1), handle, row)
            else:
                for piece in tensor.view(-1).split(PIECE):
                    piece.copy_(fill(torch.empty(len(piece), dtype=TYPES[row.dtype]), handle, row))
    except FileNotFoundError as error:
        raise InputError(absent(row.file)) from error
    except OSError as error:
        raise InputError(f"{row.file} cannot be read: {error.strerror}") from error
    return tensor


def require_finite(tensor: Tensor, row: StoredTensor, name: str, at: int | None = None) -> None:
    """InputError if a tensor that was read, or one of several that are stacked in it, holds NaN or Inf: as it is
    stored, or because float32 cannot hold what is."""
    if is_finite(tensor):
        return
    which = f"{row.file}: the tensor {name}" if at is None else f"{row.file}: the tensor {name}, at {at},"
    if row.dtype == "F64":
        with opened(row.file) as handle:
            stored = handle.get_tensor(row.stored) if at is None else handle.get_slice(row.stored)[at : at + 1]
        if is_finite(stored):
            raise InputError(
                f"{which} reaches {stored.abs().max():.3g}, which float32 cannot hold, in which models are merged; "
                "look for what went wrong when it was trained or saved"
            )
    raise InputError(f"{which} holds NaN or Inf")


def fill(flat: Tensor, handle: FileIO, row: StoredTensor) -> Tensor:
    """A tensor of one axis, filled with the next bytes of a file. InputError if there are too few."""
    left = bytes_of(flat)
    while left:
        count = handle.readinto(left)
        if not count:
            raise InputError(f"{row.file} is truncated while it is read: {len(left)} bytes of {row.stored} are missing")
        left = left[count:]
    return flat


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, where they are."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def in_rows(shape: tuple[int, ...], weights: int) -> list[slice]:
    """Rows of a tensor in parts of so many weights at most, or of one row."""
    if not shape or math.prod(shape) <= weights:
        return [WHOLE]
    each = max(1, weights // math.prod(shape[1:]))
    return [slice(at, min(at + each, shape[0])) for at in range(0, shape[0], each)]


def of_shape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor cut to a shape, or filled up to it: along each axis with the mean of what is there."""
    for axis, size in enumerate(shape):
        if size <= tensor.shape[axis]:
            tensor = tensor.narrow(axis, 0, size)
        else:
            more = [size - tensor.shape[axis] if at == axis else -1 for at in range(tensor.ndim)]
            tensor = torch.cat([tensor, tensor.mean(axis, keepdim=True).expand(more)], axis)
    return tensor


def with_size(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    """A shape with another size along one axis."""
    return (*shape[:axis], size, *shape[axis + 1 :])
