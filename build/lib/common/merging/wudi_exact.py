"""WUDI in closed form: the minimum that Adam's 300 steps of `wudi` only approach.

The objective Σᵢ ‖(M − τᵢ) τᵢᵀ‖²_F / ‖τᵢ‖²_F is quadratic in M. With Gᵢ = τᵢᵀτᵢ / ‖τᵢ‖²_F its gradient is
2 (M ΣGᵢ − Σ τᵢGᵢ), so M = (Σᵢ τᵢGᵢ)(Σᵢ Gᵢ)⁺ is a minimiser: RegMean with τᵢ in place of the layer's inputs. Of all
minimisers it is the smallest, and the one nearest to Σᵢ τᵢ, where Adam starts: no τᵢ reaches what ΣGᵢ does not see.
Gᵢ = τᵢᵀτᵢ without the division (`normalize` false), and of the fraction `density` of the weights that is largest in
magnitude (τᵢ itself whole), make ACTMat and TACT of it, see actmat.py.

Source: ours, from the objective of Cheng et al. 2025 (WUDI-Merging, arXiv 2503.08099). Defaults: scale 1; rtol None;
density 1. Where ΣGᵢ is small M is decided by little of the task vectors. Adam hardly moves there in its 300 steps;
`rtol` cuts such directions off, at 0, where their share of ΣGᵢ is below rtol of the largest one's.
A fused matrix of queries, keys and values is one matrix, as in `wudi`, unless `split_qkv` is on.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from common.core.errors import InputError
from common.core.linalg import regression_mean
from common.core.task_vectors import Params
from common.merging.magnitude import trim
from common.merging.tensorwise import each_matrix, require_fraction


def wudi_exact(
    base: Params,
    deltas: Sequence[Params],
    *,
    rtol: float | None = None,
    normalize: bool = True,
    density: float = 1.0,
    scale: float = 1.0,
    others: float | None = 0.0,
    split_qkv: bool = False,
) -> Params:
    """The minimiser of the WUDI objective. `rtol` None cuts off nothing but rounding.

    `scale` is a factor on every tensor, `others` the λ of Σᵢ τᵢ for what is no matrix (None: 1/N).
    """
    if rtol is not None and not 0 <= rtol < 1:
        raise InputError(f"wudi_exact: rtol must lie in [0, 1), it is {rtol}")
    require_fraction("wudi_exact", "density", density)
    rule = partial(least_interference, rtol=rtol, normalize=normalize, density=density)
    return each_matrix(rule, base, deltas, others, scale, split_qkv)


def least_interference(taus: Sequence[Tensor], rtol: float | None, normalize: bool, density: float) -> Tensor:
    """(Σ τᵢGᵢ)(Σ Gᵢ)⁺ (R, D) of task vectors (R, D)."""
    grams = (gram(tau if density == 1 else trim(tau, density), normalize) for tau in taus)
    return regression_mean(taus, grams, rtol)


def gram(tau: Tensor, normalize: bool = True) -> Tensor:
    """Gᵢ (D, D) in float64; zeros for a τᵢ of zeros."""
    wide = tau.double()
    energy = wide.square().sum() if normalize else 1.0
    return (wide.mT @ wide).div_(energy if energy > 0 else 1.0)
