"""Task arithmetic: δ = Σᵢ λᵢ τᵢ for every tensor.

Source: Ilharco et al. 2023, "Editing models with task arithmetic" (arXiv 2212.04089).
Default: λ = 0.3 for every task, the FDA paper's coefficient for all ViTs and RoBERTa-base (0.2 for RoBERTa-large).
"""

from collections.abc import Sequence

from common.core.errors import InputError
from common.core.task_vectors import Params
from common.merging.tensorwise import each_tensor, scaled_total


def task_arithmetic(base: Params, deltas: Sequence[Params], *, scale: float | Sequence[float] = 0.3) -> Params:
    """The scaled sum of the task vectors; `scale` is λ, or a list of one λ a task. InputError if the list is not."""
    scales = [scale] * len(deltas) if isinstance(scale, int | float) else scale
    if len(scales) != len(deltas):
        raise InputError(f"ta: scale lists {len(scales)} numbers, one for each of the {len(deltas)} tasks is needed")
    return each_tensor(lambda taus: scaled_total(scales, taus), base, deltas)
