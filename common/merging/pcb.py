"""PCB-Merging: weigh every weight of every task by its size within the task and its agreement with the others.

With N tasks and μ(x) = (x − min x) / (max x − min x),
    bᵢ = exp(N μ(|τᵢ|)²) ⊙ tanh(τᵢ ⊙ Σⱼ τⱼ)      size within the task, times agreement between tasks
    wᵢ = μ(max(bᵢ, qᵢ))                            qᵢ such that the fraction `ratio` of bᵢ reaches it: the rest weighs 0
    δ = λ Σᵢ wᵢ ⊙ τᵢ / Σᵢ wᵢ                       0 where no task weighs anything.
Before this, |τᵢ| is cut at the value that the fraction `clip` of it exceeds.

Source: Du et al. 2024, "Parameter competition balancing for model merging" (arXiv 2410.02396), as its released code has
it: the printed formulas have a softmax for the exponential, of which μ removes the denominator, and a sum of softmaxes
over pairs of tasks for tanh. Defaults: ratio 0.05 and λ 1.2, what the code takes for vision models; clip 1e-4.
Deviation: minimum, maximum, qᵢ and cut are those of one tensor, not of the whole task vector.
Deviation: the code also lifts the smallest 1e-4 of |τᵢ| to a common value, which changes nothing that can be seen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import Params
from common.merging.magnitude import largest, share
from common.merging.tensorwise import each_tensor, require_fraction, total

EQUAL = 1e-6  # relative difference between two balances that are equal but for the rounding of exp and tanh


def pcb(
    base: Params, deltas: Sequence[Params], *, ratio: float = 0.05, clip: float = 1e-4, scale: float = 1.2
) -> Params:
    """The PCB delta, for tensors of any shape. Every tensor keeps at least one weight of each task."""
    require_fraction("pcb", "ratio", ratio)
    if not 0 <= clip < 1:
        raise InputError(f"pcb: clip must lie in [0, 1), it is {clip}")

    def merged(taus: Sequence[Tensor]) -> Tensor:
        every = total(taus)
        delta, weights = torch.zeros_like(every), torch.zeros_like(every)
        for tau in filter(Tensor.any, taus):  # a task that moved nothing has no say
            cut = largest(tau.abs(), share(tau, clip) + 1)
            clipped, agreement = tau.clamp(-cut, cut), tau * every
            del tau
            weight = competition(clipped, agreement, len(taus), ratio)
            del agreement
            delta += clipped.mul_(weight)
            weights += weight
            del clipped, weight
        return delta.div_(weights.clamp_(min=1e-12)).mul_(scale)

    return each_tensor(merged, base, deltas)


def competition(tau: Tensor, agreement: Tensor, tasks: int, ratio: float) -> Tensor:
    """wᵢ in [0, 1] of one task, from its τᵢ and from τᵢ ⊙ Σⱼ τⱼ, which is overwritten."""
    balance = to_unit_range(tau.abs()).square_().mul_(tasks).exp_().mul_(agreement.tanh_())
    threshold = largest(agreement.copy_(balance), max(1, share(tau, ratio)))
    equal = EQUAL * abs(threshold)
    if threshold + equal >= float(balance.max()):  # one weight is left, or several as heavy: max − min would be 0
        return (balance >= threshold - equal).to(tau)
    return to_unit_range(balance.clamp_(min=threshold))


def to_unit_range(x: Tensor) -> Tensor:
    """Moves and scales x, in place, to [0, 1]; to zeros if it is constant."""
    low, high = x.min(), x.max()
    return x.sub_(low).div_(high - low) if high > low else x.zero_()
