"""OPCM: merge one expert after the other, of each only what is orthogonal to what is merged already.

D₁ = τ₁ and D_t = D_{t−1} + P(τ_t). For a matrix D_{t−1} = U S Vᵀ, P leaves out of Uᵀ τ V its diagonal and its leading
k × k corner, k the number of leading singular values that add up to at most `alpha` of their sum (all, if alpha is 1).
Other tensors have P(τ) = τ. In the end δ = D_N (1/N) Σᵢ ‖τᵢ‖ / ‖D_N‖: as far from the base as an expert is on average.
The order of the tasks counts.

Source: Tang et al. 2025, "Merging models on the fly without retraining" (arXiv 2501.09522). Default: alpha 0.5. What
the paper does after every step, projecting and scaling, comes to this, since its scale of a step undoes the last one's.
`granularity`: norms of the whole model, as the paper has them, which takes the merge twice, first for the norm of D_N;
or norms of each tensor.
Deviation: directions of zero singular values are arbitrary; the diagonal ends before them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.core.linalg import rank_of_share, truncated_svd
from common.core.task_vectors import Params
from common.merging.magnitude import Granularity
from common.merging.tensorwise import Parts, Taus, each_tensor, require_fraction


def whole_factor(parts: Parts, *, alpha: float = 0.5, granularity: Granularity = "model", **_: Any) -> float | None:
    """(1/N) Σᵢ ‖τᵢ‖ / ‖D_N‖ of the whole model, where it is one for all tensors."""
    if granularity == "tensor":
        return None
    squares: list[float] = []
    for base, deltas in parts():
        squares = squares or [0.0] * (len(deltas) + 1)
        for name in base:
            for i, square in enumerate(squares_of(*continual_sum(Taus(deltas, name), alpha))):
                squares[i] += square
    *of_tasks, of_sum = [square**0.5 for square in squares] or [0.0, 0.0]
    return sum(of_tasks) / len(of_tasks) / of_sum if of_sum > 0 else 1.0


def opcm(
    base: Params,
    deltas: Sequence[Params],
    factor: float | None,
    *,
    alpha: float = 0.5,
    granularity: Granularity = "model",
) -> Params:
    """The OPCM delta of the tasks in their order."""
    require_fraction("opcm", "alpha", alpha)

    def merged(taus: Sequence[Tensor]) -> Tensor:
        delta, squares = continual_sum(taus, alpha)
        if factor is not None:
            return delta.mul_(factor)
        *of_tasks, of_sum = [square**0.5 for square in squares_of(delta, squares)]
        return delta.mul_(sum(of_tasks) / len(taus) / of_sum) if of_sum > 0 else delta

    return each_tensor(merged, base, deltas)


def continual_sum(taus: Sequence[Tensor], alpha: float) -> tuple[Tensor, list[float]]:
    """D_N of one tensor, and ‖τᵢ‖² of each task."""
    delta, squares = taus[0].clone(), []
    for i, tau in enumerate(taus):
        squares.append(float(torch.linalg.vector_norm(tau)) ** 2)
        if i:
            delta += novel(tau, delta, alpha) if tau.ndim == 2 and delta.any() else tau
        del tau
    return delta, squares


def squares_of(delta: Tensor, squares: Sequence[float]) -> list[float]:
    """‖τᵢ‖² of each task, then ‖D_N‖²."""
    return [*squares, float(torch.linalg.vector_norm(delta)) ** 2]


def novel(tau: Tensor, merged: Tensor, alpha: float) -> Tensor:
    """P(τ): τ (R, D) without what it shares with `merged` (R, D), which is not 0."""
    u, s, v = truncated_svd(merged, min(merged.shape))
    rotated = u.mT @ tau @ v
    k = rank_of_share(s, alpha)
    shared = rotated.diagonal().diag()
    shared[:k, :k] = rotated[:k, :k]
    return tau - u @ shared @ v.mT
