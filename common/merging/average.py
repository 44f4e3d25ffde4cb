"""Weight averaging: δ = (1/N) Σᵢ τᵢ for every tensor, so that the merged model is the mean of the experts.

Source: Wortsman et al. 2022, "Model soups" (the uniform soup). No hyperparameters.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from common.task_vectors import Params, widen


def average(base: Params, deltas: Sequence[Params]) -> Params:
    """The mean task vector, for tensors of any shape."""
    return {name: mean([widen(delta[name]) for delta in deltas]) for name in base}


def mean(taus: Sequence[Tensor]) -> Tensor:
    """The mean of one tensor over the tasks, summed one by one: no stack of all of them is made."""
    return reduce(torch.add, taus) / len(taus)
