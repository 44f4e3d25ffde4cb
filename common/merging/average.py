"""Weight averaging: δ = (1/N) Σᵢ τᵢ for every tensor, so that the merged model is the mean of the experts.

With `metrics`, a number mᵢ > 0 for each expert, such as its loss, δ = Σᵢ wᵢ τᵢ with wᵢ = mᵢᵖ / Σⱼ mⱼᵖ, p the `power`:
metrics-weighted averaging. Of a loss, which is better where it is less, p is negative.

Source: Wortsman et al. 2022, "Model soups" (arXiv 2203.05482), the uniform soup; metrics-weighted averaging
(arXiv 2504.18580). Defaults: no metrics, power 1.
Deviation: how that paper normalises its weights was not found; a power of the metric and a sum of 1 are ours.
"""

from collections.abc import Sequence

from common.core.errors import InputError
from common.core.task_vectors import Params
from common.merging.tensorwise import each_tensor, scaled_total, weighted


def average(
    base: Params, deltas: Sequence[Params], *, metrics: Sequence[float] | None = None, power: float = 1.0
) -> Params:
    """The mean task vector, for tensors of any shape; InputError unless there is one metric above 0 for each task,
    and on a power of no metrics."""
    if metrics is None and power != 1:
        raise InputError(f"average: power {power} is of metrics, and there are none; leave it out, or give metrics")
    if metrics is None:
        return each_tensor(lambda taus: weighted(taus, None), base, deltas)
    if len(metrics) != len(deltas) or min(metrics) <= 0:
        raise InputError(f"average: metrics has a number above 0 for each of the {len(deltas)} tasks, not {metrics}")
    largest = max(metrics) if power > 0 else min(metrics)  # in its power, which is then 1, so that none overflows
    powers = [(metric / largest) ** power for metric in metrics]
    scales = [each / sum(powers) for each in powers]
    return each_tensor(lambda taus: scaled_total(scales, taus), base, deltas)
