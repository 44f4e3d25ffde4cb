"""TIES: trim each task vector, elect a sign for every weight, average the tasks that agree with it.

τ̂ᵢ keeps the fraction `density` of τᵢ that is largest in magnitude, γ = sgn(Σᵢ τ̂ᵢ), and every weight of δ is λ times
the mean of those τ̂ᵢ that have the sign γ there; 0 where none has.

Source: Yadav et al. 2023, "TIES-Merging" (arXiv 2306.01708), Algorithm 1. Defaults: density 0.2, λ 1 (the paper's where
there is no validation data).
Deviation: the paper trims a whole task vector by one threshold; here every tensor has its own, so that tensors can be
merged one at a time. Tensors that moved little keep as large a part of their weights as those that moved much.
Deviation: where the trimmed task vectors cancel exactly, γ is 0 and so is δ; the released code takes the sign that most
weights have.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.task_vectors import Params
from common.merging.magnitude import trim
from common.merging.tensorwise import each_tensor, require_fraction, total


def ties(base: Params, deltas: Sequence[Params], *, density: float = 0.2, scale: float = 1.0) -> Params:
    """The TIES delta, for tensors of any shape. InputError unless `density` lies in (0, 1]."""
    require_fraction("ties", "density", density)
    return each_tensor(lambda taus: agreed_mean(taus, density).mul_(scale), base, deltas)


def agreed_mean(taus: Sequence[Tensor], density: float) -> Tensor:
    """Weight by weight, the mean of the τ̂ᵢ that have the sign γ of Σᵢ τ̂ᵢ. They are trimmed twice rather than kept."""
    sign = total(trim(tau, density) for tau in taus).sign_()
    agreed, voters = torch.zeros_like(sign), torch.zeros_like(sign, dtype=torch.int16)
    for kept in (trim(tau, density) for tau in taus):
        agreed += kept.mul_(sign).clamp_(min=0)  # γ τ̂ᵢ, which is above 0 where the signs agree
        voters += kept > 0
        del kept
    return agreed.div_(voters.clamp_(min=1)).mul_(sign)
