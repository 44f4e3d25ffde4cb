"""AdaMerging: task arithmetic whose coefficients make the merged model sure of its answers.

θ = θ₀ + Σᵢ λᵢₗ τᵢₗ with one λ for each task i and parameter tensor l (`wise` layer), or one for each task (task). On
unlabelled test inputs Adam minimises
    Σᵢ mean over a batch of task i of the entropy of softmax(logits)
with each λ held in [0, 1]: what is trained may leave it, what is used is cut to it. The derivative by λᵢₗ is ⟨τᵢₗ, Gₗ⟩
with G the gradient at θ, where λᵢₗ is not cut; by λᵢ it is their sum. AdaMerging++ (`plus`) first trims every τᵢ to the
fraction `density` of its weights that is largest in magnitude and drops what has not the sign of their sum, as TIES.

Source: Yang et al. 2024, "AdaMerging: Adaptive model merging for multi-task learning" (arXiv 2310.02575), and its code.
Defaults: layer, λ from 0.3, Adam with lr 1e-3, 500 steps of 16 inputs of each task, out of the whole test sets; density
0.2, as in TIES.
Deviation: the code takes two batches of 16 in a step, the paper and FusionBench one. Inputs come in one drawn order,
which begins again once all were seen; the code shuffles before each step.
Deviation: a regression has no entropy. It is left out of the loss; the λ of its expert learn from the other tasks'.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import Params, add
from common.merging.calibration import CalibrationTask
from common.merging.entropy import entropy_gradients, repeated
from common.merging.magnitude import magnitude_thresholds, trim
from common.merging.tensorwise import require_examples, require_fraction, total
from common.run.progress import counted


def adamerging(
    base: Params,
    deltas: Sequence[Params],
    calibration: Sequence[CalibrationTask],
    *,
    examples: int | None = None,
    wise: Literal["layer", "task"] = "layer",
    plus: bool = False,
    density: float = 0.2,
    initial: float = 0.3,
    lr: float = 1e-3,
    steps: int = 500,
    seed: int = 0,
) -> Params:
    """The delta with trained λ. `seed` draws which inputs are used, `examples` of them (None: all), and their order.

    InputError if every task is a regression.
    """
    require_examples("adamerging", examples)
    require_fraction("adamerging", "density", density)
    if not 0 <= initial <= 1 or lr <= 0 or steps < 0:
        raise InputError(f"adamerging: initial in [0, 1], lr > 0, steps ≥ 0 are needed: {initial}, {lr}, {steps}")
    if not base:
        return {}
    deltas = elected(base, deltas, density) if plus else deltas
    own = {name: tau.new_full((len(deltas),), initial) for name, tau in deltas[0].items()}
    lambdas = own if wise == "layer" else dict.fromkeys(own, next(iter(own.values())))
    trained = list(own.values()) if wise == "layer" else [next(iter(own.values()))]
    adam = torch.optim.Adam(trained, lr=lr)
    streams = [repeated(task.batches) for task in calibration]
    for _ in counted(range(steps), "steps"):
        theta = add(base, combined(lambdas, deltas))
        gradients = entropy_gradients("adamerging", theta, calibration, map(next, streams))
        adam.zero_grad()
        for name, gradient in gradients.items():
            slopes = torch.stack([(delta[name] * gradient).sum() for delta in deltas])
            lam = lambdas[name]
            inside = torch.where(lam == lam.clamp(0, 1), slopes, 0)
            lam.grad = inside if lam.grad is None else lam.grad + inside
        adam.step()
    return combined(lambdas, deltas)


def combined(lambdas: Params, deltas: Sequence[Params]) -> dict[str, Tensor]:
    """Σᵢ λᵢₗ τᵢₗ, every λ cut to [0, 1]; lambdas has the λ (N,) of all tasks by the name of the tensor."""
    cut = {name: each.detach().clamp(0, 1) for name, each in lambdas.items()}
    return {name: total(x * delta[name] for x, delta in zip(cut[name], deltas, strict=True)) for name in cut}


def elected(base: Params, deltas: Sequence[Params], density: float) -> list[dict[str, Tensor]]:
    """The task vectors trimmed by one threshold each, without what has not the sign of their sum."""
    floors = magnitude_thresholds(lambda: [(base, deltas)], density)
    trimmed = [{n: trim(tau, density, floors[i]) for n, tau in delta.items()} for i, delta in enumerate(deltas)]
    sums = {name: total(delta[name] for delta in trimmed) for name in base}
    return [{name: tau.where(tau * sums[name] > 0, 0) for name, tau in delta.items()} for delta in trimmed]
