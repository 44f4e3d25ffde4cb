"""RegMean: the matrix whose outputs are nearest, in least squares, to those of every expert on its own inputs.

Xᵢ (rows are inputs) and Gᵢ = XᵢᵀXᵢ belong to expert i. Σᵢ ‖Xᵢ (W − Wᵢ)ᵀ‖²_F is least at W = (Σᵢ WᵢGᵢ)(Σᵢ Gᵢ)⁺, and for
Wᵢ = θ₀ + τᵢ the same holds of δ and the τᵢ. The paper first multiplies what is off the diagonal of each Gᵢ by α. All
linear maps of the Transformer are merged so, every other tensor (biases, norms, embeddings, convolutions) is averaged.

Source: Jin et al. 2023, "Dataless knowledge fusion by merging weights of language models" (arXiv 2212.09849).
Defaults: α = 0.9; 256 training inputs a task, as in FusionBench. As in the released codes Gᵢ is the mean over tokens,
the padding in a batch of texts among them, so that no task counts more because its inputs are longer.
Deviation: a projection that is kept as an input times a matrix, not its transpose (CLIP's last one), is averaged.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

from common.core.linalg import FLOAT32_GRAM_RTOL, normal_equations, solve_normal_equations
from common.core.linear_inputs import mean_grams
from common.core.task_vectors import Params, add
from common.merging.calibration import CalibrationTask
from common.merging.tensorwise import require_examples, require_fraction, weighted


def regmean(
    base: Params,
    deltas: Sequence[Params],
    calibration: Sequence[CalibrationTask],
    *,
    examples: int = 256,
    alpha: float = 0.9,
) -> Params:
    """The RegMean delta; `alpha` is the factor on what is off the diagonal of the Gram matrices."""
    require_examples("regmean", examples)
    require_fraction("regmean", "alpha", alpha)
    grams = (
        mean_grams(task.answer, add(base, delta), ((batch,) for batch in task.batches))
        for delta, task in zip(deltas, calibration, strict=True)
    )
    return regression_means(deltas, grams, alpha)


def regression_means(deltas: Sequence[Params], grams: Iterable[Params], alpha: float) -> dict[str, Tensor]:
    """For each tensor the least-squares mean of the τᵢ if there are Gram matrices of that name, else their mean.

    `grams` are those of one task after the other; they are consumed one by one.
    """
    sums = normal_equations(zip(deltas, grams, strict=True), alpha)
    rtol = FLOAT32_GRAM_RTOL if alpha == 1 else None  # with α < 1 the diagonal keeps every direction above rounding
    return {
        name: solve_normal_equations(*sums[name], rtol).to(tau.dtype)
        if name in sums
        else weighted([delta[name] for delta in deltas], None)
        for name, tau in deltas[0].items()
    }
