"""PCB-Merging: weigh every weight of every task by its size within the task and its agreement with the others.

With N tasks and μ(x) = (x − min x) / (max x − min x),
    bᵢ = exp(N μ(|τᵢ|)²) ⊙ tanh(τᵢ ⊙ Σⱼ τⱼ)      size within the task, times agreement between tasks
    wᵢ = μ(max(bᵢ, qᵢ))                            qᵢ such that the fraction `ratio` of bᵢ reaches it: the rest weighs 0
    δ = λ Σᵢ wᵢ ⊙ τᵢ / Σᵢ wᵢ                       0 where no task weighs anything.
Before this, |τᵢ| is cut at the value that the fraction `clip` of it exceeds.

Source: Du et al. 2024, "Parameter competition balancing for model merging" (arXiv 2410.02396), as its released code has
it: the printed formulas have a softmax for the exponential, of which μ removes the denominator, and a sum of softmaxes
over pairs of tasks for tanh. Defaults: ratio 0.05 and λ 1.2, what the code takes for vision models; clip 1e-4.
`granularity`: minimum, maximum, qᵢ and cut are those of a whole task vector (model), as in the code, or of each tensor
by itself, which spares four passes over the model.
Deviation: the code also lifts the smallest 1e-4 of |τᵢ| to a common value, which changes nothing that can be seen.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import Params
from common.merging.magnitude import Granularity
from common.merging.tensorwise import Parts, Taus, require_fraction, rounded_down, total
from common.merging.whole import nth_largest

EQUAL = 1e-6  # relative difference between two balances that are equal but for the rounding of exp and tanh


@dataclass(frozen=True)
class Range:
    """Of one task: least |τᵢ| and what the largest are cut at, qᵢ, and the largest bᵢ."""

    low: float
    cut: float
    threshold: float = 0.0
    top: float = 0.0


def whole_ranges(
    parts: Parts, *, ratio: float = 0.05, clip: float = 1e-4, granularity: Granularity = "model", **_: Any
) -> Mapping[int, Range] | None:
    """The range of each task over the whole model, where it is one for all tensors; four passes over the model."""
    return ranges(parts, ratio, clip) if granularity == "model" else None


def pcb(
    base: Params,
    deltas: Sequence[Params],
    surveyed: Mapping[int, Range] | None,
    *,
    ratio: float = 0.05,
    clip: float = 1e-4,
    scale: float = 1.2,
    granularity: Granularity = "model",
) -> Params:
    """The PCB delta, for tensors of any shape. At least one weight of each task is kept, of the model or tensor."""
    require_fraction("pcb", "ratio", ratio)
    if not 0 <= clip < 1:
        raise InputError(f"pcb: clip must lie in [0, 1), it is {clip}")

    def merged(name: str) -> Tensor:
        taus = Taus(deltas, name)
        found = surveyed
        if found is None:
            found = ranges(lambda: [({name: base[name]}, deltas)], ratio, clip)
        every = total(taus)
        delta, weights = torch.zeros_like(every), torch.zeros_like(every)
        for i, tau in enumerate(taus):
            if found[i].cut > 0:  # a task that moved nothing has no say
                weight = competition(balance(tau, every, len(taus), found[i]), found[i])
                delta += tau.clamp(-found[i].cut, found[i].cut).mul_(weight)
                weights += weight
                del weight
            del tau
        return delta.div_(weights.clamp_(min=1e-12)).mul_(scale)

    return {name: merged(name) for name in base}


def ranges(parts: Parts, ratio: float, clip: float) -> dict[int, Range]:
    """{task: its range} over all parts."""
    lows: dict[int, float] = {}

    def magnitudes() -> Iterator[tuple[int, Tensor]]:
        for base, deltas in parts():
            for name in base:
                for i, tau in enumerate(Taus(deltas, name)):
                    size = tau.abs()
                    lows[i] = min(lows.get(i, math.inf), float(size.min()))
                    yield i, size
                    del tau, size

    cuts = nth_largest(magnitudes, lambda n: rounded_down(n * clip) + 1)
    found = {i: Range(lows[i], cut) for i, cut in cuts.items()}
    tops: dict[int, float] = {}

    def balances() -> Iterator[tuple[int, Tensor]]:
        for base, deltas in parts():
            for name in base:
                taus = Taus(deltas, name)
                every = total(taus)
                for i, tau in enumerate(taus):
                    b = balance(tau, every, len(taus), found[i])
                    tops[i] = max(tops.get(i, -math.inf), float(b.max()))
                    yield i, b
                    del tau, b

    thresholds = nth_largest(balances, lambda n: max(1, rounded_down(n * ratio)))
    return {i: replace(each, threshold=thresholds[i], top=tops[i]) for i, each in found.items()}


def balance(tau: Tensor, every: Tensor, tasks: int, of: Range) -> Tensor:
    """bᵢ of one tensor, from its τᵢ and Σⱼ τⱼ."""
    size = to_unit_range(tau.clamp(-of.cut, of.cut).abs_(), of.low, of.cut)
    return size.square_().mul_(tasks).exp_().mul_((tau * every).tanh_())


def competition(balance: Tensor, of: Range) -> Tensor:
    """wᵢ in [0, 1] of one tensor, from its bᵢ, which are overwritten."""
    equal = EQUAL * abs(of.threshold)
    if of.threshold + equal >= of.top:  # one weight is left, or several as heavy: max − min would be 0
        return (balance >= of.threshold - equal).to(balance)
    return to_unit_range(balance.clamp_(min=of.threshold), of.threshold, of.top)


def to_unit_range(x: Tensor, low: float, high: float) -> Tensor:
    """Moves and scales x, in place, from [low, high] to [0, 1]; to zeros if that is one number."""
    return x.sub_(low).div_(high - low) if high > low else x.zero_()
