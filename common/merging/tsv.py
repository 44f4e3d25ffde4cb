"""TSV-M, task singular vectors: keep each task's leading singular directions and make the tasks' directions orthogonal.

For every matrix, τᵢ = Uᵢ Sᵢ Vᵢᵀ is cut to its k = ⌊r/N⌋ leading components (r the smaller side, N tasks). Side by side
these form U, S and V, and with X̂ the matrix of orthonormal columns nearest to X the merged delta is δ = Û diag(S) V̂ᵀ.
Every other tensor is the arithmetic mean of the τᵢ, or what `others` says.

Source: Gargiulo et al. 2025, "Task singular vectors" (arXiv 2412.00081). Defaults: rank_fraction 1/N, scale 1.
Deviation: a matrix with fewer rows or columns than there are tasks (RoBERTa's 1-row token type embedding) would keep
⌊r/N⌋ = 0 components and be reset to the base by the released code; here it is averaged like the vectors.
Deviation: singular vectors of a zero singular value are arbitrary, so they take no part, neither in a τᵢ (a zero or
low-rank one would disturb the other tasks) nor in X̂ (when tasks share a direction).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.merging.tensorwise import each_matrix, require_fraction, weighted
from common.task_vectors import Params

ROWS = 1024  # of a matrix, in float64 at once


def tsv(
    base: Params,
    deltas: Sequence[Params],
    *,
    rank_fraction: float | None = None,
    scale: float = 1.0,
    others: float | None = None,
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
        return orthogonal_sum(taus, max(1, int(side * fraction + 1e-9)))  # 1e-9: 49 · (1/49) is below 1 in floats

    return {name: scale * delta for name, delta in each_matrix(merged, base, deltas, others).items()}


def orthogonal_sum(taus: Sequence[Tensor], rank: int) -> Tensor:
    """Û diag(S) V̂ᵀ of matrices of one shape, each cut to its `rank` leading components; zeros if all of them are 0."""
    parts = [leading_components(tau, rank) for tau in taus if tau.any()]
    if not parts:
        return torch.zeros_like(taus[0])
    u, s, v = (torch.cat(columns, dim=-1) for columns in zip(*parts, strict=True))
    del parts
    return (nearest_isometry(u) * s) @ nearest_isometry(v).mT


def leading_components(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (rows, k), S (k,), V (columns, k) of the k ≤ `rank` leading singular values of x that are not zero."""
    if x.shape[0] < x.shape[1]:
        v, s, u = leading_components(x.mT, rank)
        return u, s, v
    s, v = right_components(x)
    s, v = s[:rank], v[:, :rank]
    return x @ (v / s).to(x.dtype), s.to(x.dtype), v.to(x.dtype)


def nearest_isometry(x: Tensor) -> Tensor:
    """P Qᵀ of x = P Σ Qᵀ over its nonzero singular values: orthonormal columns where those of x are independent."""
    if x.shape[0] < x.shape[1]:
        return nearest_isometry(x.mT).mT
    s, v = right_components(x)
    return x @ (v / s @ v.mT).to(x.dtype)


def right_components(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nonzero singular values (k,) of x (R, D), falling, and their right vectors (D, k), both in float64.

    From xᵀx, which is exact enough in float64 and takes less time and memory than the SVD of x. That fails besides on
    columns that are orthonormal but for a few: LAPACK's does not converge where so many singular values are alike.
    """
    gram = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for rows in x.split(ROWS):
        wide = rows.double()
        gram.addmm_(wide.mT, wide)
    squares, v = torch.linalg.eigh(gram)
    of_x, of_gram = (max(x.shape) * torch.finfo(dtype).eps for dtype in (x.dtype, torch.float64))
    keep = squares > squares[-1] * max(of_x**2, of_gram)  # what exceeds the rounding of the largest one
    return squares[keep].sqrt().flip(0), v[:, keep].flip(1)
