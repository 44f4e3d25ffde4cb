"""Isotropic merging: the sum of the task vectors with all its singular values made equal.

Iso-C: for every matrix Σᵢ τᵢ = U S Vᵀ, and δ = α s̄ U Vᵀ with s̄ the mean of S: no direction drowns the others.
Iso-CTS: of U and V the k leading directions are kept as common ones. What is left of each task, τᵢ − U_k U_kᵀ τᵢ, gives
its (r − k)/N leading components (r the smaller side, N tasks). Side by side with the common ones they form U, S, V, and
δ = α s̄ Û V̂ᵀ, with X̂ the matrix of orthonormal columns nearest to X.
Every other tensor is the mean of the τᵢ, or what `others` says.

Source: Marczak et al. 2025, "No task left behind" (arXiv 2502.04959). Defaults: common_fraction 0.8, the released one;
α 1, where the paper searches by validation.
Deviation: singular vectors of zero singular values are arbitrary and take no part, and s̄ is the mean over the others.
Zero is also what rounding leaves of a task that the common directions hold.
The singular values of δ add up to α times those of U S Vᵀ either way.
A fused matrix of queries, keys and values is one matrix, as theirs is, unless `split_qkv` is on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.linalg import nearest_isometry, rounding_floor, truncated_svd
from common.core.task_vectors import Params
from common.merging.tensorwise import each_matrix, rounded_down, total


def iso_c(
    base: Params,
    deltas: Sequence[Params],
    *,
    scale: float = 1.0,
    others: float | None = None,
    split_qkv: bool = False,
) -> Params:
    """The Iso-C delta; `scale` is α, on every tensor, `others` the λ of Σᵢ τᵢ for what is no matrix (None: 1/N)."""

    def merged(taus: Sequence[Tensor]) -> Tensor:
        every = total(taus)
        if not every.any():
            return every
        u, s, v = truncated_svd(every, min(every.shape))
        return s.mean() * u @ v.mT

    return each_matrix(merged, base, deltas, others, scale, split_qkv)


def iso_cts(
    base: Params,
    deltas: Sequence[Params],
    *,
    common_fraction: float = 0.8,
    scale: float = 1.0,
    others: float | None = None,
    split_qkv: bool = False,
) -> Params:
    """The Iso-CTS delta; k is about `common_fraction` of r, such that N divides the rest.

    `scale` is α, on every tensor, `others` the λ of Σᵢ τᵢ for what is no matrix (None: 1/N).
    """
    if not 0 <= common_fraction <= 1:
        raise InputError(f"iso_cts: common_fraction must lie in [0, 1], it is {common_fraction}")

    def merged(taus: Sequence[Tensor]) -> Tensor:
        every, side = total(taus), min(taus[0].shape)
        own = min(round((side - rounded_down(side * common_fraction)) / len(taus)), side // len(taus))
        parts = [truncated_svd(every, side - own * len(taus))] if every.any() else []
        common = parts[0][0] if parts else every[:, :0].clone()
        del every
        for tau in taus if own else ():
            left, floor = tau - common @ (common.mT @ tau), rounding_floor(tau)
            del tau
            if left.any():
                parts.append(truncated_svd(left, own, floor))
            del left
        if not parts:
            return torch.zeros_like(taus[0])
        u, s, v = (torch.cat(columns, dim=-1) for columns in zip(*parts, strict=True))
        del parts, common
        return s.mean() * nearest_isometry(u) @ nearest_isometry(v).mT

    return each_matrix(merged, base, deltas, others, scale, split_qkv)
