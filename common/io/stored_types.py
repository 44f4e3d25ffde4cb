"""The types of stored weights: what a model is kept in, and how merged tensors take its type."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import LazyTensor, is_finite
from common.io.checkpoints import Checkpoint
from common.io.headers import StoredTensor, opened
from common.io.shards import Stored, stored_when_made
from common.io.tensors import bytes_of

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
NO_FLOATS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


def coarser(*kinds: str) -> torch.dtype:
    """Of types in which tensors are stored that of the fewest digits."""
    return max((FLOATS.get(kind, torch.float32) for kind in kinds), key=lambda dtype: torch.finfo(dtype).eps)


def output_type(base: Checkpoint, fields: Mapping[str, Any], asked: str = "") -> torch.dtype:
    """The type of most merged weights: that asked for, else what the base's config says, else most of its weights'."""
    said = fields.get("dtype") or fields.get("torch_dtype")
    named = asked or (said.removeprefix("torch.") if isinstance(said, str) else "")
    return NAMES.get(named) or most_of(base.rows.values())


def most_of(rows: Iterable[StoredTensor]) -> torch.dtype:
    """The floating-point type in which most bytes are stored; float32 if there is none that can be computed with."""
    sizes = Counter()
    for row in rows:
        if row.dtype in FLOATS:
            sizes[row.dtype] += row.end - row.begin
    return FLOATS[max(sizes, key=sizes.__getitem__)] if sizes else torch.float32


def as_stored(
    tensors: Mapping[str, LazyTensor], dtype: torch.dtype, base: Checkpoint, asked: bool = False
) -> dict[str, Stored]:
    """Merged tensors as they are stored, each made when it is written.

    Each has the type that the base has it in, for some are kept in float32 in a file of bfloat16: biases of a router,
    decays, norms. Where another `dtype` is `asked` for, or is what the base's config says though nothing is stored so,
    it is the type of what was in that of most bytes, and of what had fewer bits than it has.
    A buffer of the base that is no floating-point tensor, such as position ids, is no weight and is the base's own,
    bit for bit. InputError, when it is made, names a tensor whose values the type cannot hold.
    """
    own = {name: FLOATS[row.dtype] for name, row in base.rows.items() if row.dtype in FLOATS}
    if asked or dtype not in own.values():
        most = most_of(base.rows.values())
        own = {name: dtype if had == most or had.itemsize < dtype.itemsize else had for name, had in own.items()}
    stored = {}
    for name, tensor in tensors.items():
        row = base.rows.get(name)
        if row and row.dtype in NO_FLOATS:
            stored[name] = Stored(row.dtype, row.shape, row.nbytes, partial(read_buffer, row))
        else:
            kept = own.get(name, dtype)
            parts = tuple(partial(cast, part, kept, name) for part in tensor.parts)
            stored[name] = stored_when_made(LazyTensor(tensor.shape, parts), kept)
    return stored


def read_buffer(row: StoredTensor) -> list[memoryview]:
    """The bytes of a buffer of the base."""
    with opened(row.file) as handle:
        return [bytes_of(handle.get_tensor(row.stored).clone())]


def cast(make: Callable[[], Tensor], dtype: torch.dtype, name: str) -> Tensor:
    """What is made, in a type; InputError if that cannot hold it."""
    made = make()
    stored = made.to(dtype)
    if not is_finite(stored):
        raise InputError(
            f"{name}: the merged weights reach {made.abs().max():.3g}, more than {dtype} can hold; smaller "
            "coefficients of the merge would do, or a wider model.dtype"
        )
    return stored
