"""Truncated singular value decompositions, isometries and least squares: what merge methods and adaptation share.

Whether a singular value or an eigenvalue counts as zero is never left to the last bit: what is zero but for rounding
lies far below each threshold here, so that no rank depends on the machine.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from common.core.task_vectors import Params

ROWS = 1024  # of a matrix that are converted to float64 at once
FLOAT32_GRAM_RTOL = 1e-6  # eigenvalues of a Gram matrix summed in float32 are rounding below this part of the largest
SHARE_RTOL = 1e-6  # relative error of a sum of float32 singular values, generously


def truncated_svd(x: Tensor, rank: int, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """U (rows, k), S (k,), V (columns, k) of the k ≤ `rank` largest singular values of x that are not zero, falling.

    floor: what singular values must exceed, see `rounding_floor`.
    """
    if x.shape[0] < x.shape[1]:
        v, s, u = truncated_svd(x.mT, rank, floor)
        return u, s, v
    s, v = right_singular_vectors(x)
    k = min(rank, int((s > floor).sum()))
    s, v = s[:k], v[:, :k]
    return x @ (v / s).to(x.dtype), s.to(x.dtype), v.to(x.dtype)


def rounding_floor(x: Tensor) -> float:
    """What the singular values of the rounding errors stay below when a projection is taken from a matrix x (R, D)."""
    longest = float(torch.linalg.vector_norm(x, dim=0).max())
    return max(x.shape) * torch.finfo(x.dtype).eps * longest


def nearest_isometry(x: Tensor) -> Tensor:
    """P Qᵀ of x = P Σ Qᵀ over its nonzero singular values: orthonormal columns where those of x are independent."""
    if x.shape[0] < x.shape[1]:
        return nearest_isometry(x.mT).mT
    s, v = right_singular_vectors(x)
    return x @ (v / s @ v.mT).to(x.dtype)


def rounding_share(x: Tensor) -> float:
    """The part of its largest singular value that those which are zero but for the rounding of a matrix x stay below.

    4 √n eps of x's type, n its longer side; n eps where that is less. Rounding each number of a matrix of rank r once
    moves its singular values by √r eps / 2 of the largest at most. Measured on float32 matrices of exact low rank
    (products of factors of rank 1 to n/2, sums of two, θ + BA − θ, columns twice; sides of 64 to 6144), the largest
    that should be zero was at most 1.2 eps of the largest of all, and 0.15 √n eps: a 26th of this.
    """
    longest = max(x.shape)
    return min(longest, 4 * longest**0.5) * torch.finfo(x.dtype).eps


def right_singular_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nonzero singular values (k,) of x (R, D), falling, and their right vectors (D, k), both in float64.

    From xᵀx, which is exact enough in float64 and takes less time and memory than the SVD of x. LAPACK's SVD also fails
    to converge on columns that are orthonormal but for a few, where many singular values are nearly equal.
    """
    gram = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for rows in x.split(ROWS):
        wide = rows.double()
        gram.addmm_(wide.mT, wide)
    squares, v = torch.linalg.eigh(gram)
    of_gram = max(x.shape) * torch.finfo(torch.float64).eps
    keep = squares > squares[-1] * max(rounding_share(x) ** 2, of_gram)  # what exceeds the rounding of the largest one
    return squares[keep].sqrt().flip(0), v[:, keep].flip(1)


def rank_of_share(s: Tensor, share: float) -> int:
    """How many of the falling singular values s (k,) add up to at most this share of their sum; a share of 1 is all.

    A partial sum that equals the share but for rounding is within it.
    """
    sums = s.double().cpu().cumsum(0)  # on the CPU, since CUDA has no deterministic kernel
    return int((sums <= (share + SHARE_RTOL) * sums[-1]).sum())


def rank_to_reach(s: Tensor, share: float) -> int:
    """The least number of the falling values s (k,) that add up to this share of their sum or more.

    A partial sum that misses the share by rounding reaches it.
    """
    values = s.double().cpu()  # on the CPU, since CUDA has no deterministic kernel
    before = values.cumsum(0) - values
    return int((before < (share - SHARE_RTOL) * values.sum()).sum())


def normal_equations(tasks: Iterable[tuple[Params, Params]], alpha: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """The two sides of the least-squares problem min Σᵢ tr (δ − τᵢ) Gᵢ (δ − τᵢ)ᵀ, for every tensor with Gram matrices.

    Args:
        tasks: the τᵢ and the Gᵢ (D, D) of each task, by name; tasks are consumed one by one.
        alpha: the factor on what is off the diagonal of each Gᵢ.

    Returns: {name: (Σ τᵢGᵢ (R, D), Σ Gᵢ (D, D))} in float64, for the names of the Gᵢ.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for tau, grams in tasks:
        for name, gram_DD in grams.items():
            sums[name] = add_task(sums.get(name), tau[name], scale_off_diagonal(gram_DD.double(), alpha))
    return sums


def regression_mean(taus: Sequence[Tensor], grams_DD: Iterable[Tensor], rtol: float | None = None) -> Tensor:
    """δ (R, D) = (Σ τᵢGᵢ)(Σ Gᵢ)⁺ of τᵢ (R, D) and Gᵢ (D, D), in the type of the τᵢ.

    Sums and pseudo-inverse are taken in float64, since a Gram matrix squares the condition number. The Gᵢ are consumed
    one by one: a generator never holds two of them. Eigenvalues of ΣGᵢ up to `rtol` of the largest count as zero.
    """
    width = taus[0].shape[1]
    zeros = torch.zeros_like(taus[0], dtype=torch.float64), taus[0].new_zeros(width, width, dtype=torch.float64)
    sums, grams = zeros, iter(grams_DD)  # no zip: it would keep one while the next is made
    for tau in taus:
        sums = add_task(sums, tau, next(grams))
        del tau
    return solve_normal_equations(*sums, rtol).to(taus[0].dtype)


def add_task(sums: tuple[Tensor, Tensor] | None, tau: Tensor, gram_DD: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ τᵢGᵢ, Σ Gᵢ) in float64 with one more task, in place; of the first task its Gram matrix itself."""
    target = tau.double() @ gram_DD.double()
    return (target, gram_DD) if sums is None else (sums[0].add_(target), sums[1].add_(gram_DD))


def solve_normal_equations(target: Tensor, gram_DD: Tensor, rtol: float | None = None, ridge: float = 0.0) -> Tensor:
    """target (R, D) times the pseudo-inverse of gram_DD, both float64.

    rtol: eigenvalues up to this part of the largest count as zero; None stands for the rounding of float64.
    ridge: what is added to the others, in parts of the mean eigenvalue, tr gram_DD / D.
    """
    if not gram_DD.any():
        return torch.zeros_like(target)
    values, vectors = torch.linalg.eigh(gram_DD)
    cutoff = values[-1] * (len(values) * torch.finfo(values.dtype).eps if rtol is None else rtol)
    cut = int((values <= cutoff).sum())  # they ascend
    return target @ vectors[:, cut:] / (values[cut:] + ridge * values.mean()) @ vectors[:, cut:].mT


def scale_off_diagonal(gram_DD: Tensor, alpha: float) -> Tensor:
    """A new matrix with α times what is off the diagonal of gram_DD."""
    scaled_DD = alpha * gram_DD
    scaled_DD.diagonal().add_(gram_DD.diagonal(), alpha=1 - alpha)
    return scaled_DD
