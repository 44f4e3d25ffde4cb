"""SCE and VaRM: weigh every expert's tensor by how far it moved, where the experts differ most.

SCE, tensor by tensor, with v the variance of a weight over the tasks:
    select     mask = the fraction `select` of the weights with v > 0, those of largest v
    calculate  wᵢ = mean (mask ⊙ τᵢ)² / Σⱼ mean (mask ⊙ τⱼ)²            1/N if all are 0
    erase      eᵢ = 1 where τᵢ has the sign of Σⱼ τⱼ, else 0            a sum of 0 counts as +
    δ = Σᵢ wᵢ eᵢ ⊙ τᵢ / Σᵢ wᵢ eᵢ                                        0 where nothing is left
VaRM selects every weight and erases none: δ = Σᵢ wᵢ τᵢ.

Source: Wan et al. 2024, "FuseChat: knowledge fusion of chat models", SCE in version 2 (arXiv 2408.07990), VaRM in
version 1 (arXiv 2402.16107), and their code. Default: select 0.1, FuseChat-7B's; 1 has no mask, not even where v is 0.
As in their code the mask decides wᵢ alone; `masked` also erases and adds up what it left of the τᵢ, as mergekit does.
Deviation: variances that differ by less than 1e-5 of themselves count as equal, and equal ones are selected together.
VaRM's variation ratio is that of the mean squares, one of three in its code.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.task_vectors import Params
from common.merging.magnitude import largest
from common.merging.tensorwise import each_tensor, inner_by_pieces, require_fraction, rounded_down, total

EQUAL = 1e-5  # relative difference of variances that are equal but for rounding


def sce(base: Params, deltas: Sequence[Params], *, select: float = 0.1, masked: bool = False) -> Params:
    """The SCE delta, for tensors of any shape. InputError unless `select` lies in (0, 1]."""
    require_fraction("sce", "select", select)

    def merged(taus: Sequence[Tensor]) -> Tensor:
        every, mask = selected(taus, select)
        positive = every >= 0
        del every
        weights = variation_ratios(taus, mask)
        delta = torch.zeros_like(taus[0])
        divisor = torch.zeros_like(delta)
        for weight, tau in zip(weights, taus, strict=True):
            tau = tau * mask if masked and mask is not None else tau
            agrees = weight * torch.where(positive, tau > 0, tau < 0)
            divisor += agrees
            delta += agrees.mul_(tau)
            del tau, agrees
        return delta.div_(divisor.masked_fill_(divisor == 0, 1))

    return each_tensor(merged, base, deltas)


def varm(base: Params, deltas: Sequence[Params]) -> Params:
    """The VaRM delta, for tensors of any shape."""

    def merged(taus: Sequence[Tensor]) -> Tensor:
        delta = torch.zeros_like(taus[0])
        for weight, tau in zip(variation_ratios(taus, None), taus, strict=True):
            delta.add_(tau, alpha=weight)
            del tau
        return delta

    return each_tensor(merged, base, deltas)


def selected(taus: Sequence[Tensor], select: float) -> tuple[Tensor, Tensor | None]:
    """Σᵢ τᵢ, and the mask of the weights whose variance over the tasks is largest; None selects all.

    The variance is taken about the first task, so that it is 0 where all are equal.
    """
    if select == 1:
        return total(taus), None
    first = taus[0]
    every, squares = torch.zeros_like(first), torch.zeros_like(first)
    for tau in taus[1:]:
        apart = tau - first
        del tau
        every += apart
        squares.addcmul_(apart, apart)
        del apart
    variance = squares.div_(len(taus)).addcmul_(every, every, value=-1 / len(taus) ** 2).clamp_(min=0)
    every.add_(first, alpha=len(taus))
    del first
    count = rounded_down(select * int(variance.count_nonzero()))
    threshold = largest(variance.clone(), count)
    return every, variance >= (1 - EQUAL) * threshold


def variation_ratios(taus: Sequence[Tensor], mask: Tensor | None) -> list[float]:
    """The mean square of what the mask leaves of each τᵢ, as parts of their sum; 1/N if all are 0."""
    sizes = []
    for tau in taus:
        tau = tau if mask is None else tau * mask
        sizes.append(inner_by_pieces(tau, tau))
        del tau
    every = sum(sizes)
    return [size / every for size in sizes] if every > 0 else [1 / len(sizes)] * len(sizes)
