"""STAR: of each task vector keep the leading singular directions, rescaled to the full sum of singular values; average.

Every matrix τᵢ = U S Vᵀ is cut to the least number of leading components that hold the share `share` of ΣS, and these
are multiplied by ΣS over their sum. δ is the mean of the results; every other tensor is the mean, or what `others`
says.

Source: Lee et al. 2025, "STAR: spectral truncation and rescale for model merging" (NAACL 2025, arXiv 2502.10339), in
the form of the code beside SVC (arXiv 2602.05536). Defaults: share 0.4, theirs; scale 1.
A fused matrix of queries, keys and values is one matrix, as there, unless `split_qkv` is on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.linalg import rank_to_reach, truncated_svd
from common.core.task_vectors import Params
from common.merging.tensorwise import each_matrix, require_fraction


def star(
    base: Params,
    deltas: Sequence[Params],
    *,
    share: float = 0.4,
    scale: float = 1.0,
    others: float | None = None,
    split_qkv: bool = False,
) -> Params:
    """The STAR delta; `scale` is a factor on every tensor, `others` λ of Σᵢ τᵢ for what is no matrix (None: 1/N)."""
    require_fraction("star", "share", share)

    def merged(taus: Sequence[Tensor]) -> Tensor:
        delta = torch.zeros_like(taus[0])
        for tau in taus:
            if tau.any():
                u, s, v = truncated_svd(tau, min(tau.shape))
                k = rank_to_reach(s, share)
                delta += (u[:, :k] * (s[:k] * (s.sum() / s[:k].sum()))) @ v[:, :k].mT
                del u, s, v
            del tau
        return delta.div_(len(taus))

    return each_matrix(merged, base, deltas, others, scale, split_qkv)
