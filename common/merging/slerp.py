"""SLERP: the point between two models on the arc, not the chord, that joins them.

For every tensor, taken as one long vector, with Ω the angle between its ends a and b,
    slerp(a, b; t) = [sin((1 − t) Ω) a + sin(t Ω) b] / sin Ω,
which is (1 − t) a + t b where the two are nearly parallel or one is zero. The ends are the experts' weights θ₀ + τᵢ, as
in mergekit, or their task vectors. Experts of one base are so nearly parallel that their weights are mixed linearly but
for a few tensors; their task vectors are not.

Source: Shoemake 1985, "Animating rotation with quaternion curves"; as a merge of language models mergekit
(Goddard et al. 2024, arXiv 2403.13257). Defaults: t 1/2, linear above |cos Ω| = 0.9995 (both mergekit's).
"""

from collections.abc import Sequence
from math import acos, sin

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import Params, upcast
from common.merging.tensorwise import Taus, by_pieces


def slerp(
    base: Params,
    deltas: Sequence[Params],
    *,
    t: float = 0.5,
    linear_above: float = 0.9995,
    of_task_vectors: bool = False,
) -> Params:
    """The delta at `t` on the way from the first expert (0) to the second (1). InputError unless there are two."""
    if len(deltas) != 2:
        raise InputError(f"slerp: it merges two models, there are {len(deltas)} tasks")
    if not 0 <= linear_above < 1:
        raise InputError(f"slerp: linear_above must lie in [0, 1), it is {linear_above}")

    def merged(theta: Tensor, taus: Sequence[Tensor]) -> Tensor:
        if of_task_vectors:
            theta = torch.zeros_like(theta)
        one, other = taus
        left, right = arc_weights(theta, one, other, t, linear_above)
        result = left * one
        for each, of_other, of_theta in by_pieces(result, other, theta):
            each.add_(right * of_other).add_((left + right - 1) * of_theta)
        return result

    return {name: merged(upcast(base[name]), Taus(deltas, name)) for name in base}


def arc_weights(theta: Tensor, one: Tensor, other: Tensor, t: float, linear_above: float) -> tuple[float, float]:
    """The factors of a = θ + τ₁ and b = θ + τ₂ in slerp(a, b; t). One of the two is in memory at a time."""
    norms = float(torch.linalg.vector_norm(theta + other))
    product = theta + one
    norms = float(torch.linalg.vector_norm(product)) * norms
    for each, of_theta, of_other in by_pieces(product, theta, other):
        each *= of_theta + of_other
    cosine = float(product.sum()) / norms if norms > 0 else 1.0
    if abs(cosine) > linear_above:
        return 1 - t, t
    omega = acos(cosine)
    return sin((1 - t) * omega) / sin(omega), sin(t * omega) / sin(omega)
