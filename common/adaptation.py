"""Box 2 of the paper, one unit of it: fit one merged block to what every expert answers on its own anchors."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from common.errors import InputError
from common.matching import DISTANCES, Block
from common.task_vectors import Params


@dataclass(frozen=True)
class Trainable:
    """A block's parameters as a function of what is trained: build(free) -> Params."""

    free: Params
    build: Callable[[Params], Params]


def own_weights(theta: Params) -> Trainable:
    """The weights themselves are trained, from `theta` on (paper Eq. 5)."""
    return Trainable({name: p.clone() for name, p in theta.items()}, dict)


def coefficients(theta_0: Params, deltas: Iterable[Params], scales: Sequence[float]) -> Trainable:
    """θ = θ₀ + Σ_i α_i ⊙ δ_i with one trained coefficient for every weight of every delta (paper Eq. 6).

    α_i starts at scales[i]. Weights that no delta touches stay at θ₀. One delta at a time has to be in memory.
    """
    stacked = {name: p.new_empty(len(scales), *p.shape) for name, p in theta_0.items()}
    free = {name: torch.empty_like(deltas) for name, deltas in stacked.items()}
    for i, (delta, scale) in enumerate(zip(deltas, scales, strict=True)):
        for name in theta_0:
            stacked[name][i], free[name][i] = delta[name], scale

    def build(alpha: Params) -> Params:
        return {name: theta_0[name] + (alpha[name] * stacked[name]).sum(0) for name in theta_0}

    return Trainable(free, build)


def fit_block(
    block: Block,
    start: Trainable,
    inputs_ATD: Tensor,
    targets_ATD: Tensor,
    *,
    distance: str,
    lr: float,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    progress: Callable[[int, float], None] = lambda epoch, loss: None,
) -> tuple[Params, list[float]]:
    """Train `start` with Adam so that block(θ, inputs) meets the targets; anchors of all tasks are pooled and shuffled.

    Loss: the distance summed over the batch (paper Eq. 4). The last batch of an epoch may be smaller.
    Returns: the parameters, detached, and the mean loss per anchor in each epoch.
    Raises: InputError if the batch is larger than the anchors; FloatingPointError at a loss that is not finite.
    """
    anchors = len(inputs_ATD)
    if batch_size > anchors:
        raise InputError(f"adapt.batch_size is {batch_size}, but all tasks together have {anchors} anchors")
    free = {name: p.detach().requires_grad_() for name, p in start.free.items()}
    hooks = [step_when_ready(p, torch.optim.Adam([p], lr=lr, fused=True)) for p in free.values()]
    trace = []
    for epoch in range(epochs):
        total = torch.zeros((), device=inputs_ATD.device)
        for batch in torch.randperm(anchors, generator=generator).to(inputs_ATD.device).split(batch_size):
            loss = DISTANCES[distance](block(start.build(free), inputs_ATD[batch]), targets_ATD[batch])
            loss.backward()
            total += loss.detach()
        trace.append(total.item() / anchors)
        if not torch.isfinite(total):
            raise FloatingPointError(f"the adaptation loss is {trace[-1]} in epoch {epoch}")
        progress(epoch + 1, trace[-1])
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        return {name: p.detach().clone() for name, p in start.build(free).items()}, trace


def step_when_ready(p: Tensor, stepper: torch.optim.Optimizer) -> RemovableHandle:
    """Let the backward pass step a parameter as soon as its gradient is there, and drop that.

    The gradients of all coefficients at once would take as much memory as the coefficients.
    """

    def step(p: Tensor) -> None:
        stepper.step()
        p.grad = None

    return p.register_post_accumulate_grad_hook(step)
