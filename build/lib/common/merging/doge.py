"""DOGE-TA: task arithmetic on task vectors that one common change Δ has brought nearer to agreement.

For every matrix, with λᵢ = η / ‖τᵢ‖_F and M(Δ) = Σᵢ λᵢ (τᵢ + Δ), Adam from Δ = 0 minimises
    Σⱼ Σ_rows ⟨τⱼ, τⱼ − M(Δ)⟩²       the inner product taken row by row
along gradients without their part in the shared subspace: that of the leading r/`subspace` left singular vectors of the
tasks' leading ⌊r/N⌋ left singular vectors, side by side (r the smaller side). Then δ = Σᵢ λᵢ mᵢ ⊙ (τᵢ + Δ), where mᵢ
keeps the fraction `density` of τᵢ that is largest in magnitude. Other tensors stay at the base, or what `others` says.

Source: Wei et al. 2025, "Modeling multi-task model merging as adaptive projective gradient descent" (arXiv 2501.01230),
as released with FusionBench. Defaults: eta 0.07, subspace 6, density 0.3, 400 steps, lr 1e-4. Like the code, it belongs
to the matrices of the blocks (`scope` in registry.py).
`granularity`: mᵢ trims the matrices of a task vector by one threshold (model), as the code does, or each by itself
(tensor), which spares two passes over the model.
A fused matrix of queries, keys and values is one matrix unless `split_qkv` is on; their models have them apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.linalg import truncated_svd
from common.core.task_vectors import Params
from common.merging.magnitude import Granularity, magnitude_thresholds, trim
from common.merging.tensorwise import Parts, each_matrix, require_fraction, total

Thresholds = Mapping[int, float] | None


def thresholds(parts: Parts, *, density: float = 0.3, granularity: Granularity = "model", **_: Any) -> Thresholds:
    """The magnitude by which each task vector is trimmed, where it is one for all matrices."""
    return magnitude_thresholds(parts, density, matrices=True) if granularity == "model" else None


def doge_ta(
    base: Params,
    deltas: Sequence[Params],
    trimmed: Thresholds,
    *,
    eta: float = 0.07,
    subspace: int = 6,
    density: float = 0.3,
    steps: int = 400,
    lr: float = 1e-4,
    others: float | None = 0.0,
    split_qkv: bool = False,
    granularity: Granularity = "model",
) -> Params:
    """The DOGE-TA delta; `others` is the λ of Σᵢ τᵢ for what is no matrix (None: 1/N)."""
    require_fraction("doge_ta", "density", density)
    if subspace < 1 or steps < 0 or lr <= 0:
        raise InputError(f"doge_ta: subspace ≥ 1, steps ≥ 0, lr > 0 are needed; they are {subspace}, {steps}, {lr}")

    def merged(taus: Sequence[Tensor]) -> Tensor:
        moving, floors = [], []
        for i, tau in enumerate(taus):
            if tau.any():
                moving.append(tau)
                floors.append((trimmed or {}).get(i))
        if not moving:
            return torch.zeros_like(taus[0])
        scales = [eta / float(torch.linalg.vector_norm(tau)) for tau in moving]
        change = reconciling_change(moving, scales, shared_basis(moving, subspace), steps, lr)
        kept = (
            scale * (tau + change) * (trim(tau, density, floor) != 0)
            for scale, tau, floor in zip(scales, moving, floors, strict=True)
        )
        return sum(kept, torch.zeros_like(change))

    return each_matrix(merged, base, deltas, others, split_qkv=split_qkv)


def shared_basis(taus: Sequence[Tensor], subspace: int) -> Tensor:
    """Orthonormal columns (R, at most r / `subspace`) that span the subspace shared by the τᵢ (R, D)."""
    side = min(taus[0].shape)
    lefts = [truncated_svd(tau, max(1, side // len(taus)))[0] for tau in taus]
    return truncated_svd(torch.cat(lefts, dim=1), side // subspace)[0]


def reconciling_change(taus: Sequence[Tensor], scales: Sequence[float], basis: Tensor, steps: int, lr: float) -> Tensor:
    """Δ (R, D) after `steps` of Adam, for λᵢ = `scales` and the orthonormal columns of the shared subspace."""
    change = torch.zeros_like(taus[0])
    every = total(scale * tau for scale, tau in zip(scales, taus, strict=True))
    gaps_R = [(tau * (tau - every)).sum(1) for tau in taus]
    adam = torch.optim.Adam([change], lr=lr)
    for _ in range(steps):
        gradient = torch.zeros_like(change)
        for tau, gap_R in zip(taus, gaps_R, strict=True):
            left_R = gap_R - sum(scales) * (tau * change).sum(1)
            gradient.addcmul_(left_R[:, None], tau, value=-2 * sum(scales))
        change.grad = gradient - basis @ (basis.mT @ gradient)
        adam.step()
    return change
