"""AdaRank: which singular components of each task vector to merge, and how much, so that answers are sure.

Every matrix of the blocks is θ = θ₀ + δ₀ + Σᵢ λᵢ Uᵢ diag(mᵢ ⊙ sᵢ) Vᵢᵀ, with Uᵢ diag(sᵢ) Vᵢᵀ = τᵢ − δ₀ and masks mᵢ of 0
and 1; every other tensor is θ₀ + δ₀ + Σᵢ λᵢ (τᵢ − δ₀). δ₀ is the mean of the τᵢ (`start` cart) or 0 (ta). Adam trains
λᵢ, one for each task and tensor, and the masks' logits xᵢ to minimise the sum over the tasks of the mean entropy of
softmax(logits) on unlabelled test inputs. mᵢ = 1 where xᵢ > 0; its derivative is taken to be that of σ(xᵢ / T).

Source: Lee et al. 2025, "AdaRank: adaptive rank pruning for enhanced model merging" (arXiv 2503.22178), and its code.
Defaults: cart with λ from 2.3 and 0.16 of the components kept at first (ta: 0.3 and all), x from ±0.1, T 10, lr 1e-3,
10000 steps of 16 inputs of each task, theirs.
Deviation: the code keeps the best step by its accuracy on the test sets; here the last one is kept. Inputs come in one
drawn order, which begins again. A regression has no entropy and no part.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.linalg import truncated_svd
from common.core.task_vectors import Params, add
from common.merging.calibration import CalibrationTask
from common.merging.entropy import entropy_gradients, repeated
from common.merging.tensorwise import require_examples, require_fraction, rounded_down, total
from common.run.progress import counted

LOGIT = 0.1  # of a component that is kept at first; of one that is not its negative
Factors = tuple[Tensor, Tensor, Tensor]  # U, S, V of a matrix


def adarank(
    base: Params,
    deltas: Sequence[Params],
    calibration: Sequence[CalibrationTask],
    *,
    examples: int | None = None,
    start: Literal["cart", "ta"] = "cart",
    initial: float | None = None,
    rank_fraction: float | None = None,
    temperature: float = 10.0,
    lr: float = 1e-3,
    steps: int = 10000,
    seed: int = 0,
) -> Params:
    """The AdaRank delta; `initial` is the first λ and `rank_fraction` the part kept at first (None: what goes with the
    `start`). `seed` draws which inputs are used, `examples` of each task (None: all), and their order."""
    require_examples("adarank", examples)
    fraction = (0.16 if start == "cart" else 1.0) if rank_fraction is None else rank_fraction
    require_fraction("adarank", "rank_fraction", fraction)
    if temperature <= 0 or lr <= 0 or steps < 0:
        raise InputError(f"adarank: temperature > 0, lr > 0, steps ≥ 0 are needed: {temperature}, {lr}, {steps}")
    if not base:
        return {}
    first = (2.3 if start == "cart" else 0.3) if initial is None else initial
    origin = {n: total(d[n] for d in deltas).mul_(1 / len(deltas) if start == "cart" else 0.0) for n in base}
    taus = [{name: delta[name] - origin[name] for name in base} for delta in deltas]
    blocks = tuple(calibration[0].prefixes)
    cut = [name for name, theta in base.items() if theta.ndim == 2 and name.startswith(blocks)]
    parts = [{name: truncated_svd(tau[name], min(tau[name].shape)) for name in cut if tau[name].any()} for tau in taus]
    lambdas = {name: origin[name].new_full((len(deltas),), first) for name in base}
    logits = [{name: first_logits(p[1], base[name], fraction) for name, p in of.items()} for of in parts]
    adam = torch.optim.Adam([*lambdas.values(), *(x for of in logits for x in of.values())], lr=lr)
    streams = [repeated(task.batches) for task in calibration]
    for _ in counted(range(steps), "steps"):
        theta = add(base, combined(origin, taus, parts, lambdas, logits))
        gradients = entropy_gradients("adarank", theta, calibration, map(next, streams))
        for name, gradient in gradients.items():
            each = zip(taus, parts, logits, strict=True)
            slopes = [slope(gradient, tau[name], of.get(name), x.get(name)) for tau, of, x in each]
            lambdas[name].grad = torch.stack(slopes)
            for i, (of, x) in enumerate(zip(parts, logits, strict=True)):
                if name in of:
                    u, s, v = of[name]
                    soft = (x[name] / temperature).sigmoid()
                    along = ((u.mT @ gradient) * v.mT).sum(1)  # ∂/∂ of each component's singular value
                    x[name].grad = lambdas[name][i] * along * s * soft * (1 - soft) / temperature
        adam.step()
    return combined(origin, taus, parts, lambdas, logits)


def first_logits(s: Tensor, theta_0: Tensor, fraction: float) -> Tensor:
    """x of one matrix: above 0 for the leading part of its smaller side."""
    kept = rounded_down(fraction * min(theta_0.shape)) if fraction < 1 else len(s)
    return torch.where(torch.arange(len(s), device=s.device) < kept, LOGIT, -LOGIT).to(s)


def masked(parts: Factors, logits: Tensor) -> Tensor:
    """U diag(m ⊙ S) Vᵀ."""
    u, s, v = parts
    return (u * (s * (logits > 0))) @ v.mT


def slope(gradient: Tensor, tau: Tensor, parts: Factors | None, logits: Tensor | None) -> Tensor:
    """∂/∂λᵢ of one tensor."""
    return (gradient * (tau if parts is None or logits is None else masked(parts, logits))).sum()


def combined(
    origin: Params,
    taus: Sequence[Params],
    parts: Sequence[Mapping[str, Factors]],
    lambdas: Params,
    logits: Sequence[Params],
) -> dict[str, Tensor]:
    """δ of every tensor."""
    merged = {}
    for name, delta in origin.items():
        merged[name] = delta.clone()
        for lam, tau, of, x in zip(lambdas[name], taus, parts, logits, strict=True):
            merged[name] += lam * (masked(of[name], x[name]) if name in of else tau[name])
    return merged
