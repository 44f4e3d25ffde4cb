"""What merge methods share: how a rule is applied to the experts' τᵢ of one tensor after the other.

The τᵢ of a tensor are a sequence that makes each one when it is asked for. A rule that passes over them holds one at a
time if it lets go of it (`del tau`) before the next; one that needs them all makes a list. Passing twice reads twice.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import Params, upcast

FUSED = re.compile(r"(^|\.)(in_proj_weight|W?qkv\.weight)$")  # names of projections to queries, keys and values
CACHED = 2**18  # numbers that are worked on while they are in the processor's caches
UNDIVIDED = 2**12  # numbers that are all worked on at once


class Taus(Sequence[Tensor]):
    """The experts' τᵢ of one tensor or some rows of it, in float32 or wider, each made when asked for and not kept."""

    def __init__(self, deltas: Sequence[Params], name: str, rows: slice = slice(None)):
        self.deltas, self.name, self.rows = deltas, name, rows

    def __len__(self) -> int:
        return len(self.deltas)

    def __getitem__(self, i: Any) -> Any:  # a Tensor for a number, Taus for a slice
        if isinstance(i, slice):
            return Taus(self.deltas[i], self.name, self.rows)
        tau = self.deltas[i][self.name]
        return upcast(tau if self.rows == slice(None) else tau[self.rows])

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self)))  # Sequence's own would hold each while the next is made


Rule = Callable[[Sequence[Tensor]], Tensor]
Parts = Callable[[], Iterable[tuple[Params, Sequence[Params]]]]
"""Each call passes over the model once: θ₀ and the τᵢ of one part of it after the other."""


def each_tensor(rule: Rule, base: Params, deltas: Sequence[Params]) -> dict[str, Tensor]:
    """The rule on every tensor, in float32 or wider. A rule leaves the τᵢ it is given as they are."""
    return {name: rule(Taus(deltas, name)) for name in base}


def each_matrix(
    rule: Rule,
    base: Params,
    deltas: Sequence[Params],
    others: float | None,
    scale: float = 1.0,
    split_qkv: bool = False,
) -> dict[str, Tensor]:
    """`scale` times what the rule gives for a matrix, and what `weighted` gives with `others` for any other tensor.

    A rule leaves the τᵢ it is given as they are and returns a tensor of its own. With `split_qkv` it is given the rows
    of queries, of keys and of values of a fused projection, `thirds_of`, one after the other.
    """

    def merged(name: str, theta: Tensor) -> Tensor:
        if theta.ndim != 2:
            return weighted(Taus(deltas, name), others)
        if split_qkv and (thirds := thirds_of(name, theta)):
            return torch.cat([rule(Taus(deltas, name, rows)) for rows in thirds])
        return rule(Taus(deltas, name))

    return {name: merged(name, theta).mul_(scale) for name, theta in base.items()}


def thirds_of(name: str, theta: Tensor) -> list[slice]:
    """The rows of queries, of keys and of values of a matrix that is named as one which holds the three; none unless
    each is square, as where keys and values have fewer heads than queries."""
    rows, width = theta.shape
    if rows != 3 * width or not FUSED.search(name):
        return []
    return [slice(k * width, (k + 1) * width) for k in range(3)]


def weighted(taus: Sequence[Tensor], others: float | None) -> Tensor:
    """λ Σᵢ τᵢ with λ = `others`: None is 1/N, the mean; 0 leaves the base, 1 adds every expert's change in full."""
    return total(taus).div_(len(taus)) if others is None else total(taus).mul_(others)


def total(taus: Iterable[Tensor]) -> Tensor:
    """Σᵢ τᵢ in one new tensor, at least one τᵢ: no stack is made, and of a generator one τᵢ is held at a time."""
    each = iter(taus)
    result = next(each).clone()
    for tau in each:
        result += tau
        del tau
    return result


def scaled_total(scales: Sequence[float], taus: Iterable[Tensor]) -> Tensor:
    """Σᵢ λᵢ τᵢ in one new tensor, of as many λᵢ as τᵢ, at least one: each product is let go of before the next."""
    result = None
    for scale, tau in zip(scales, taus, strict=True):
        if result is None:
            result = scale * tau
        else:
            result += scale * tau
        del tau
    assert result is not None
    return result


def by_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, some of their rows at a time: an eighth, or of large ones so many that what a step makes of
    them stays in the processor's caches."""
    shape = tensors[0].shape
    if shape.numel() <= UNDIVIDED:
        yield tensors
        return
    pieces = max(8, math.ceil(shape.numel() / CACHED))
    yield from zip(*(tensor.split(math.ceil(shape[0] / pieces)) for tensor in tensors), strict=True)


def inner_by_pieces(a: Tensor, b: Tensor) -> float:
    """⟨a, b⟩ of two tensors of one shape, added up in float64 piece by piece."""
    return sum(float((x * y).sum(dtype=torch.float64)) for x, y in by_pieces(a, b))


def layer_of(name: str) -> int | None:
    """The layer that a tensor is of: the first part of its name that is a whole number; None if there is none."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def rounded_down(count: float) -> int:
    """The whole number below a product of a count and a fraction, or the one that it misses by rounding.

    0.29 · 100 is 28.999999999999996 in floats, and means 29.
    """
    return math.floor(count + 1e-9)


def require_fraction(method: str, name: str, value: float) -> None:
    """InputError unless a hyperparameter lies in (0, 1]."""
    if not 0 < value <= 1:
        raise InputError(f"{method}: {name} must lie in (0, 1], it is {value}")


def require_examples(method: str, examples: int | None) -> None:
    """InputError if a method that uses data asks for less than one example of each task; None asks for all."""
    if examples is not None and examples < 1:
        raise InputError(f"{method}: examples must be at least 1, it is {examples}")
