"""What methods share: they act on one tensor at a time, on the list of the experts' τᵢ of that tensor."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from common.errors import InputError
from common.task_vectors import Params, widen

Rule = Callable[[list[Tensor]], Tensor]


def each_tensor(rule: Rule, base: Params, deltas: Sequence[Params]) -> dict[str, Tensor]:
    """The rule on every tensor, in float32 or wider. A rule leaves the τᵢ it is given as they are."""
    return {name: rule([widen(delta[name]) for delta in deltas]) for name in base}


def each_matrix(rule: Rule, base: Params, deltas: Sequence[Params], others: float | None) -> dict[str, Tensor]:
    """The rule on every matrix, and `weighted` with `others` on every other tensor (biases, norms, convolutions)."""
    return each_tensor(lambda taus: rule(taus) if taus[0].ndim == 2 else weighted(taus, others), base, deltas)


def weighted(taus: Sequence[Tensor], others: float | None) -> Tensor:
    """λ Σᵢ τᵢ with λ = `others`: None is 1/N, the mean; 0 leaves the base, 1 adds every expert's change in full."""
    return total(taus).div_(len(taus)) if others is None else total(taus).mul_(others)


def total(taus: Iterable[Tensor]) -> Tensor:
    """Σᵢ τᵢ in one new tensor, at least one τᵢ: no stack is made, and of a generator one τᵢ is held at a time."""
    each = iter(taus)
    result = next(each).clone()
    for tau in each:
        result += tau
    return result


def require_fraction(method: str, name: str, value: float) -> None:
    """InputError unless a hyperparameter lies in (0, 1]."""
    if not 0 < value <= 1:
        raise InputError(f"{method}: {name} must lie in (0, 1], it is {value}")
