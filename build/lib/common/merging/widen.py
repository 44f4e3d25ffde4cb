"""WIDEN: weigh every input column of every expert by how much its length and its direction moved.

For a matrix W (outputs, inputs), column d of expert i has moved in length by |‖wᵢ‖ − ‖w₀‖| and in direction by
1 − cos(wᵢ, w₀). Each is replaced by its rank within the expert, in [0, 1). The scores of column d are the softmax of
its ranks over the experts, but `calibration` where a rank exceeds `ratio` times the mean rank. δ = Σᵢ τᵢ · (score of
the length + score of the direction) / 2. Other tensors take |τᵢ| itself, weight by weight, for the rank.

Source: Yu et al. 2024, "Extend model merging from fine-tuned to pre-trained large language models via weight
disentanglement" (arXiv 2408.03092), with the authors' code. Defaults: ratio 1, calibration 1. Scores do not add up to
1: where every expert's column matters, δ is their sum.
Deviation: the code transposes token embeddings, so as to weigh tokens; here an embedding is a matrix like others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.task_vectors import Params, upcast
from common.merging.tensorwise import Taus, rounded_down, total


def widen(base: Params, deltas: Sequence[Params], *, ratio: float = 1.0, calibration: float = 1.0) -> Params:
    """The WIDEN delta."""

    def merged(theta: Tensor, taus: Sequence[Tensor]) -> Tensor:
        if theta.ndim == 2:
            moved = [column_ranks(theta, theta + tau) for tau in taus]
            lengths_ND, turns_ND = (torch.stack(ranks) for ranks in zip(*moved, strict=True))
            limit = rank_limit(theta.shape[1], ratio)
            scores = (importance(lengths_ND, limit, calibration) + importance(turns_ND, limit, calibration)) / 2
        else:
            sizes = torch.stack([tau.abs().flatten() for tau in taus])
            scores = importance(sizes, ratio * row_means(sizes), calibration).view(len(taus), *theta.shape)
        return total(score * tau for score, tau in zip(scores, taus, strict=True))

    return {name: merged(upcast(base[name]), Taus(deltas, name)) for name in base}


def column_ranks(theta_0: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The rank of each column by change of length and by change of direction, in [0, 1)."""
    (length_0, unit_0), (length, unit) = polar(theta_0), polar(theta)
    turn = unit.sub_(unit_0).square_().sum(0)  # 2 (1 − cos), but not lost in rounding where cos is almost 1
    return ranks((length - length_0).abs()), ranks(turn)


def polar(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths (D,) and unit columns (R, D) of a matrix; a column of zeros stays."""
    length = torch.linalg.vector_norm(theta, dim=0)
    return length, theta / length.clamp(min=torch.finfo(theta.dtype).tiny)


def ranks(x: Tensor) -> Tensor:
    """0 for the least value of x (n,), then 1/n, … (n − 1)/n; of equal values the first comes first."""
    return x.argsort(stable=True).argsort().to(x.dtype) / len(x)  # the second sorts whole numbers, no two alike


def rank_limit(n: int, ratio: float) -> float:
    """What a rank exceeds if it exceeds `ratio` times their mean, (n − 1)/2n: the middle between two ranks.

    The mean may itself be a rank, so a comparison with their computed mean would be left to rounding.
    """
    return (rounded_down(ratio * (n - 1) / 2) + 0.5) / n


def row_means(x: Tensor) -> Tensor:
    """The mean of each row of x (N, n), as (N, 1) in float64; exactly the common value where all are equal."""
    wide = x.double()
    return wide[:, :1] + (wide - wide[:, :1]).mean(1, keepdim=True)


def importance(significance: Tensor, limit: Tensor | float, calibration: float) -> Tensor:
    """Scores of (experts, n): the softmax of the significance over the experts, but `calibration` above the limit."""
    return significance.softmax(0).masked_fill(significance > limit, calibration)
