"""ACE: least squares on the covariance of the task vectors' rows about their mean, evened where tasks differ in size.

Of a matrix, with τ̃ᵢ = τᵢ minus its mean row, Σᵢ = τ̃ᵢᵀτ̃ᵢ, ℓᵢ = ‖τᵢ‖² and γ = Var(log ℓᵢ) / mean(log ℓᵢ)²:
    uneven if γ > `uneven`: Σᵢ is divided by its trace, and εᵢ = ε / trace; else εᵢ = ε
    W₀ = (Σᵢ τ̃ᵢ(Σᵢ + εᵢI)) (Σᵢ (Σᵢ + εᵢI) + 1 cᵀ)⁻¹        c the mean row of Σᵢ Σᵢ, uneven: divided by the mean of ℓᵢ
    δ = W₀, and if uneven δ = W₀ + s̄ U_k V_kᵀ with U S Vᵀ = W₀ + Σᵢ τᵢ(Σᵢ − mean of the Σⱼ + εⱼI), s̄ the mean of its k
        leading singular values, k = ⌊`share` r⌋ of the smaller side r, at least 1
Every other tensor is the mean, or what `others` says. The mean row itself is lost, as in the authors' code.

Source: "ACE-Merging" (arXiv 2603.02945) and its authors' code. Defaults: ε 1e-2, uneven 0.3, share 0.3, theirs; for
RoBERTa they take uneven 0.5 and ε 1e-5 or 2e-4.
Deviation: the code averages the text projection. Singular vectors of zero singular values are arbitrary: s̄ and U_k
V_kᵀ are without them. A fused matrix of queries, keys and values is one matrix, as theirs is, unless `split_qkv` is on.
Deviation: a task that left the matrix as it was takes no part: τᵢ = 0 has no direction to weigh, and its ε / trace is
infinite (ε / 1e-12 in the code, which multiplies the others). Of the uneven ones neither does one with all rows alike.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.linalg import truncated_svd
from common.core.task_vectors import Params
from common.merging.tensorwise import by_pieces, each_matrix, inner_by_pieces, require_fraction, rounded_down

TINY = 1e-12  # the code's, in logarithms and traces
SLACK = 1e-9  # of γ, which is rounding where all tasks are of one size
ALIKE = 1e-24  # of ℓᵢ: what rounding in float64 leaves of rows about their mean; one last bit of float32 leaves more


def ace(
    base: Params,
    deltas: Sequence[Params],
    *,
    epsilon: float = 1e-2,
    uneven: float = 0.3,
    share: float = 0.3,
    scale: float = 1.0,
    others: float | None = None,
    split_qkv: bool = False,
) -> Params:
    """The ACE delta; `scale` is a factor on every tensor, `others` the λ of Σᵢ τᵢ for what is no matrix (None: 1/N)."""
    require_fraction("ace", "share", share)
    if epsilon <= 0 or uneven < 0:
        raise InputError(f"ace: epsilon above 0 and uneven of at least 0 are needed, they are {epsilon} and {uneven}")

    def merged(taus: Sequence[Tensor]) -> Tensor:
        sizes = [inner_by_pieces(tau, tau) for tau in taus]
        evened = variation([size for size in sizes if size]) > uneven + SLACK
        delta, residual = regularised(taus, sizes, epsilon, evened)
        if evened and (residual := residual.add_(delta)).any():
            k = max(1, rounded_down(share * min(delta.shape)))
            u, s, v = truncated_svd(residual, k)
            delta.addmm_(u, v.mT, alpha=float(s.mean()))
        return delta.to(taus[0].dtype)

    return each_matrix(merged, base, deltas, others, scale, split_qkv)


def variation(sizes: Sequence[float]) -> float:
    """γ, the sample variance of the logarithms over their squared mean; 0 of one task or none."""
    logs = [math.log(size + TINY) for size in sizes]
    mean = sum(logs) / max(1, len(logs))
    return sum((x - mean) ** 2 for x in logs) / max(1, len(logs) - 1) / (mean**2 + TINY)


def regularised(taus: Sequence[Tensor], sizes: Sequence[float], epsilon: float, evened: bool) -> tuple[Tensor, Tensor]:
    """W₀ and, if evened, Σᵢ τᵢ(Σᵢ − mean of the Σⱼ + εⱼI), (R, D) in float64, one τᵢ in memory at a time.

    sizes: the ℓᵢ. Sums and means are over the tasks that take part; if there is none, both are zero.
    """
    taking_part: list[float] = []  # their ℓᵢ
    target = torch.zeros_like(taus[0], dtype=torch.float64)
    residual, every = (torch.zeros_like(target) if evened else target[:0] for _ in range(2))  # else they are not needed
    covariance, ridge = target.new_zeros(target.shape[1], target.shape[1]), 0.0
    for i in (i for i, size in enumerate(sizes) if size):
        tau = taus[i]
        row = tau.mean(0, dtype=torch.float64)
        sigma_DD = torch.zeros_like(covariance)
        for (rows,) in by_pieces(tau):
            centred = rows.double() - row
            sigma_DD.addmm_(centred.mT, centred)
        spread = float(sigma_DD.trace())
        if evened and spread <= ALIKE * sizes[i]:
            del tau, sigma_DD
            continue
        trace = spread + TINY if evened else 1.0
        taking_part.append(sizes[i])
        sigma_DD /= trace
        covariance += sigma_DD
        ridge += epsilon / trace
        for rows, of_target in by_pieces(tau, target):
            centred = rows.double() - row
            of_target.addmm_(centred, sigma_DD).add_(centred, alpha=epsilon / trace)
        if evened:
            every += tau
            for rows, of_residual in by_pieces(tau, residual):
                of_residual.addmm_(rows.double(), sigma_DD)
        del tau, sigma_DD
    if not taking_part:
        return target, residual
    row = covariance.mean(0) / (sum(taking_part) / len(taking_part) + TINY if evened else 1.0)
    covariance.diagonal().add_(ridge)
    for of_residual, of_every in by_pieces(residual, every):
        of_residual.addmm_(of_every, covariance, alpha=-1 / len(taking_part))
    factors = torch.linalg.lu_factor((covariance + row).mT)
    for (of_target,) in by_pieces(target):  # a copy of each piece alone is made by LAPACK
        of_target.copy_(torch.linalg.lu_solve(*factors, of_target.mT).mT)
    return target, residual
