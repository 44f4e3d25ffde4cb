"""WUDI in closed form: the minimum that Adam's 300 steps of `wudi` only approach.

The objective Σᵢ ‖(M − τᵢ) τᵢᵀ‖²_F / ‖τᵢ‖²_F is quadratic in M. With Gᵢ = τᵢᵀτᵢ / ‖τᵢ‖²_F its gradient is
2 (M ΣGᵢ − Σ τᵢGᵢ), so M = (Σᵢ τᵢGᵢ)(Σᵢ Gᵢ)⁺ is a minimiser: RegMean with τᵢ in place of the layer's inputs. Of all
minimisers it is the smallest, and the one nearest to Σᵢ τᵢ, where Adam starts: no τᵢ reaches what ΣGᵢ does not see.

Source: ours, from the objective of Cheng et al. 2025 (WUDI-Merging, arXiv 2503.08099). Defaults: scale 1; rtol None.
Where ΣGᵢ is small M is decided by little of the task vectors. Adam hardly moves there in its 300 steps; `rtol` cuts
such directions off, at 0, where their share of ΣGᵢ is below rtol of the largest one's.
"""

from collections.abc import Sequence

from torch import Tensor

from common.core.errors import InputError
from common.core.linalg import regression_mean
from common.core.task_vectors import Params
from common.merging.tensorwise import each_matrix


def wudi_exact(
    base: Params,
    deltas: Sequence[Params],
    *,
    rtol: float | None = None,
    scale: float = 1.0,
    others: float | None = 0.0,
) -> Params:
    """The minimiser of the WUDI objective. `rtol` None cuts off nothing but rounding.

    `scale` is a factor on every tensor, `others` the λ of Σᵢ τᵢ for what is no matrix (None: 1/N).
    """
    if rtol is not None and not 0 <= rtol < 1:
        raise InputError(f"wudi_exact: rtol must lie in [0, 1), it is {rtol}")

    def merged(taus: Sequence[Tensor]) -> Tensor:
        return regression_mean(taus, map(gram, taus), rtol)

    return each_matrix(merged, base, deltas, others, scale)


def gram(tau: Tensor) -> Tensor:
    """Gᵢ (D, D) in float64; zeros for a τᵢ of zeros."""
    wide = tau.double()
    energy = wide.square().sum()
    return (wide.mT @ wide).div_(energy if energy > 0 else 1.0)
