"""Layer swapping: the first and last layers of one expert, all others of another.

Of two experts, the one at the place `outer` (of a language, say) gives the `bottom` first and the `top` last layers,
the other one the rest; the `transition` layers next to either border are the mean of both. The layer of a tensor is the
first number in its name; tensors without one (embeddings, final norms, heads) are as `unnumbered` says.

Source: Bandarkar et al. 2024, "Layer swapping for zero-shot cross-lingual transfer in large language models"
(arXiv 2410.01335). Defaults: outer 0, bottom 5, top 2, transition 1, unnumbered mean (ours).
Deviation: the paper's exact numbers of layers, and what it does with embeddings, were not verified.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import Params
from common.merging.tensorwise import Parts, Taus, layer_of, weighted


def depth(parts: Parts, **_: object) -> int:
    """How many layers the model has, by the names of its tensors."""
    layers = (layer_of(name) for base, _ in parts() for name in base)
    return 1 + max((layer for layer in layers if layer is not None), default=-1)


def layer_swap(
    base: Params,
    deltas: Sequence[Params],
    layers: int,
    *,
    outer: int = 0,
    bottom: int = 5,
    top: int = 2,
    transition: int = 1,
    unnumbered: Literal["outer", "inner", "mean"] = "mean",
) -> Params:
    """The delta of two experts with `layers` layers. InputError unless there are two."""
    if len(deltas) != 2:
        raise InputError(f"layer_swap: it merges two models, there are {len(deltas)} tasks")
    if outer not in (0, 1) or min(bottom, top, transition) < 0:
        raise InputError(
            f"layer_swap: outer is 0 or 1, numbers of layers at least 0, not {outer}, {bottom}, {top}, {transition}"
        )

    def source(name: str) -> str:
        layer = layer_of(name)
        if layer is None:
            return unnumbered
        inward = min(layer - bottom, layers - 1 - top - layer)  # how far within the inner expert's layers
        return "outer" if inward < 0 else "mean" if inward < transition else "inner"

    def merged(taus: Sequence[Tensor], name: str) -> Tensor:
        which = source(name)
        return weighted(taus, None) if which == "mean" else taus[outer if which == "outer" else 1 - outer].clone()

    return {name: merged(Taus(deltas, name), name) for name in base}
