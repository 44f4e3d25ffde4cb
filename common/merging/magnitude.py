"""Thresholds on the magnitudes of one tensor. Equal magnitudes share their fate, so nothing depends on their order."""

import math

import numpy as np
from torch import Tensor

from common.merging.tensorwise import rounded_down


def trim(tau: Tensor, density: float) -> Tensor:
    """τ with zeros but for the fraction `density` of its weights that is largest in magnitude, at least one weight."""
    threshold = largest(tau.abs(), max(1, share(tau, density)))
    return tau.where(tau.abs() >= threshold, 0)  # a product with the mask would make a number of each of its bits


def largest(x: Tensor, count: int) -> float:
    """The `count`-th largest value in x, which loses its order; above all of them for a count of 0.

    By numpy on the CPU, which needs a twentieth of the time of torch's topk there and, in place, none of its memory.
    """
    if count == 0:
        return math.inf
    place = x.numel() - count
    values: np.ndarray = x.flatten().cpu().numpy()  # a view of a contiguous x on the CPU
    values.partition(place)
    return float(values[place])


def share(x: Tensor, fraction: float) -> int:
    """How many of the weights of x a fraction is, rounded down."""
    return rounded_down(x.numel() * fraction)
