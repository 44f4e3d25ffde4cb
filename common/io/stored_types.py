"""The types of stored weights: what a model is kept in, and how merged tensors take its type."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from common.core.errors import InputError
from common.io.checkpoints import Checkpoint
from common.io.headers import Row, opened

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
NO_FLOATS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


def output_type(base: Checkpoint, fields: Mapping[str, Any], asked: str = "") -> torch.dtype:
    """The type of the merged weights: that asked for, else what the base's config says, else most of its weights'."""
    said = fields.get("dtype") or fields.get("torch_dtype")
    named = asked or (said.removeprefix("torch.") if isinstance(said, str) else "")
    return NAMES.get(named) or most_of(base.rows.values())


def most_of(rows: Iterable[Row]) -> torch.dtype:
    """The floating-point type in which most bytes are stored; float32 if there is none that can be computed with."""
    sizes = Counter()
    for row in rows:
        if row.dtype in FLOATS:
            sizes[row.dtype] += row.end - row.begin
    return FLOATS[max(sizes, key=sizes.__getitem__)] if sizes else torch.float32


def as_stored(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, base: Checkpoint
) -> Iterator[tuple[str, Tensor]]:
    """A stream of merged tensors in the type they are stored in.

    A buffer of the base that is no floating-point tensor, such as position ids, is no weight and is the base's own,
    bit for bit. InputError names a tensor whose values the type cannot hold.
    """
    for name, tensor in tensors:
        row = base.rows.get(name)
        if row and row.dtype in NO_FLOATS:
            with opened(row.file) as handle:
                yield name, handle.get_tensor(row.stored).clone()
            continue
        stored = tensor.to(dtype)
        if not stored.isfinite().all():
            raise InputError(
                f"{name}: the merged weights reach {tensor.abs().max():.3g}, too much for model.dtype {dtype}"
            )
        del tensor
        yield name, stored
        del stored  # before the next is made
