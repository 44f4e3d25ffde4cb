"""Consensus task arithmetic: of the sum of the task vectors keep the weights that matter to several tasks.

The TALL mask of task i is mᵢ = [ |τᵢ| ≥ c |T − τᵢ| ] with T = Σⱼ τⱼ: the weights at which the sum is near to what the
task wants, measured by how far the task moved. δ = λ [ Σᵢ mᵢ ≥ k ] ⊙ T: weights that one task alone uses (selfish) or
none (catastrophic) go back to the base.

Source: Wang et al. 2024, "Localizing task information for improved model merging and compression" (arXiv 2405.07813).
Defaults: k = 2; c 0.4, the middle of the {0.2, …, 0.6} from which the paper takes one for each task by validation;
λ 0.3 as in `ta`, where the paper searches too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import Params
from common.merging.tensorwise import each_tensor, total


def consensus_ta(
    base: Params, deltas: Sequence[Params], *, agree: int = 2, threshold: float = 0.4, scale: float = 0.3
) -> Params:
    """The consensus delta, for tensors of any shape: `agree` is k, `threshold` c. InputError if k exceeds the tasks."""
    if not 0 <= agree <= len(deltas):
        raise InputError(f"consensus_ta: agree must lie between 0 and the {len(deltas)} tasks, it is {agree}")

    def merged(taus: Sequence[Tensor]) -> Tensor:
        every = total(taus)
        users = torch.zeros_like(every, dtype=torch.int16)
        for tau in taus:
            users += tau.abs() >= (every - tau).abs_().mul_(threshold)
            del tau
        return every.mul_(users >= agree).mul_(scale)

    return each_tensor(merged, base, deltas)
