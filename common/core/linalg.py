"""Singular components, isometries and least squares: what merge methods and adaptation share."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from common.core.task_vectors import Params

ROWS = 1024  # of a matrix, in float64 at once


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


def normal_equations(tasks: Iterable[tuple[Params, Params]], alpha: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (Σ τᵢGᵢ, ΣGᵢ)} in float64 over the tasks, which are consumed one by one; the names are those of the Gᵢ."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for tau, grams in tasks:
        for name, gram_DD in grams.items():
            gram_DD = shrunk(gram_DD.double(), alpha)
            target = tau[name].double() @ gram_DD
            if name in sums:
                target, gram_DD = sums[name][0].add_(target), sums[name][1].add_(gram_DD)
            sums[name] = target, gram_DD
    return sums


def regression_mean(taus: Sequence[Tensor], grams_DD: Iterable[Tensor], rtol: float | None = None) -> Tensor:
    """δ (R, D) = (Σ τᵢGᵢ)(Σ Gᵢ)⁺ of τᵢ (R, D) and Gᵢ (D, D), in the type of the τᵢ.

    Sums and pseudo-inverse are taken in float64, since a Gram matrix squares the condition number. The Gᵢ are consumed
    one by one: a generator never holds two of them. Eigenvalues of ΣGᵢ up to `rtol` of the largest count as 0.
    """
    width = taus[0].shape[1]
    gram_DD = taus[0].new_zeros(width, width, dtype=torch.float64)
    target = torch.zeros_like(taus[0], dtype=torch.float64)
    grams = iter(grams_DD)  # no zip: it would keep one while the next is made
    for tau in taus:
        task_gram_DD = next(grams)
        gram_DD += task_gram_DD
        target += tau.double() @ task_gram_DD.double()
        del task_gram_DD
    return least_squares(target, gram_DD, rtol).to(taus[0].dtype)


def least_squares(target: Tensor, gram_DD: Tensor, rtol: float | None = None) -> Tensor:
    """target (R, D) times the pseudo-inverse of gram_DD, both float64."""
    if not gram_DD.any():
        return torch.zeros_like(target)
    values, vectors = torch.linalg.eigh(gram_DD)
    cutoff = values[-1] * (len(values) * torch.finfo(values.dtype).eps if rtol is None else rtol)
    cut = int((values <= cutoff).sum())  # they ascend
    return target @ vectors[:, cut:] / values[cut:] @ vectors[:, cut:].mT


def shrunk(gram_DD: Tensor, alpha: float = 0.9) -> Tensor:
    """A Gram matrix with α times what is off its diagonal."""
    scaled_DD = alpha * gram_DD
    scaled_DD.diagonal().add_(gram_DD.diagonal(), alpha=1 - alpha)
    return scaled_DD
