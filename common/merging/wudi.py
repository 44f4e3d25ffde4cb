"""WUDI: the merged matrix M whose difference to each task vector is orthogonal to that task vector's rows.

For every matrix, Adam from M = Σᵢ τᵢ minimises Σᵢ ‖(M − τᵢ) τᵢᵀ‖²_F / ‖τᵢ‖²_F. The rows of τᵢ stand in for the inputs
of the layer, so no data are needed. Other tensors have no such inputs: their delta is 0, or what `others` says.

Source: Cheng et al. 2025, "Whoever started the interference should end it" (WUDI-Merging, arXiv 2503.08099).
Defaults: lr 1e-5, 300 steps, scale 1 (FDA for RoBERTa: lr 2e-5). The paper leaves everything
outside the blocks at the base, as `scope` in registry.py says. `wudi_exact` goes to the minimum itself.
A fused matrix of queries, keys and values is one matrix, as theirs is for CLIP, unless `split_qkv` is on.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from common.core.errors import InputError
from common.core.task_vectors import Params
from common.merging.tensorwise import each_matrix

AT_ONCE = 2**24  # weights that descend together


def wudi(
    base: Params,
    deltas: Sequence[Params],
    *,
    lr: float = 1e-5,
    steps: int = 300,
    scale: float = 1.0,
    others: float | None = 0.0,
    split_qkv: bool = False,
) -> Params:
    """The WUDI delta, with `lr` and `steps` of Adam (no weight decay). Nothing is random. InputError if lr ≤ 0.

    `scale` is a factor on every tensor, `others` the λ of Σᵢ τᵢ for what is no matrix (None: 1/N).
    """
    if lr <= 0 or steps < 0:
        raise InputError(f"wudi: lr must be above 0 and steps at least 0, they are {lr} and {steps}")
    return each_matrix(lambda taus: minimise_interference(taus, lr, steps), base, deltas, others, scale, split_qkv)


def minimise_interference(taus: Sequence[Tensor], lr: float, steps: int) -> Tensor:
    """M (R, D) after `steps` of Adam from Σ τᵢ, each τᵢ (R, D). A τᵢ of zeros has no term.

    With Gᵢ = τᵢᵀτᵢ / ‖τᵢ‖² the gradient is 2 (M ΣGᵢ − Σ τᵢGᵢ): both sums are formed once, and a step costs 2RD²
    operations for any number of tasks N. The objective taken literally costs 4NR²D, less only where D > 2NR.
    """
    merged = torch.zeros_like(taus[0])
    gram_DD = merged.new_zeros(merged.shape[1], merged.shape[1])
    target = torch.zeros_like(merged)
    for tau in taus:
        energy = tau.square().sum()
        if energy > 0:
            task_gram_DD = (tau.mT @ tau).div_(energy)
            merged += tau
            gram_DD += task_gram_DD
            target += tau @ task_gram_DD
        del tau
    return descend(merged, gram_DD, target, steps, lambda m: torch.optim.Adam([m], lr=lr))


def descend(
    merged: Tensor, gram_DD: Tensor, target: Tensor, steps: int, optimizer: Callable[[Tensor], Optimizer]
) -> Tensor:
    """M after `steps` from `merged`, which is changed, along the gradient 2 (M gram_DD − target); as it is if the Gram
    matrix is 0.

    A row's gradient hangs on that row alone, and so does a step of an optimizer that works weight by weight. So of a
    large M, as an embedding is, some rows at a time go all the way: an optimizer holds several times what it moves.
    """
    rows = max(1, AT_ONCE // merged.shape[1])
    for part, part_target in zip(merged.split(rows), target.split(rows), strict=True) if gram_DD.any() else ():
        descent = optimizer(part)
        for _ in range(steps):
            part.grad = 2 * (part @ gram_DD - part_target)
            descent.step()
    return merged
