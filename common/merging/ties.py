"""TIES: trim each task vector, elect a sign for every weight, average the tasks that agree with it.

τ̂ᵢ keeps the fraction `density` of τᵢ that is largest in magnitude, γ = sgn(Σᵢ τ̂ᵢ), and every weight of δ is λ times
the mean of those τ̂ᵢ that have the sign γ there; 0 where none has.

Source: Yadav et al. 2023, "TIES-Merging" (arXiv 2306.01708), Algorithm 1. Defaults: density 0.2, λ 1 (the paper's where
there is no validation data).
`granularity`: model trims a whole task vector by one threshold, as the paper does; tensor gives each tensor its own,
and passes over the model once to find them, not twice. Then tensors that moved little keep as large a part as those
that moved much.
Deviation: the released code keeps one weight more than the fraction, the threshold's own place counted from below.
Deviation: where the trimmed task vectors cancel exactly, γ is 0 and so is δ; the released code takes the sign that most
weights have.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.core.task_vectors import Params
from common.merging.magnitude import Granularity, least_kept, magnitude_thresholds, trim
from common.merging.tensorwise import Parts, Taus, by_pieces, require_fraction

Thresholds = Mapping[str, Mapping[int, float]]
"""The magnitude by which each task vector is trimmed, by tensor; that of all tensors under the name ""."""
WHOLE_MODEL = ""


def thresholds(parts: Parts, *, density: float = 0.2, granularity: Granularity = "model", **_: Any) -> Thresholds:
    """The magnitudes by which the task vectors are trimmed."""
    if granularity == "model":
        return {WHOLE_MODEL: magnitude_thresholds(parts, density)}
    return {
        name: {i: least_kept(tau, density) for i, tau in enumerate(Taus(deltas, name))}
        for base, deltas in parts()
        for name in base
    }


def ties(
    base: Params,
    deltas: Sequence[Params],
    trimmed: Thresholds,
    *,
    density: float = 0.2,
    scale: float = 1.0,
    granularity: Granularity = "model",
) -> Params:
    """The TIES delta, for tensors of any shape. InputError unless `density` lies in (0, 1]."""
    require_fraction("ties", "density", density)

    def of_name(name: str) -> Mapping[int, float]:
        return trimmed.get(WHOLE_MODEL if granularity == "model" else name, {})

    return {name: agreed_mean(Taus(deltas, name), density, of_name(name)).mul_(scale) for name in base}


def agreed_mean(taus: Sequence[Tensor], density: float, thresholds: Mapping[int, float]) -> Tensor:
    """Weight by weight, the mean of the τ̂ᵢ that have the sign γ of Σᵢ τ̂ᵢ.

    Each τᵢ is made once: γ is known in the end, so what lies above 0 and what lies below is added up apart.
    """
    sums: list[Tensor] = []
    for i, tau in enumerate(taus):
        if not sums:
            voters = torch.int8 if len(taus) < 128 else torch.int16
            sums = [torch.zeros_like(tau) for _ in range(3)] + [torch.zeros_like(tau, dtype=voters) for _ in range(2)]
        threshold = thresholds.get(i)
        threshold = least_kept(tau, density) if threshold is None else threshold
        for each, every, above, below, ups, downs in by_pieces(tau, *sums):
            kept = trim(each, density, threshold)
            every += kept
            above += kept.clamp(min=0)
            below -= kept.clamp(max=0)
            ups += (kept > 0).view(torch.int8)  # much faster than to add booleans
            downs += (kept < 0).view(torch.int8)
        del tau
    for every, above, below, ups, downs in by_pieces(*sums):
        sign = every.sign_()
        mean = torch.where(sign > 0, above, below).div_(torch.where(sign > 0, ups, downs).clamp_(min=1))
        every.copy_(mean.mul_(sign))
    return sums[0]
