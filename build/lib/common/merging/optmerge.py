"""OptMerge: WUDI on task vectors whose noise is cut off by singular value decompositions.

With τ̄ the mean of the τᵢ and k = ⌊r/N⌋ (r the smaller side, N tasks) every matrix has
    τ̃ᵢ = τ̄ + the k leading components of τᵢ − τ̄        Lᵢ = S_k V_kᵀ of the k leading components U_k S_k V_kᵀ of τᵢ
and Adam from M = Σᵢ τᵢ minimises Σᵢ ‖(M − τ̃ᵢ) Lᵢᵀ‖²_F / ‖τᵢ‖²_F. Every other tensor is the mean, or what `others`
says. For experts that are adapters (`adapters`) τ̃ᵢ is cut from τᵢ itself, and SGD with momentum 0.9 starts from τ̄.

Source: Wei et al. 2025, "Unifying multimodal large language model capabilities and modalities via model merging"
(arXiv 2505.19892), and its authors' code. Defaults: lr 1e-5 (adapters: they take 1e-4), 300 steps, scale 1; for
multimodal models they take scale 0.1 and 0.2. At least one component is kept.
Deviation: the code averages `lm_head`; here it is a matrix like others. Queries, keys and values of a fused
matrix are taken apart, as the authors' models have them, unless `split_qkv` is off.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.linalg import truncated_svd
from common.core.task_vectors import Params
from common.merging.tensorwise import each_matrix, weighted
from common.merging.wudi import descend


def optmerge(
    base: Params,
    deltas: Sequence[Params],
    *,
    lr: float = 1e-5,
    steps: int = 300,
    adapters: bool = False,
    scale: float = 1.0,
    others: float | None = None,
    split_qkv: bool = True,
) -> Params:
    """The OptMerge delta. `scale` is a factor on every tensor, `others` the λ of Σᵢ τᵢ for what is no matrix (None:
    1/N). InputError if lr ≤ 0.
    """
    if lr <= 0 or steps < 0:
        raise InputError(f"optmerge: lr must be above 0 and steps at least 0, they are {lr} and {steps}")

    def merged(taus: Sequence[Tensor]) -> Tensor:
        mean = weighted(taus, None)
        gram_DD, target = mean.new_zeros(mean.shape[1], mean.shape[1]), torch.zeros_like(mean)
        rank = max(1, min(mean.shape) // len(taus))
        for tau in taus:
            if energy := float(tau.square().sum()):
                _, s, v = truncated_svd(tau, rank)
                task_gram_DD = (v * s.square()) @ v.mT / energy
                gram_DD += task_gram_DD
                target += denoised(tau, mean, rank, adapters) @ task_gram_DD
            del tau
        if adapters:
            return descend(mean, gram_DD, target, steps, lambda m: torch.optim.SGD([m], lr=lr, momentum=0.9))
        return descend(mean.mul_(len(taus)), gram_DD, target, steps, lambda m: torch.optim.Adam([m], lr=lr))

    return each_matrix(merged, base, deltas, others, scale, split_qkv)


def denoised(tau: Tensor, mean: Tensor, rank: int, adapters: bool) -> Tensor:
    """τ̃ᵢ (R, D)."""
    residual = tau if adapters else tau - mean
    if not residual.any():
        return mean.clone() if not adapters else residual
    u, s, v = truncated_svd(residual, rank)
    cut = (u * s) @ v.mT
    return cut if adapters else cut.add_(mean)
