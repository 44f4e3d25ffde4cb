"""Pickled checkpoints as safetensors files. Nothing that they name is imported or executed."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.core.errors import InputError
from common.io.checkpoints import write_tensors
from common.io.containers import Contents, model_in
from common.io.headers import mistaken_for, opened
from common.io.pickles import Pickled, lazy_tensors
from common.io.quantised import require_weights
from common.io.tensors import DTYPES

TARGETS = {  # the names that stock libraries look for
    "pytorch_model.bin": "model.safetensors",
    "pytorch_model_fsdp.bin": "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}
HALF = (torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class PickledHeader:
    """What a pickle says of a tensor, in the words of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]


def convert(source: Path, target: Path, float32: bool, entry: str = "") -> str:
    """Convert one file unless its target is made already, and say which of the two happened and what was taken."""
    known = mistaken_for(source)
    if "pointer" in known or "web page" in known or "empty" in known:
        raise InputError(f"{source} {known}")
    with lazy_tensors(source) as found:
        model = model_in(found, source, entry)
        headers = {name: PickledHeader(DTYPES[t.dtype], t.shape) for name, t in model.tensors.items()}
        require_weights(source, headers, {})
        said = "".join(f"; {part}" for part in model.said)
        if is_made(target, source, model, float32):
            return f"kept {target}{said}"
        tensors = {name: widened(pickled.read(), float32) for name, pickled in model.tensors.items()}
    write_tensors(target, tensors)
    return f"converted {source} to {target}: {len(tensors)} tensors, {target.stat().st_size / 1e6:.1f} MB{said}"


def widened(tensor: Tensor, float32: bool) -> Tensor:
    """A tensor as it is stored, or in float32 if that is asked for and it is a floating-point one."""
    return tensor.to(torch.float32) if float32 and tensor.is_floating_point() else tensor


def is_made(target: Path, source: Path, model: Contents[Pickled], float32: bool) -> bool:
    """Whether the target holds this model, whole, and in float32 if that is asked for.

    Raises: InputError if it holds anything else: it may be newer, or dearer, than what is converted.
    """
    try:
        with opened(target) as handle:
            names = set(handle.keys())
            odd = next(iter(sorted(names ^ model.tensors.keys())), None)
            odd = odd or next((n for n, t in model.tensors.items() if not alike(handle.get_tensor(n), t.read())), None)
            kinds = {handle.get_slice(name).get_dtype() for name in names}
    except InputError:
        return False  # there is none, or it is not whole
    if odd:
        raise InputError(f"{target} is there and differs from {source} in {odd}; remove it, or choose another --out")
    return not float32 or kinds.isdisjoint({DTYPES[dtype] for dtype in HALF})


def alike(made: Tensor, source: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN included, in float32 or as they are stored."""
    if made.shape != source.shape or made.dtype not in (source.dtype, torch.float32):
        return False
    source = source.to(made.dtype)
    return torch.equal(made, source) or bool(((made == source) | (made.isnan() & source.isnan())).all())


def target_of(file: Path) -> Path:
    """The same name with the suffix .safetensors, or the name that stock libraries look for."""
    return file.with_name(TARGETS.get(file.name, file.stem + ".safetensors"))
