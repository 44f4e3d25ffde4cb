"""q, k and v of an attention as one tensor, as torch's own attention keeps them: the rows of q, those of k, those of v.

The matching loss has a term for each tensor: three tensors weigh three times what one weighs that holds their rows.
"""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from common.core.blocks import Block
from common.core.task_vectors import Params

APART = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))  # the modules' names
Rows = tuple[tuple[str, int], ...]
"""The parts of a fused tensor, in order: name and number of rows."""
Fused = tuple[tuple[str, Rows], ...]
"""Each fused tensor and its parts."""


def fused_tensors(theta: Params) -> Fused:
    """Which tensors of a block are fused: weights and biases of the modules that make q, k and v of one attention."""
    found: dict[str, Rows] = {}
    for name in theta:
        *outer, module, last = ["", *name.split(".")]
        for modules in APART:
            parts = [".".join([*outer[1:], each, last]) for each in modules]
            parts = [part for part in parts if part in theta]  # of some there is no bias of the keys
            if module == modules[0] and len(parts) > 1:
                rows = tuple((part, len(theta[part])) for part in parts)
                found[".".join([*outer[1:], f"in_proj_{last}"])] = rows
    return tuple(sorted(found.items()))


def fuse(theta: Params, fused: Fused) -> dict[str, Tensor]:
    """θ or τ of a block with the tensors fused. What the attention has comes first, as in a block of torch's own, so
    that anchors drawn from rows of weights are those drawn from such a block."""
    parts = {part for _, rows in fused for part, _ in rows}
    within = tuple(f"{name.rpartition('.')[0]}." for name, _ in fused)
    made = {name: torch.cat([theta[part] for part, _ in rows]) for name, rows in fused}
    rest = {name: tensor for name, tensor in theta.items() if name not in parts}
    own = {name: tensor for name, tensor in rest.items() if name.startswith(within)}
    return dict(sorted((made | own).items())) | rest


def taken_apart(theta: Mapping[str, Tensor], fused: Fused) -> dict[str, Tensor]:
    """θ as the block has it, of a fused one."""
    apart = dict(theta)
    for name, rows in fused:
        pieces = apart.pop(name).split([count for _, count in rows])
        apart |= {part: piece for (part, _), piece in zip(rows, pieces, strict=True)}
    return apart


@cache  # blocks that compute alike stay one function, which is compiled once
def fused_block(block: Block, fused: Fused) -> Block:
    """The block as a function of θ with the tensors fused."""
    return lambda theta, x_ATD: block(taken_apart(theta, fused), x_ATD)
