"""Arithmetic on named tensors: task vectors τ = θ − θ₀ and the models built from them.

θ₀, an expert's θ and a merged θ are one type with three contents: the same names, each with a tensor of the same shape.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.core.errors import InputError

Params = Mapping[str, Tensor]
Shapes = Mapping[str, Sequence[int]]


class LazyParams(Mapping[str, Tensor]):
    """Tensors that are made by name whenever they are asked for, and not kept.

    anew: whether each is made anew, so that who asks for it may overwrite it.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor], anew: bool = False):
        self.names, self.make, self.anew = dict.fromkeys(names), make, anew

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is asked for, of a shape that is known before.

    parts: what make it, one after the other along its first axis; a stack is made a part at a time.
    """

    shape: tuple[int, ...]
    parts: tuple[Callable[[], Tensor], ...]


def as_leaf_tensors(theta: Params) -> dict[str, Tensor]:
    """Tensors that share the values of θ, outside any graph so far, and require gradients."""
    return {name: p.detach().requires_grad_() for name, p in theta.items()}


def upcast(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider: half precision is a storage format here, never an arithmetic one."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_finite(x: Tensor) -> bool:
    """Whether x is free of NaN and Inf, told by its sum, which is finite only then; where the sum of large numbers is
    not, by the extremes. torch's isfinite makes a copy of x and two masks."""
    return x.numel() == 0 or bool(x.sum().isfinite()) or bool(torch.stack(x.aminmax()).isfinite().all())


def require_same_tensors(theta: Params, reference: Params) -> None:
    """InputError naming the first tensor of `theta` that is missing, extra or of another shape than in `reference`."""
    require_same_shapes({n: t.shape for n, t in theta.items()}, {n: t.shape for n, t in reference.items()})


def require_same_shapes(found: Shapes, expected: Shapes, who: str = "") -> None:
    """InputError naming the first tensor whose shape is missing, extra or another than expected.

    who: whose shapes these are (a file, say), with which the sentence opens.
    """
    begin = f"{who}: " if who else ""
    for name, shape in expected.items():
        if name not in found:
            raise InputError(f"{begin}{name}: missing, a tensor of shape {tuple(shape)} is expected")
    for name, shape in found.items():
        if name not in expected:
            raise InputError(f"{begin}{name}: extra, no tensor of that name is expected")
        if tuple(shape) != tuple(expected[name]):
            raise InputError(f"{begin}{name}: {tuple(shape)} against {tuple(expected[name])}")


def subtract(theta: Params, theta_0: Params) -> dict[str, Tensor]:
    """The task vector τ = θ − θ₀, float32 or wider. InputError where names or shapes differ."""
    require_same_tensors(theta, theta_0)
    return {name: upcast(tensor) - upcast(theta_0[name]) for name, tensor in theta.items()}


def lazy_task_vector(read: Callable[[str], Tensor], theta_0: Params) -> LazyParams:
    """The task vector τ = θ − θ₀ of an expert whose tensors are read by name when they are asked for, and not kept.

    What `read` returns is overwritten.
    """
    return LazyParams(theta_0, lambda name: read(name).sub_(theta_0[name]), anew=True)


def made_anew(params: Params) -> bool:
    """Whether each tensor is made when it is asked for, so that who asks for it may overwrite it."""
    return isinstance(params, LazyParams) and params.anew


def add(theta_0: Params, delta: Params, scale: float = 1.0) -> dict[str, Tensor]:
    """θ₀ + scale·δ, float32 or wider. InputError where names or shapes differ."""
    require_same_tensors(delta, theta_0)
    return {name: torch.add(upcast(tensor), upcast(delta[name]), alpha=scale) for name, tensor in theta_0.items()}


def inner(a: Params, b: Params) -> float:
    """⟨a, b⟩ over the tensors of `a`, summed in float64."""
    return sum(float((p.double() * b[name].double()).sum()) for name, p in a.items())


def norm(params: Params) -> float:
    """The Euclidean norm of all tensors together, summed in float64."""
    return sum(map(squared, params.values())) ** 0.5


def squared(x: Tensor) -> float:
    """The sum of the squares of a tensor's numbers, in float64."""
    return float(x.double().square().sum())
