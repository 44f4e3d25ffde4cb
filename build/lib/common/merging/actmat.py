"""ACTMat and TACT: WUDI's closed form with the task vectors' own covariance, not divided by their size.

    M = (Σᵢ τᵢCᵢ)(Σᵢ Cᵢ)⁺        Cᵢ = τᵢᵀτᵢ; for TACT of the fraction `density` of τᵢ that is largest in magnitude
for every matrix no side of which is longer than `longest`. Every other tensor is the mean, or what `others` says.

Source: "ACTMat" (arXiv 2604.01329) and its authors' code. Defaults: density 0.5, longest 20000 (embeddings of tokens
are averaged), scale 1, theirs.
As theirs, queries, keys and values of a fused matrix are taken apart, unless `split_qkv` is off.
Deviation: the code also averages the text projection.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from common.core.task_vectors import Params
from common.merging.tensorwise import each_matrix, require_fraction, weighted
from common.merging.wudi_exact import least_interference


def actmat(
    base: Params,
    deltas: Sequence[Params],
    *,
    longest: int = 20000,
    scale: float = 1.0,
    others: float | None = None,
    split_qkv: bool = True,
) -> Params:
    """The ACTMat delta; `scale` is a factor on every tensor, `others` the λ of Σᵢ τᵢ for the rest (None: 1/N)."""
    return each_matrix(partial(by_covariance, longest, others, 1.0), base, deltas, others, scale, split_qkv)


def tact(
    base: Params,
    deltas: Sequence[Params],
    *,
    density: float = 0.5,
    longest: int = 20000,
    scale: float = 1.0,
    others: float | None = None,
    split_qkv: bool = True,
) -> Params:
    """The TACT delta, see `actmat`."""
    require_fraction("tact", "density", density)
    return each_matrix(partial(by_covariance, longest, others, density), base, deltas, others, scale, split_qkv)


def by_covariance(longest: int, others: float | None, density: float, taus: Sequence[Tensor]) -> Tensor:
    """M (R, D) of task vectors (R, D), or their mean."""
    if max(taus[0].shape) > longest:
        return weighted(taus, others)
    return least_interference(taus, None, False, density)
