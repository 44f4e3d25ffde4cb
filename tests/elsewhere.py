"""Tensors that lie elsewhere, as on a GPU, where there is none: what belongs together and lies apart is refused.

`torch.device("lazy")` stands for the GPU. A tensor there holds one of the CPU, which computes for it; with a CPU tensor
beside it an operation ends as CUDA's do, but for copies, indices and single numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("lazy:0")
COPIES = ("aten::_to_copy", "aten::copy_")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Elsewhere(torch.Tensor):
    """A tensor on DEVICE."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        laid_out = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), **laid_out, device=DEVICE, requires_grad=held.requires_grad
        )

    def __init__(self, held):
        self.held = held

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        return self.held.tolist()

    def numpy(self, *, force=False):
        raise TypeError("a tensor that lies elsewhere is no array")

    def __array__(self, *_, **__):
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return called(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Meanwhile tensors are made on DEVICE where that is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return called(func, args, kwargs or {})


def called(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operation gives where its tensors lie; RuntimeError if they lie apart."""
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.ndim and not t.is_meta]
    if there and here and name not in COPIES and not (name in INDEXED and isinstance(args[0], Elsewhere)):
        raise RuntimeError(f"{name}: {[tuple(tensor.shape) for tensor in here]} lie here, others elsewhere")
    asked = kwargs.get("device")
    if asked is not None:
        there = torch.device(asked).type == DEVICE.type
        kwargs = kwargs | {"device": torch.device("cpu") if there else asked}
    held_args, held_kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.held, (args, kwargs))
    result = func(*held_args, **held_kwargs)
    if result is None:
        return None
    if name.endswith("_") and not name.endswith("__"):  # in place
        return args[0]
    return tree_map_only(torch.Tensor, Elsewhere, result) if there else result


@contextmanager
def elsewhere(monkeypatch) -> Iterator[None]:
    """Work on DEVICE, in this thread alone, and with the optimizers that a GPU has."""
    import torch.optim.optimizer as optimizers

    @contextmanager
    def here():
        yield lambda write, *args: write(*args)

    supported = [*optimizers._get_fused_kernels_supported_devices(), DEVICE.type]
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: supported)
    monkeypatch.setattr("common.pipeline.read_ahead", iter)
    monkeypatch.setattr("common.pipeline.write_behind", here)
    with Mode():
        yield
