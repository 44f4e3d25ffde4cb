"""Weight averaging: δ = (1/N) Σᵢ τᵢ for every tensor, so that the merged model is the mean of the experts.

Source: Wortsman et al. 2022, "Model soups" (arXiv 2203.05482), the uniform soup. No hyperparameters.
"""

from collections.abc import Sequence

from common.core.task_vectors import Params
from common.merging.tensorwise import each_tensor, weighted


def average(base: Params, deltas: Sequence[Params]) -> Params:
    """The mean task vector, for tensors of any shape."""
    return each_tensor(lambda taus: weighted(taus, None), base, deltas)
