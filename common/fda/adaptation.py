"""Box 2 of the paper for one block: fit the merged block to every expert's outputs on its own anchors (Eq. 4 to 6)."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from common.core.blocks import Block
from common.core.errors import InputError
from common.core.linalg import FLOAT32_GRAM_RTOL, normal_equations, solve_normal_equations
from common.core.linear_inputs import input_grams
from common.core.task_vectors import Params, as_leaf_tensors, subtract
from common.fda.matching import DISTANCES

Betas = tuple[float, float]  # decay rates of Adam's two moments
BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's; torch's defaults


@dataclass(frozen=True)
class Trainable:
    """A block's weights as a function of the parameters that are trained, and the optimizer of these parameters.

    params: the trained parameters at their start. build(params) -> the block's weights; a change of params changes the
    weights by the same amount. make_optimizer(params, betas) -> step(lr), which moves every parameter with a gradient.
    """

    params: Params
    build: Callable[[Params], Params]
    make_optimizer: Callable[[Params, Betas], Callable[[float], Any]]


@dataclass(frozen=True)
class FitSettings:
    """How a merged block is fitted.

    Args:
        distance: between its outputs and the experts'; a key of `DISTANCES`.
        lr, epochs, batch_size: of Adam; a batch is of so many anchors.
        speedup: divides the epochs; see `learning_rates` and `adam_betas`.
    """

    distance: str
    lr: float
    epochs: int
    batch_size: int
    speedup: float = 1


def own_weights(theta: Params) -> Trainable:
    """The weights themselves are trained, from `theta` on (paper Eq. 5), with Adam."""
    return Trainable({name: p.clone() for name, p in theta.items()}, dict, weight_adam)


def weight_adam(params: Params, betas: Betas) -> Callable[[float], None]:
    """step(lr) of torch's Adam."""
    optimizer = torch.optim.Adam(params.values(), betas=betas, fused=True)

    def step(lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

    return step


def coefficients(theta_0: Params, deltas: Iterable[Params], scales: Sequence[float]) -> Trainable:
    """θ = θ₀ + Σ_i α_i ⊙ δ_i with one coefficient for every weight of every delta, trained with Adam (paper Eq. 6).

    α_i starts at scales[i]. Weights that no delta touches stay at θ₀. One delta at a time has to be in memory.
    The α_i are not kept: what is trained is how far their sum is from where it started, see `coefficient_adam`.
    """
    start = {name: p.clone() for name, p in theta_0.items()}
    sizes = {name: p.new_empty(len(scales), *p.shape) for name, p in theta_0.items()}
    for i, (delta, scale) in enumerate(zip(deltas, scales, strict=True)):
        for name in theta_0:
            start[name] += scale * delta[name]
            sizes[name][i] = delta[name].abs()

    def build(shift: Params) -> Params:
        return {name: start[name] + shift[name] for name in start}

    def make_optimizer(params: Params, betas: Betas) -> Callable[[float], None]:
        steps = [(p, coefficient_adam(p, sizes[name], betas)) for name, p in params.items()]

        def step(lr: float) -> None:
            for p, step_of_p in steps:
                if p.grad is not None:
                    step_of_p(lr)

        return step

    return Trainable({name: torch.zeros_like(p) for name, p in theta_0.items()}, build, make_optimizer)


def coefficient_adam(shift: Tensor, sizes_S: Tensor, betas: Betas) -> Callable[[float], None]:
    """step(lr) of Adam on every α_i of Σ_i α_i ⊙ δ_i, as the move of that sum; sizes_S (S, ...): the |δ_i|.

    With G the gradient of the sum, that of α_i is δ_i ⊙ G, so its moments are δ_i ⊙ m and δ_i² ⊙ v with m and v those
    of G. Adam moves α_i by −lr δ_i m̂ / (|δ_i| √v̂ + ε), hence the sum by −lr m̂ Σ_i δ_i² / (|δ_i| √v̂ + ε): one pair of
    moments serves all tasks.
    """
    m, v = torch.zeros_like(shift), torch.zeros_like(shift)
    steps, (beta_1, beta_2) = 0, betas

    @torch.no_grad()
    def step(lr: float) -> None:
        nonlocal steps
        steps += 1
        gradient = cast(Tensor, shift.grad)
        m.lerp_(gradient, 1 - beta_1)
        v.mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
        root = (v / (1 - beta_2**steps)).sqrt_()
        reach = torch.zeros_like(shift)  # not kept: a block can fill a machine, one tensor of it does not
        for size in sizes_S:
            reach.addcdiv_(size.square(), (size * root).add_(EPSILON))
        shift.addcmul_(m, reach, value=-lr / (1 - beta_1**steps))

    return step


def regmean_warm_start(
    block: Block, start: Trainable, experts: Iterable[tuple[Params, Tensor]], ridge: float = 0.0
) -> Trainable:
    """`start` with every linear map moved to the least-squares mean of the experts' on their anchors, in closed form.

    experts: θ_t and x_ATD of each task. Each linear map W of the block becomes the one whose outputs are nearest to
    those of every W_t on the inputs that the task's anchors bring to it in the expert (RegMean, Jin et al. 2023, with
    anchors for data): with X_t the inputs, a row for each token, and g the mean over their D directions of all their
    squares, tr Σ_t X_tᵀX_t / D, the minimum of Σ_t ‖X_t (W − W_t)ᵀ‖² + ridge · g ‖W − W_start‖². A direction of mean
    square g goes 1 / (1 + ridge) of the way. Directions that no input has, and all other parameters, stay where they
    are.
    Raises: InputError if the block has no linear map.
    """
    with torch.no_grad():
        theta = start.build(start.params)
    sums = normal_equations((subtract(theta_t, theta), input_grams(block, theta_t, x)) for theta_t, x in experts)
    if not sums:
        raise InputError("adapt.warm_start is regmean, but the blocks of this architecture have no linear map")
    moves = {
        name: solve_normal_equations(*pair, FLOAT32_GRAM_RTOL, ridge).to(theta[name].dtype)
        for name, pair in sums.items()
    }
    return replace(start, params={name: p + moves[name] if name in moves else p for name, p in start.params.items()})


def fit_block(
    block: Block,
    start: Trainable,
    inputs_ATD: Tensor,
    targets_ATD: Tensor,
    settings: FitSettings,
    *,
    generator: torch.Generator,
    progress: Callable[[float, float], None] = lambda done, loss: None,
) -> tuple[Params, list[float]]:
    """Train `start` until block(θ, inputs) is close to the targets; anchors of all tasks are pooled and shuffled.

    Loss: the distance summed over the batch (paper Eq. 4). The last batch of an epoch may be smaller, and is the only
    one where there are fewer anchors than a batch may have. `progress` is told the fraction of the epochs done, and the
    loss.
    Returns: the block's weights, detached, and the mean loss per anchor in each epoch.
    Raises: FloatingPointError at a loss that is not finite.
    """
    anchors = len(inputs_ATD)
    params = as_leaf_tensors(start.params)
    step = start.make_optimizer(params, adam_betas(settings.speedup))
    epochs = shortened(settings.epochs, settings.speedup)
    steps, trace = epochs * -(-anchors // settings.batch_size), []
    rates = iter(learning_rates(steps, settings.lr, settings.speedup))
    distance = DISTANCES[settings.distance]
    for epoch in range(epochs):
        total = torch.zeros((), device=inputs_ATD.device)
        for batch in torch.randperm(anchors, generator=generator).to(inputs_ATD.device).split(settings.batch_size):
            loss = distance(block(start.build(params), inputs_ATD[batch]), targets_ATD[batch])
            loss.backward()
            step(next(rates))
            for p in params.values():
                p.grad = None
            total += loss.detach()
        trace.append(total.item() / anchors)
        if not torch.isfinite(total):
            raise FloatingPointError(f"the adaptation loss is {trace[-1]} in epoch {epoch}")
        progress((epoch + 1) / epochs, trace[-1])
    with torch.no_grad():
        return {name: p.detach().clone() for name, p in start.build(params).items()}, trace


def shortened(epochs: int, speedup: float) -> int:
    """The number of epochs that a speedup leaves: at least one, unless there were none."""
    return math.ceil(epochs / speedup)


def learning_rates(steps: int, lr: float, speedup: float) -> list[float]:
    """The learning rate of each step: `lr`, or with a speedup a rise in the first fifth, the same rate, and a fall in
    the last fifth, which add up to the rates of all the steps before some were saved.
    """
    if speedup == 1:
        return [lr] * steps
    shape = [min(1, 5 * (i + 0.5) / steps, 5 * (steps - i - 0.5) / steps) for i in range(steps)]
    total = sum(shape)
    return [speedup * lr * steps * part / total for part in shape]


def adam_betas(speedup: float) -> Betas:
    """Adam's β of both moments: with a speedup s a new gradient counts √s times as much as without.

    Large steps overshoot where they follow old gradients, and follow noise where they average few of them. With a share
    of 1 (the same β) or of s (as many epochs remembered) blocks end further from where all epochs would lead them.
    """
    beta_1, beta_2 = (max(0.0, 1 - (1 - beta) * math.sqrt(speedup)) for beta in BETAS)
    return beta_1, beta_2
