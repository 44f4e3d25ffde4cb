"""Model Breadcrumbs: leave out of every task vector both the outliers and the small change, add up the middle.

In every tensor of τᵢ the fraction `outliers` that is largest in magnitude is set to 0, and of what follows in order of
magnitude the fraction `keep` is kept: mᵢ ⊙ τᵢ. δ = λ Σᵢ mᵢ ⊙ τᵢ.

Source: Davari and Belilovsky 2023, "Model Breadcrumbs" (arXiv 2312.06795). Defaults: keep 0.15, outliers 0.006, λ 0.2,
the point at which the authors' released search begins.
Deviation: the released code orders each row of a tensor by itself; here, as in the paper, each tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import Params
from common.merging.magnitude import largest, share
from common.merging.tensorwise import each_tensor, require_fraction, total


def breadcrumbs(
    base: Params, deltas: Sequence[Params], *, keep: float = 0.15, outliers: float = 0.006, scale: float = 0.2
) -> Params:
    """The Breadcrumbs delta, for tensors of any shape. Every tensor keeps at least one weight of each task."""
    require_fraction("breadcrumbs", "keep", keep)
    if not 0 <= outliers < 1:
        raise InputError(f"breadcrumbs: outliers must lie in [0, 1), it is {outliers}")
    return each_tensor(lambda taus: total(middle(tau, keep, outliers) for tau in taus).mul_(scale), base, deltas)


def middle(tau: Tensor, keep: float, outliers: float) -> Tensor:
    """τ with zeros above and below the middle magnitudes."""
    removed = share(tau, outliers)
    reached = min(tau.numel(), removed + max(1, share(tau, keep)))
    magnitude = tau.abs()
    upper, lower = largest(magnitude, removed), largest(magnitude, reached)
    torch.abs(tau, out=magnitude)  # in its order again
    return magnitude.copy_((magnitude < upper).logical_and_(magnitude >= lower)).mul_(tau)
