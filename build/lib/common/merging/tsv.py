"""TSV-M, task singular vectors: keep each task's leading singular directions and make the tasks' directions orthogonal.

For every matrix, τᵢ = Uᵢ Sᵢ Vᵢᵀ is cut to its k = ⌊r/N⌋ leading components (r the smaller side, N tasks). Side by side
these form U, S and V, and with X̂ the matrix of orthonormal columns nearest to X the merged delta is δ = Û diag(S) V̂ᵀ.
Every other tensor is the arithmetic mean of the τᵢ, or what `others` says.

Source: Gargiulo et al. 2025, "Task singular vectors" (arXiv 2412.00081). Defaults: rank_fraction 1/N, scale 1.
Deviation: a matrix with fewer rows or columns than there are tasks (RoBERTa's 1-row token type embedding) would keep
⌊r/N⌋ = 0 components and be reset to the base by the released code; here it is averaged like the vectors.
Deviation: singular vectors of a zero singular value are arbitrary, so they take no part, neither in a τᵢ (a zero or
low-rank one would disturb the other tasks) nor in X̂ (when tasks share a direction).
A fused matrix of queries, keys and values is one matrix, as theirs is, unless `split_qkv` is on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.linalg import nearest_isometry, truncated_svd
from common.core.task_vectors import Params
from common.merging.tensorwise import each_matrix, require_fraction, rounded_down, weighted


def tsv(
    base: Params,
    deltas: Sequence[Params],
    *,
    rank_fraction: float | None = None,
    scale: float = 1.0,
    others: float | None = None,
    split_qkv: bool = False,
) -> Params:
    """The TSV-M delta. `rank_fraction` is the part of the rank each task keeps, at least one component; None is 1/N.

    Above 1/N the tasks' directions outnumber the dimensions and Û, V̂ are the nearest partial isometries. `scale` is a
    factor on every tensor, `others` the λ of Σᵢ τᵢ for what is no matrix (None: 1/N).
    """
    fraction = 1 / len(deltas) if rank_fraction is None else rank_fraction
    require_fraction("tsv", "rank_fraction", fraction)

    def merged(taus: Sequence[Tensor]) -> Tensor:
        side = min(taus[0].shape)
        if side < len(taus):
            return weighted(taus, others)
        return orthogonal_sum(taus, max(1, rounded_down(side * fraction)))

    return each_matrix(merged, base, deltas, others, scale, split_qkv)


def orthogonal_sum(taus: Sequence[Tensor], rank: int) -> Tensor:
    """Û diag(S) V̂ᵀ of matrices of one shape, each cut to its `rank` leading components; zeros if all of them are 0."""
    parts = [truncated_svd(tau, rank) for tau in taus if tau.any()]
    if not parts:
        return torch.zeros_like(taus[0])
    u, s, v = (torch.cat(columns, dim=-1) for columns in zip(*parts, strict=True))
    del parts
    return (nearest_isometry(u) * s) @ nearest_isometry(v).mT
