"""AdaMerging, layer-wise: task arithmetic whose coefficients make the merged model sure of its answers.

θ = θ₀ + Σᵢ λᵢₗ τᵢₗ with one λ for each task i and parameter tensor l. On unlabelled test inputs Adam minimises
    Σᵢ mean over a batch of task i of the entropy of softmax(logits)
with each λ held in [0, 1]: what is trained may leave it, what is used is cut to it. The derivative by λᵢₗ is ⟨τᵢₗ, Gₗ⟩
with G the gradient at θ, where λᵢₗ is not cut.

Source: Yang et al. 2024, "AdaMerging: Adaptive model merging for multi-task learning" (arXiv 2310.02575), and its code.
Defaults: λ from 0.3, Adam with lr 1e-3, 500 steps of 16 inputs of each task, out of the whole test sets.
Deviation: the code takes two batches of 16 in a step, the paper and FusionBench one. Inputs come in one drawn order,
which begins again once all were seen; the code shuffles before each step.
Deviation: a regression has no entropy. It is left out of the loss; the λ of its expert learn from the other tasks'.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from common.core.errors import InputError
from common.core.task_vectors import Params, add, as_leaf_tensors
from common.merging.calibration import Batch, CalibrationTask
from common.merging.tensorwise import require_examples, total
from common.run.stages import lines_only


def adamerging(
    base: Params,
    deltas: Sequence[Params],
    calibration: Sequence[CalibrationTask],
    *,
    examples: int | None = None,
    initial: float = 0.3,
    lr: float = 1e-3,
    steps: int = 500,
    seed: int = 0,
) -> Params:
    """The delta with trained λ. `seed` draws which inputs are used, `examples` of them (None: all), and their order.

    InputError if every task is a regression.
    """
    require_examples("adamerging", examples)
    if not 0 <= initial <= 1 or lr <= 0 or steps < 0:
        raise InputError(f"adamerging: initial in [0, 1], lr > 0, steps ≥ 0 are needed: {initial}, {lr}, {steps}")
    if not base:
        return {}
    lambdas = {name: tau.new_full((len(deltas),), initial) for name, tau in deltas[0].items()}
    adam = torch.optim.Adam(lambdas.values(), lr=lr)
    streams = [repeated(task.batches) for task in calibration]
    for _ in tqdm(range(steps), desc="adamerging", leave=False, disable=lines_only()):
        theta = as_leaf_tensors(add(base, combined(lambdas, deltas)))
        for task, stream in zip(calibration, streams, strict=True):
            logits_AC = task.answer(theta, next(stream))
            if logits_AC.shape[1] > 1:
                entropy(logits_AC).backward()  # adds to the gradients at θ; one task's activations are held at a time
        if all(p.grad is None for p in theta.values()):
            raise InputError("adamerging: every task is a regression, there is no entropy to minimise")
        for name, p in theta.items():
            slopes = torch.stack([(delta[name] * cast(Tensor, p.grad)).sum() for delta in deltas])
            lambdas[name].grad = torch.where(lambdas[name] == lambdas[name].clamp(0, 1), slopes, 0)
        adam.step()
    return combined(lambdas, deltas)


def combined(lambdas: Params, deltas: Sequence[Params]) -> dict[str, Tensor]:
    """Σᵢ λᵢₗ τᵢₗ, every λ cut to [0, 1]; lambdas has the λ (N,) of all tasks by the name of the tensor."""
    cut = {name: each.clamp(0, 1) for name, each in lambdas.items()}
    return {name: total(x * delta[name] for x, delta in zip(cut[name], deltas, strict=True)) for name in cut}


def entropy(logits_AC: Tensor) -> Tensor:
    """The mean over examples of −Σ p log p, in nats."""
    log_p_AC = logits_AC.log_softmax(1)
    return -(log_p_AC.exp() * log_p_AC).sum(1).mean()


def repeated(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, and when they end, the batches again without end."""
    while True:
        yield from batches
