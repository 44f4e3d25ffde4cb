"""Concrete task arithmetic: a mask for the sum of the task vectors, shared by all tasks, that makes answers sure.

    θ = θ₀ + λ m / mean(m) ⊙ Σᵢ τᵢ        m = σ((logit u + x) / T), u uniform in (0, 1), drawn anew in every step
weight by weight, the mean of m taken over each tensor. Adam trains the logits x, from 0, to minimise the sum over the
tasks of the mean entropy of softmax(logits) on a batch of unlabelled test inputs. The merged model has one more draw.

Source: Tang et al. 2023, "Concrete subspace learning based interference elimination for multi-task model fusion"
(arXiv 2312.06173), as in FusionBench. Defaults: λ 0.3, T 0.5, lr 1e-3, 2000 steps of 16 inputs of each task, theirs.
Deviation: inputs come in one drawn order, which begins again; the code shuffles. A regression has no entropy and no
part.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.seeding import seeded
from common.core.task_vectors import Params, add
from common.merging.calibration import CalibrationTask
from common.merging.entropy import entropy_gradients, repeated
from common.merging.tensorwise import require_examples, total
from common.run.progress import counted


def concrete(
    base: Params,
    deltas: Sequence[Params],
    calibration: Sequence[CalibrationTask],
    *,
    examples: int | None = None,
    scale: float = 0.3,
    temperature: float = 0.5,
    lr: float = 1e-3,
    steps: int = 2000,
    seed: int = 0,
) -> Params:
    """The delta under a trained mask; `seed` draws the inputs, `examples` of each task (None: all), and the masks."""
    require_examples("concrete", examples)
    if temperature <= 0 or lr <= 0 or steps < 0:
        raise InputError(f"concrete: temperature > 0, lr > 0, steps ≥ 0 are needed: {temperature}, {lr}, {steps}")
    if not base:
        return {}
    sums = {name: total(delta[name] for delta in deltas).mul_(scale) for name in base}
    logits = {name: torch.zeros_like(every).requires_grad_() for name, every in sums.items()}
    adam = torch.optim.Adam(logits.values(), lr=lr)
    streams = [repeated(task.batches) for task in calibration]
    for step in counted(range(steps), "steps"):
        merged = {name: mask(x, temperature, seed, name, step) * sums[name] for name, x in logits.items()}
        theta = add(base, {name: delta.detach() for name, delta in merged.items()})
        gradients = entropy_gradients("concrete", theta, calibration, map(next, streams))
        adam.zero_grad()
        for name, gradient in gradients.items():
            merged[name].backward(gradient)
        adam.step()
    with torch.no_grad():
        return {name: mask(x, temperature, seed, name, steps) * sums[name] for name, x in logits.items()}


def mask(logits: Tensor, temperature: float, seed: int, name: str, step: int) -> Tensor:
    """m / mean(m), with the draw of one tensor and step."""
    generator = seeded(seed, "concrete", name, step)
    tiny = torch.finfo(torch.float64).eps
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp_(tiny, 1 - tiny)
    m = ((torch.logit(uniform).to(logits) + logits) / temperature).sigmoid()
    return m / m.mean()
