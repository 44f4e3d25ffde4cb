"""RegMean: the matrix whose outputs are nearest, in least squares, to those of every expert on its own inputs.

Xᵢ (rows are inputs) and Gᵢ = XᵢᵀXᵢ belong to expert i. Σᵢ ‖Xᵢ (W − Wᵢ)ᵀ‖²_F is least at W = (Σᵢ WᵢGᵢ)(Σᵢ Gᵢ)⁺, and for
Wᵢ = θ₀ + τᵢ the same holds of δ and the τᵢ. The paper first multiplies what is off the diagonal of each Gᵢ by α.

Source: Jin et al. 2023, "Dataless knowledge fusion by merging weights of language models" (arXiv 2212.09849).
Default: α = 0.9.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


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
    if not gram_DD.any():
        return torch.zeros_like(taus[0])
    values, vectors = torch.linalg.eigh(gram_DD)
    cutoff = values[-1] * (width * torch.finfo(values.dtype).eps if rtol is None else rtol)
    cut = int((values <= cutoff).sum())  # they ascend
    return (target @ vectors[:, cut:] / values[cut:] @ vectors[:, cut:].mT).to(taus[0].dtype)


def shrunk(gram_DD: Tensor, alpha: float = 0.9) -> Tensor:
    """A Gram matrix with α times what is off its diagonal."""
    return alpha * gram_DD + (1 - alpha) * gram_DD.diagonal().diag()
