"""Where anchors start (paper section 3.3).

Shapes: A anchors, T tokens, D width.
"""

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import Params

SCALES = {"weight": 1.0, "gauss": 0.01}  # the paper's, by scheme


def initial_anchors(
    scheme: str, shape: tuple[int, int, int], *, theta_t: Params, scale: float, generator: torch.Generator
) -> Tensor:
    """Anchors x_ATD to start the optimisation from, on the CPU.

    "weight": every token is a row of a weight matrix of the fine-tuned block that has D inputs, drawn without
        replacement; when there are too few rows, the tokens left over are means of two random rows.
    "gauss": standard normal.
    Both are multiplied by `scale`. What matters is little energy in the tail subspace of the task vector (paper Eq. 7).

    Deviation: where rows run short (ViT-B/16, ViT-L/14) the released code lays the rows in storage order and the means
    behind them, so that a token's place decides what it is; here all are shuffled.
    """
    a, t, d = shape
    if scheme == "gauss":
        return torch.randn(shape, generator=generator) * scale
    if scheme != "weight":
        raise InputError(f"there is no initialisation {scheme!r}; choose one of {', '.join(SCALES)}")
    matrices = [w.detach().float().cpu() for w in theta_t.values() if w.ndim == 2 and w.shape[1] == d]
    if not matrices:
        raise InputError(f"no weight matrix of the block has {d} inputs, so anchors cannot start from its rows")
    rows = torch.cat(matrices)
    short = max(0, a * t - len(rows))
    pairs = torch.randint(len(rows), (2, short), generator=generator)
    rows = torch.cat([rows, rows[pairs].mean(0)])
    return rows[torch.randperm(len(rows), generator=generator)[: a * t]].reshape(shape) * scale
