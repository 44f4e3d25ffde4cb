"""DARE: drop each change at random with probability p, rescale what is left by 1/(1 − p), then merge.

τ̃ᵢ = mᵢ ⊙ τᵢ / (1 − p) with mᵢ of independent weights that are 1 with probability 1 − p, so that E τ̃ᵢ = τᵢ. The τ̃ᵢ
are merged by task arithmetic (`dare_ta`) or by TIES (`dare_ties`).

Source: Yu et al. 2024, "Language models are Super Mario" (arXiv 2311.03099). Defaults: p 0.9, one of the rates that the
paper finds to cost nothing; the rest as `ta` and `ties` have it. With p ≥ 1 − density TIES finds nothing left to trim;
else it trims each tensor by itself.
Every mask comes from the seed, the tensor's name and the task's place in the list, so it is the same on every machine
and in every order of work.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.seeding import random_mask, seeded_words
from common.core.task_vectors import LazyParams, Params, made_anew, upcast
from common.merging.task_arithmetic import task_arithmetic
from common.merging.tensorwise import by_pieces
from common.merging.ties import ties


def dare_ta(
    base: Params, deltas: Sequence[Params], *, drop: float = 0.9, scale: float | Sequence[float] = 0.3, seed: int = 0
) -> Params:
    """Task arithmetic on what DARE leaves; `scale` is λ, or a list of one λ for each task.

    `drop` is p. InputError unless it lies in [0, 1).
    """
    return task_arithmetic(base, dropped(deltas, drop, seed), scale=scale)


def dare_ties(
    base: Params,
    deltas: Sequence[Params],
    *,
    drop: float = 0.9,
    density: float = 0.2,
    scale: float = 1.0,
    seed: int = 0,
) -> Params:
    """TIES on what DARE leaves, with its `density` and `scale`.

    `drop` is p. InputError unless it lies in [0, 1).
    """
    return ties(base, dropped(deltas, drop, seed), {}, density=density, scale=scale, granularity="tensor")


def dropped(deltas: Sequence[Params], drop: float, seed: int) -> list[LazyParams]:
    """τ̃ᵢ of every task; each tensor is made when it is asked for, with one mask however often that is."""
    if not 0 <= drop < 1:
        raise InputError(f"dare: drop must lie in [0, 1), it is {drop}")

    def kept(tau: Tensor, name: str, task: int, anew: bool) -> Tensor:
        result, words = tau if anew else torch.empty_like(tau), seeded_words(seed, "dare", name, task)
        for each, of_tau, mask in by_pieces(result, tau, random_mask(tau.shape, 1 - drop, words)):
            torch.mul(mask.to(tau), of_tau, out=each).div_(1 - drop)
        return result

    def lazily(delta: Params, task: int) -> LazyParams:
        return LazyParams(delta, lambda name: kept(upcast(delta[name]), name, task, made_anew(delta)), anew=True)

    return [lazily(delta, i) for i, delta in enumerate(deltas)]
