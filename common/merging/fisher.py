"""Fisher merging: the mean of the experts in which every weight counts by its Fisher information.

δ = Σᵢ mᵢ ⊙ Fᵢᵖ ⊙ τᵢ / Σᵢ mᵢ ⊙ Fᵢᵖ weight by weight, with power p 1 and every mᵢ 1 in the paper; and Fᵢ the diagonal of
expert i's Fisher matrix: the mean over its inputs x of
    E_{y ~ p(y|x)} (∂ log p(y|x) / ∂θ)²        at θ = θ₀ + τᵢ, each example by itself
The expectation is exact for few classes; else one label is drawn for each example. A regression with outputs f(x) of
unit variance has (∂f/∂θ)². As in the paper's code each Fᵢ is first divided by its norm over the whole model.

OTA merging has p ½ and, by FFG, a mask mᵢ of the part `keep` of each tensor's weights whose Fᵢ τᵢ² is largest (0/0 =
0).

Source: Matena and Raffel 2022, "Merging models with Fisher-weighted averaging" (arXiv 2111.09832), and its code; OTA
and FFG (arXiv 2509.11167).
Defaults: 1e-6 as the least that a weight counts, so that weights no task sees are averaged (the code's); 256 training
inputs a task as in FusionBench; exact up to 10 classes (ours).
Deviation: OTA takes Adam's second moments for Fᵢ, which a released checkpoint does not have, and weighs by √Fᵢ + 1e-26.
Deviation: the code applies the least weight before the norm is divided out. Then an expert that is sure of its answers,
whose Fᵢ are small everywhere, would outweigh all others. Here it is applied to what is compared.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.seeding import random_choice, seeded
from common.core.task_vectors import Params, add, as_leaf_tensors
from common.merging.calibration import CalibrationTask
from common.merging.magnitude import largest, share
from common.merging.tensorwise import require_examples, require_fraction
from common.run.progress import counted


def fisher(
    base: Params,
    deltas: Sequence[Params],
    calibration: Sequence[CalibrationTask],
    *,
    examples: int = 256,
    exact: int = 10,
    normalize: bool = True,
    floor: float = 1e-6,
    power: float = 1.0,
    keep: float = 1.0,
    seed: int = 0,
) -> Params:
    """The Fisher-weighted mean task vector; beyond `exact` classes labels are drawn, with `seed`."""
    require_examples("fisher", examples)
    require_fraction("fisher", "keep", keep)
    if power <= 0:
        raise InputError(f"fisher: power must be above 0, it is {power}")
    if floor <= 0 or exact < 1:
        raise InputError(f"fisher: floor > 0 and exact ≥ 1 are needed, they are {floor} and {exact}")
    fishers = []
    for delta, task in zip(deltas, calibration, strict=True):
        fishers.append(fisher_information(add(base, delta), task, exact, seeded(seed, "fisher")))
        if normalize and base:
            size = torch.stack([f.square().sum() for f in fishers[-1].values()]).sum().sqrt()
            fishers[-1] = {name: f / size.clamp(min=torch.finfo(f.dtype).tiny) for name, f in fishers[-1].items()}
    return {
        name: fisher_mean([d[name] for d in deltas], [f[name] for f in fishers], floor, power, keep) for name in base
    }


def fisher_mean(
    taus: Sequence[Tensor], fishers: Sequence[Tensor], floor: float = 1e-6, power: float = 1.0, keep: float = 1.0
) -> Tensor:
    """δ of τᵢ and the diagonals Fᵢ ≥ 0, all of one shape."""
    delta, weights = torch.zeros_like(taus[0]), torch.zeros_like(taus[0])
    for tau, fisher in zip(taus, fishers, strict=True):
        weight = fisher.clamp(min=floor).pow_(power)
        if keep < 1:
            importance = fisher * tau.square()
            weight *= importance >= largest(importance.clone(), max(1, share(tau, keep)))
        delta += weight * tau
        weights += weight
    return delta.div_(weights.masked_fill_(weights == 0, 1))


def fisher_information(
    theta: Params, task: CalibrationTask, exact: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The diagonal of the Fisher matrix at θ, by tensor: its mean over the task's inputs."""
    at = as_leaf_tensors(theta)
    total = {name: torch.zeros_like(p) for name, p in theta.items()}
    for batch in counted(task.batches, "batches of a task"):
        logits_AC = task.answer(at, batch)
        terms = list(log_likelihoods(logits_AC, exact, generator))
        for i, (weight, likelihood) in enumerate(terms, start=1):
            gradients = torch.autograd.grad(
                likelihood, list(at.values()), retain_graph=i < len(terms), materialize_grads=True
            )
            for name, gradient in zip(at, gradients, strict=True):
                total[name].addcmul_(gradient, gradient, value=weight / task.examples)
    return total


def log_likelihoods(logits_AC: Tensor, exact: int, generator: torch.Generator) -> Iterator[tuple[float, Tensor]]:
    """What to differentiate and square for each example, and how much it counts: log p(y|x) for all y or a drawn one.

    Of a single output itself, which is log p(y|x) of a regression up to a factor whose square has mean 1.
    """
    classes = logits_AC.shape[1]
    for logits_C in logits_AC:
        if classes == 1:
            yield 1.0, logits_C[0]
        elif classes <= exact:
            yield from zip(logits_C.softmax(0).tolist(), logits_C.log_softmax(0), strict=True)
        else:
            drawn = random_choice(logits_C.detach().cpu().softmax(0), generator)
            yield 1.0, logits_C.log_softmax(0)[drawn]
