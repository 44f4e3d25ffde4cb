"""Fisher merging: the mean of the experts in which every weight counts by its Fisher information.

δ = Σᵢ Fᵢ ⊙ τᵢ / Σᵢ Fᵢ weight by weight, Fᵢ the diagonal of expert i's Fisher matrix: the mean over inputs of the
squared gradient of the log-probability of labels drawn from the model. θ₀ + δ is the same mean of the θ₀ + τᵢ.

Source: Matena and Raffel 2022, "Merging models with Fisher-weighted averaging" (arXiv 2111.09832).
Default: 1e-6 as the least that a weight counts, so that weights no task sees are averaged.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def fisher_mean(taus: Sequence[Tensor], fishers: Sequence[Tensor], floor: float = 1e-6) -> Tensor:
    """δ of τᵢ and the diagonals Fᵢ ≥ 0, all of one shape."""
    delta, weights = torch.zeros_like(taus[0]), torch.zeros_like(taus[0])
    for tau, fisher in zip(taus, fishers, strict=True):
        weight = fisher.clamp(min=floor)
        delta += weight * tau
        weights += weight
    return delta.div_(weights)
