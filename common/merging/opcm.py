"""OPCM: merge one expert after the other, of each only what is orthogonal to what is merged already.

D₁ = τ₁ and D_t = D_{t−1} + P(τ_t). For a matrix D_{t−1} = U S Vᵀ, P leaves out of Uᵀ τ V its diagonal and its leading
k × k corner, k the number of leading singular values that add up to at most `alpha` of their sum (all, if alpha is 1).
Other tensors have P(τ) = τ. In the end δ = D_N (1/N) Σᵢ ‖τᵢ‖ / ‖D_N‖: as far from the base as an expert is on average.
The order of the tasks counts.

Source: Tang et al. 2025, "Merging models on the fly without retraining" (arXiv 2501.09522). Default: alpha 0.5. What
the paper does after every step, projecting and scaling, comes to this, since its scale of a step undoes the last one's.
Deviation: norms are those of one tensor; the paper's are of the whole model.
Deviation: directions of zero singular values are arbitrary; the diagonal ends before them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.linalg import rank_of_share, truncated_svd
from common.core.task_vectors import Params
from common.merging.tensorwise import each_tensor, require_fraction


def opcm(base: Params, deltas: Sequence[Params], *, alpha: float = 0.5) -> Params:
    """The OPCM delta of the tasks in their order."""
    require_fraction("opcm", "alpha", alpha)

    def merged(taus: Sequence[Tensor]) -> Tensor:
        delta, distances = taus[0].clone(), [torch.linalg.vector_norm(taus[0])]
        for tau in taus[1:]:
            delta += novel(tau, delta, alpha) if tau.ndim == 2 and delta.any() else tau
            distances.append(torch.linalg.vector_norm(tau))
            del tau
        distance = sum(distances) / len(taus)
        norm = torch.linalg.vector_norm(delta)
        return delta.mul_(distance / norm) if norm > 0 else delta

    return each_tensor(merged, base, deltas)


def novel(tau: Tensor, merged: Tensor, alpha: float) -> Tensor:
    """P(τ): τ (R, D) without what it shares with `merged` (R, D), which is not 0."""
    u, s, v = truncated_svd(merged, min(merged.shape))
    inner = u.mT @ tau @ v
    k = rank_of_share(s, alpha)
    shared = inner.diagonal().diag()
    shared[:k, :k] = inner[:k, :k]
    return tau - u @ shared @ v.mT
