"""DC-Merge: TIES among the tasks' largest entries in one common basis of singular directions.

Of a matrix each τᵢ is cut to its k = ⌊r/N⌋ leading components τ̂ᵢ (r the smaller side, N tasks). Side by side their
left vectors form U, their right ones V; with X̂ the matrix of orthonormal columns nearest to X, Mᵢ = Ûᵀ τ̂ᵢ V̂ keeps
the `keep` part of r² entries that is largest in magnitude, at least one. Entry by entry M is the mean of the Mᵢ that
have the sign of their sum, within the N diagonal blocks of side k, 0 elsewhere. δ = Û M V̂ᵀ.
Every other tensor is the mean, or what `others` says.

Source: "DC-Merge" (arXiv 2603.06242, CVPR 2026) and its authors' code. Defaults: keep 1e-3, theirs; scale 1, where they
choose one of 31 by validation. For LoRA experts they take `rank` 16 and first smooth the kept singular values of a
task: `smooth` mean takes their mean for each, ramp a straight line from first to last, of ratio min(5, s₁/s_k), of
equal sum.
Deviation: a matrix with fewer rows or columns than tasks would have k = 0; it is averaged like the vectors. Entries
that are equal but for rounding are kept together. Singular vectors of zero singular values take no part. The code
averages the text projection. A fused matrix of queries, keys and values is one matrix, as theirs is, unless `split_qkv`
is on.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.linalg import nearest_isometry, truncated_svd
from common.core.task_vectors import Params
from common.merging.magnitude import largest
from common.merging.tensorwise import each_matrix, require_fraction, rounded_down, weighted

EQUAL = 1e-6  # relative difference of entries that are equal but for rounding
STEEPEST = 5.0  # ratio of the first to the last smoothed singular value


def dc_merge(
    base: Params,
    deltas: Sequence[Params],
    *,
    keep: float = 1e-3,
    rank: int | None = None,
    smooth: Literal["no", "mean", "ramp"] = "no",
    scale: float = 1.0,
    others: float | None = None,
    split_qkv: bool = False,
) -> Params:
    """The DC-Merge delta; `rank` is k (None: ⌊r/N⌋), `scale` a factor on every tensor, `others` the λ of Σᵢ τᵢ for what
    is no matrix (None: 1/N)."""
    require_fraction("dc_merge", "keep", keep)
    if rank is not None and rank < 1:
        raise InputError(f"dc_merge: rank must be at least 1, it is {rank}")

    def merged(taus: Sequence[Tensor]) -> Tensor:
        side = min(taus[0].shape)
        if side < len(taus):
            return weighted(taus, others)
        parts = [truncated_svd(tau, min(rank or side, side // len(taus))) for tau in taus if tau.any()]
        if not parts:
            return torch.zeros_like(taus[0])
        return elected(parts, max(1, rounded_down(keep * side**2)), smooth)

    return each_matrix(merged, base, deltas, others, scale, split_qkv)


def elected(parts: Sequence[tuple[Tensor, Tensor, Tensor]], count: int, smooth: str) -> Tensor:
    """Û M V̂ᵀ of the U, S, V of each task; `count` entries of each Mᵢ are kept."""
    u_hat = nearest_isometry(torch.cat([u for u, _, _ in parts], dim=1))
    v_hat = nearest_isometry(torch.cat([v for _, _, v in parts], dim=1))
    kept = []
    for u, s, v in parts:
        m = (u_hat.mT @ u * smoothed(s, smooth)) @ (v.mT @ v_hat)
        threshold = largest(m.abs(), min(count, m.numel()))
        kept.append(m.where(m.abs() >= (1 - EQUAL) * threshold, 0))
    every = torch.stack(kept).sum(0)
    agree = [m.where(m * every > 0, 0) for m in kept]
    mean = torch.stack(agree).sum(0) / torch.stack([m != 0 for m in agree]).sum(0).clamp_(min=1)
    blocks = torch.block_diag(*(torch.ones(len(s), len(s), dtype=s.dtype, device=s.device) for _, s, _ in parts))
    return u_hat @ (mean * blocks) @ v_hat.mT


def smoothed(s: Tensor, how: str) -> Tensor:
    """Falling singular values (k,) made more even, of the same sum."""
    if how == "no":
        return s
    ratio = 1.0 if how == "mean" else min(STEEPEST, float(s[0] / s[-1]))
    line = torch.linspace(ratio, 1.0, len(s), dtype=s.dtype, device=s.device)
    return line * (s.sum() / line.sum())
