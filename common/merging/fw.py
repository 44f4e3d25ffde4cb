"""FW-Merging: Frank-Wolfe steps, each towards the expert that the gradient of the loss points away from most.

From θ = θ₀ + λ Σᵢ τᵢ, in every round t = 0, 1, … the expert (or the start itself) with the least Σ over tensors of
cos(G, θᵢ) is chosen, G the gradient at θ of the loss on inputs of all tasks, and θ ← θ + γ (θᵢ − θ), γ = λ `step`
2/(t+2).

Source: Chen et al. 2025, "FW-Merging: scaling model merging with Frank-Wolfe optimization" (arXiv 2503.12649), as in
FusionBench. Defaults: λ 0.3, step 0.1, 10 rounds, 100 inputs of each task, theirs.
Deviation: the loss is the entropy of the answers on unlabelled inputs, an option there; their default is the
cross-entropy of labelled ones, and labels are not used here. Every round has the same inputs. The soft variant is left
out.
Deviation: sums of cosines that differ by less than 1e-6 are equal, and the first of equal ones is chosen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import Params, add, inner
from common.merging.calibration import CalibrationTask
from common.merging.entropy import only_regressions, summed_gradients
from common.merging.tensorwise import require_examples, total
from common.run.progress import counted

EQUAL = 1e-6  # difference of sums of cosines that are equal but for rounding


def fw_merging(
    base: Params,
    deltas: Sequence[Params],
    calibration: Sequence[CalibrationTask],
    *,
    examples: int = 100,
    scale: float = 0.3,
    step: float = 0.1,
    rounds: int = 10,
    seed: int = 0,
) -> Params:
    """The FW-Merging delta; `seed` draws which inputs are used, `examples` of each task."""
    require_examples("fw_merging", examples)
    if not 0 <= scale * step <= 1 or rounds < 0:
        raise InputError(
            f"fw_merging: scale times step in [0, 1] and rounds ≥ 0 are needed, they are {scale}, {step}, {rounds}"
        )
    if not base:
        return {}
    delta = {name: total(each[name] for each in deltas).mul_(scale) for name in base}
    vertices = [*deltas, {name: each.clone() for name, each in delta.items()}]
    for t in counted(range(rounds), "rounds"):
        gradients = mean_gradients(add(base, delta), calibration)
        alignments = [alignment(gradients, add(base, vertex)) for vertex in vertices]
        least = next(i for i, each in enumerate(alignments) if each <= min(alignments) + EQUAL)
        gamma = scale * step * 2 / (t + 2)
        delta = {name: each.lerp(vertices[least][name].to(each), gamma) for name, each in delta.items()}
    return delta


def mean_gradients(theta: Params, calibration: Sequence[CalibrationTask]) -> dict[str, Tensor]:
    """∂/∂θ of the mean entropy over the inputs of each task, added up over the tasks."""
    found = {name: torch.zeros_like(p) for name, p in theta.items()}
    said = 0
    for task in calibration:
        for batch in task.batches:
            gradients = summed_gradients(theta, [task], [batch])
            if gradients is None:
                break
            said += 1
            count = len(next(iter(batch.values())))
            for name, gradient in gradients.items():
                found[name].add_(gradient, alpha=count / task.examples)
    if not said:
        raise only_regressions("fw_merging")
    return found


def alignment(gradients: Params, theta: Params) -> float:
    """Σ over tensors of the cosine of gradient and weights; 0 where one of them is 0."""
    cosines = 0.0
    for name, gradient in gradients.items():
        size = float(gradient.norm()) * float(theta[name].norm())
        cosines += inner({name: gradient}, theta) / size if size > 0 else 0.0
    return cosines
