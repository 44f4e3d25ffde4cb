"""CART: the mean of the experts, and the leading singular directions of each expert's difference to it.

With τ̄ the mean of the τᵢ, every matrix becomes δ = τ̄ + λ Σᵢ (the k leading components of τᵢ − τ̄), k the part
`rank_fraction` of the smaller side, at least 1. Every other tensor is the mean, or what `others` says.

Source: Choi et al. 2024, "Revisiting weight averaging for model merging" (arXiv 2412.12153), as in AdaRank's code
(arXiv 2503.22178). Defaults: rank_fraction 0.16 and λ 2.3, where AdaRank starts for eight tasks and ViT-B/32.
Deviation: that code cuts the matrices of attention and MLP alone; here every matrix is cut, embeddings too. A fused
matrix of queries, keys and values is one matrix, as there, unless `split_qkv` is on.
"""

from collections.abc import Sequence

from torch import Tensor

from common.core.linalg import truncated_svd
from common.core.task_vectors import Params
from common.merging.tensorwise import each_matrix, require_fraction, rounded_down, weighted


def cart(
    base: Params,
    deltas: Sequence[Params],
    *,
    rank_fraction: float = 0.16,
    scale: float = 2.3,
    others: float | None = None,
    split_qkv: bool = False,
) -> Params:
    """The CART delta; `scale` is λ, on matrices alone, `others` the λ of Σᵢ τᵢ for what is no matrix (None: 1/N)."""
    require_fraction("cart", "rank_fraction", rank_fraction)

    def merged(taus: Sequence[Tensor]) -> Tensor:
        mean = weighted(taus, None)
        delta, k = mean.clone(), max(1, rounded_down(rank_fraction * min(mean.shape)))
        for tau in taus:
            residual = tau - mean
            del tau
            if residual.any():
                u, s, v = truncated_svd(residual, k)
                delta += scale * (u * s) @ v.mT
                del u, s, v
            del residual
        return delta

    return each_matrix(merged, base, deltas, others, split_qkv=split_qkv)
