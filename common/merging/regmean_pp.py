"""RegMean++: RegMean block by block, on the inputs that the merged blocks before bring to each.

What is before the blocks is averaged. Then for each block in turn, with xᵢ what reaches it in the model merged so far
on the inputs of task i: Gᵢ of a linear map are those of its inputs in expert i's block at xᵢ, the block is merged as in
RegMean, and what it answers to each xᵢ goes on to the next.

Source: Nguyen et al. 2025, "RegMean++: Enhancing effectiveness and generalization of regression mean for model merging"
(arXiv 2508.03121), as released with FusionBench. Defaults: α = 0.95 and 256 training inputs a task, the code's.
Deviation: what is behind the blocks (CLIP's last norm and projection) is averaged; the code leaves it at the base.
"""

from collections.abc import Sequence

from common.core.linear_inputs import mean_grams
from common.core.task_vectors import Params, add
from common.merging.calibration import CalibrationTask, block_params, first_block_inputs, next_block_inputs
from common.merging.regmean import regression_means
from common.merging.tensorwise import each_tensor, require_examples, require_fraction, weighted
from common.run.progress import counted


def regmean_pp(
    base: Params,
    deltas: Sequence[Params],
    calibration: Sequence[CalibrationTask],
    *,
    examples: int = 256,
    alpha: float = 0.95,
) -> Params:
    """The RegMean++ delta; `alpha` is the factor on what is off the diagonal of the Gram matrices."""
    require_examples("regmean_pp", examples)
    require_fraction("regmean_pp", "alpha", alpha)
    merged = each_tensor(lambda taus: weighted(taus, None), base, deltas)
    flows = [first_block_inputs(task, add(base, merged)) for task in calibration]
    for prefix in counted(calibration[0].prefixes, "blocks"):
        theta_0, taus = block_params(base, prefix), [block_params(delta, prefix) for delta in deltas]
        grams = (
            mean_grams(task.block, add(theta_0, tau), ((each,) for each in flow))
            for task, tau, flow in zip(calibration, taus, flows, strict=True)
        )
        block = regression_means(taus, grams, alpha)
        merged |= {prefix + name: delta for name, delta in block.items()}
        flows = [
            next_block_inputs(task, add(theta_0, block), flow) for task, flow in zip(calibration, flows, strict=True)
        ]
    return merged
