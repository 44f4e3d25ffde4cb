"""Thresholds on magnitudes, of one tensor or of a model. Equal ones share their fate: nothing hangs on their order."""

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.merging.tensorwise import Parts, Taus, rounded_down
from common.merging.whole import nth_largest

SAMPLE = 1000  # values by which many equal ones are told

Granularity = Literal["model", "tensor"]
"""Whether a threshold or norm is one for the whole model, as most papers have it, or one for each tensor."""


def magnitude_thresholds(parts: Parts, density: float, matrices: bool = False) -> dict[int, float]:
    """{task: the magnitude that the fraction `density` of its weights reaches, at least one of them}, over the
    whole model or all its matrices. The model is passed over twice.
    """

    def magnitudes() -> Iterator[tuple[int, Tensor]]:
        for base, deltas in parts():
            for name, theta in base.items():
                if theta.ndim == 2 or not matrices:
                    yield from ((i, tau.abs()) for i, tau in enumerate(Taus(deltas, name)))

    return nth_largest(magnitudes, lambda n: max(1, rounded_down(n * density)))


def trim(tau: Tensor, density: float, threshold: float | None = None) -> Tensor:
    """τ with zeros but for the fraction `density` of its weights that is largest in magnitude, at least one weight; or
    for those whose magnitude reaches a `threshold`."""
    threshold = least_kept(tau, density) if threshold is None else threshold
    if threshold == 0:
        return tau.clone()
    least = torch.tensor(threshold, dtype=tau.dtype)
    below = torch.nextafter(least, torch.zeros_like(least)).item()
    return torch.nn.functional.hardshrink(tau, below)  # keeps what is above it, in one pass


def least_kept(tau: Tensor, density: float) -> float:
    """The magnitude that the fraction `density` of the weights of τ reaches, at least one; 0 where it is all."""
    count = max(1, share(tau, density))
    return largest(tau.abs(), count) if count < tau.numel() else 0.0


def largest(x: Tensor, count: int) -> float:
    """The `count`-th largest value in x, which loses its order; above all of them for a count of 0.

    By numpy on the CPU, which needs a twentieth of the time of torch's topk there and, in place, none of its memory;
    but where most values are one, as the zeros that DARE leaves, by counting, for there numpy is slow beyond measure.
    """
    if count == 0:
        return math.inf
    place = x.numel() - count
    values: np.ndarray = x.flatten().cpu().numpy()  # a view of a contiguous x on the CPU
    sample = values[:: len(values) // SAMPLE + 1]
    if len(np.unique(sample)) < len(sample) / 2:
        return nth_largest(lambda: [(0, x)], lambda _: count)[0]
    values.partition(place)
    return float(values[place])


def share(x: Tensor, fraction: float) -> int:
    """How many of the weights of x a fraction is, rounded down."""
    return rounded_down(x.numel() * fraction)
