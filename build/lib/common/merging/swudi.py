"""SWUDI: WUDI's minimum along the directions that the task vectors share most, their sum along all others.

With ℓᵢ = ‖τᵢ‖²_F, T = Σ τᵢ, C = Σ τᵢᵀτᵢ/ℓᵢ = V Λ Vᵀ with λ falling and D = Σ τᵢτᵢᵀτᵢ/ℓᵢ, every matrix becomes
    M = T (I − V f Vᵀ) + D V (f/λ) Vᵀ        f = f(λ) in [0, 1], one factor for each eigenvector.
D C⁺ is the minimum of `wudi`; along eigenvectors of small λ it is noise over noise, and there M keeps T.
    swudi_a: f = 1 for the K leading eigenvectors, else 0, where K is an effective rank of C; no hyperparameter.
    swudi: f = 1 − exp(−λ t) for a share of the eigenvectors: gradient flow of half the objective for a time t, from T.

Source: SWUDI (arXiv 2606.07289) and its authors' code. Defaults: K = ⌈(Σ√λ)² / Σλ⌉; t 1300 and share 0.65 (theirs for
ViT-B/32); scale 1. Other K, by `rank`: entropy exp(−Σ p ln p) with p = λ/Σλ; participation (Σλ)² / Σλ²; gavish_donoho,
the √λ that exceed the optimal hard threshold for noise, advised for models that were fine-tuned in full.
A fused matrix of queries, keys and values has one C for all three, unless `split_qkv` is on; theirs are apart in most
models.
Deviation: what is no matrix is left at the base as in `wudi`, and so is all outside the blocks; theirs takes the mean.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import Params
from common.merging.tensorwise import each_matrix, require_fraction
from common.merging.wudi_exact import gram

FLOOR = 1e-8  # of λ, which rounding may make negative
Filter = Callable[[Tensor, float], Tensor]  # λ falling, rows over columns of the matrix -> f


def swudi_a(
    base: Params,
    deltas: Sequence[Params],
    *,
    rank: str = "energy",
    scale: float = 1.0,
    others: float | None = 0.0,
    split_qkv: bool = False,
) -> Params:
    """The delta with WUDI's minimum along the K leading directions; `rank` says how K is counted.

    `scale` is a factor on every tensor, `others` the λ of Σᵢ τᵢ for what is no matrix (None: 1/N).
    """
    if rank not in RANKS:
        raise InputError(f"swudi_a: rank is one of {', '.join(RANKS)}, not {rank!r}")

    def leading(eigenvalues: Tensor, shape: float) -> Tensor:
        return (torch.arange(len(eigenvalues)) < RANKS[rank](eigenvalues, shape)).to(eigenvalues)

    return each_matrix(lambda taus: filtered(taus, leading), base, deltas, others, scale, split_qkv)


def swudi(
    base: Params,
    deltas: Sequence[Params],
    *,
    time: float = 1300.0,
    share: float = 0.65,
    scale: float = 1.0,
    others: float | None = 0.0,
    split_qkv: bool = False,
) -> Params:
    """The delta after gradient flow for `time` along the leading `share` of the directions, see `swudi_a`."""
    require_fraction("swudi", "share", share)
    if time < 0:
        raise InputError(f"swudi: time must be at least 0, it is {time}")

    def flow(eigenvalues: Tensor, _: float) -> Tensor:
        place = torch.arange(len(eigenvalues), device=eigenvalues.device)
        return -torch.expm1(-time * eigenvalues) * (place < math.ceil(share * len(eigenvalues) - 1e-9))

    return each_matrix(lambda taus: filtered(taus, flow), base, deltas, others, scale, split_qkv)


def filtered(taus: Sequence[Tensor], keep: Filter) -> Tensor:
    """M (R, D) of task vectors (R, D), see the head of this file; in float64, one τᵢ in memory at a time."""
    total = target = covariance = torch.zeros(())
    dtype, shape = total.dtype, 1.0
    for tau in taus:
        gram_DD = gram(tau)
        wide = tau.double()
        total, target, covariance = total + wide, target + wide @ gram_DD, covariance + gram_DD
        dtype, shape = tau.dtype, tau.shape[0] / tau.shape[1]
        del tau, wide
    if not covariance.any():
        return total.to(dtype)
    eigenvalues, v = torch.linalg.eigh(covariance)
    eigenvalues, v = eigenvalues.flip(0).clamp(min=FLOOR), v.flip(1)
    f = keep(eigenvalues, shape)
    return (total + ((target @ v) * (f / eigenvalues) - (total @ v) * f) @ v.mT).to(dtype)


# ---- effective ranks: of λ falling, and rows over columns ------------------------------------------------------------


def energy(eigenvalues: Tensor, shape: float) -> int:
    return math.ceil(float(eigenvalues.sqrt().sum() ** 2 / eigenvalues.sum()) - 1e-9)


def entropy(eigenvalues: Tensor, shape: float) -> int:
    p = eigenvalues / eigenvalues.sum()
    return math.ceil(float(torch.special.entr(p).sum().exp()) - 1e-9)


def participation(eigenvalues: Tensor, shape: float) -> int:
    return math.ceil(float(eigenvalues.sum() ** 2 / eigenvalues.square().sum()) - 1e-9)


def gavish_donoho(eigenvalues: Tensor, shape: float) -> int:
    """Gavish and Donoho, The optimal hard threshold for singular values is 4/√3, 2014, for noise of unknown level."""
    ratio = min(shape, 1 / shape)
    threshold = 0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43
    values = eigenvalues.sqrt()
    return max(1, int((values > threshold * values.median()).sum()))


RANKS = {f.__name__: f for f in (energy, entropy, participation, gavish_donoho)}
