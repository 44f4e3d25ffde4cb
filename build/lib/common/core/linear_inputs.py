"""Gram matrices of what reaches the linear maps of a model."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.core.blocks import Block
from common.core.task_vectors import Params, as_leaf_tensors


def mean_grams(answer: Callable[..., Any], theta: Params, calls: Iterable[tuple]) -> dict[str, Tensor]:
    """The mean of x xᵀ (D, D) over all inputs x of each linear map x Wᵀ, by the name of its matrix W in θ.

    Args:
        answer: the model; answer(θ, *call) runs it once. An input is one token of one example.
        calls: the arguments behind θ, a tuple for each run.
    """
    trained = as_leaf_tensors(theta)  # a matrix that needs no gradient is not always multiplied as one
    seen = _LinearInputs(trained)
    for call in calls:
        with seen:
            answer(trained, *call)
    return {name: gram_DD / seen.rows[name] for name, gram_DD in seen.grams.items()}


def input_grams(block: Block, theta: Params, x_ATD: Tensor) -> dict[str, Tensor]:
    """XᵀX (D, D) of the inputs X (a row for each token) of every linear map x Wᵀ of the block, by the name of W."""
    trained = as_leaf_tensors(theta)
    with _LinearInputs(trained) as seen:
        block(trained, x_ATD)
    return seen.grams


class _LinearInputs(TorchDispatchMode):
    """Sums XᵀX, and counts the rows of X, over all products X Wᵀ taken while it is on, for the matrices W of θ.

    It sees the products themselves, not the modules, and so the fused projections of nn.MultiheadAttention as well.
    """

    def __init__(self, theta: Params):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in theta.items() if p.ndim == 2}
        self.shapes = {name: p.shape for name, p in theta.items()}
        self.grams: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            x, transposed = args[-2:]
            name = self.names.get(transposed.data_ptr())
            if name and transposed.T.shape == self.shapes[name] and transposed.T.is_contiguous():
                self.grams[name] = self.grams.get(name, 0) + x.T @ x
                self.rows[name] = self.rows.get(name, 0) + len(x)
        return func(*args, **(kwargs or {}))
