"""The matching gradients of several tasks of one block, computed in one go.

A small block leaves a GPU idle: launching its kernels takes longer than running them. Here one step, with all its
automatic differentiation, is traced once into a list of operations; that list is mapped over the tasks, and can be
compiled. Results are those of the tasks one by one, to rounding.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.core.blocks import Block
from common.core.task_vectors import Params
from common.fda.matching import MatchingProblem, matching_gradient
from common.fda.precision import forward_in, in_precision

Step = Callable[[Params, Params, Params, Tensor], tuple[Tensor, Tensor]]
"""step(theta_0, theta_t, tau, x_ATD) -> matching loss (P,), gradient (A, T, D)."""
Measure = Callable[[Sequence[Tensor]], Sequence[tuple[Tensor, Tensor]]]
"""The anchors x_ATD of S tasks -> for each the matching loss (P,), and the gradient (A, T, D) of its sum."""
NamedShapes = tuple[tuple[str, torch.Size], ...]


def batched_matching_gradient(
    problems: Sequence[MatchingProblem], *, distance: str, precision: str, compiler: str
) -> Measure:
    """`matching_gradient` of S tasks of one block and one θ₀, whose τ name the same tensors.

    compiler: eager, or a backend of torch.compile.
    Raises: ValueError if the problems differ in block, θ₀ or weights.
    """
    block, theta_0 = problems[0].block, problems[0].theta_0
    weights = problems[0].weights
    if any(problem.block is not block or problem.theta_0 is not theta_0 for problem in problems):
        raise ValueError("problems of several blocks or base models cannot be measured in one go")
    if any(problem.weights != weights for problem in problems):
        raise ValueError("problems whose tensors count by different weights cannot be measured in one go")
    theta_t, tau = (stack_params([getattr(p, which) for p in problems]) for which in ("theta_t", "tau"))
    shapes, device = (shapes_of(theta_0), shapes_of(problems[0].tau)), next(iter(theta_0.values())).device

    def measure(xs_ATD: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        x_SATD = torch.stack([p.block_input(x) for p, x in zip(problems, xs_ATD, strict=True)]).detach()
        step = mapped_step(block, weights, distance, precision, compiler, *shapes, x_SATD.shape[1:], device)
        with in_precision(precision, device):  # tf32 is a switch of the device; bf16 is written into the step
            loss_SP, gradient_SATD = step(theta_0, theta_t, tau, x_SATD)
        return list(zip(loss_SP, gradient_SATD, strict=True))

    return measure


@lru_cache(maxsize=4)  # all blocks of a model have the same shapes
def mapped_step(
    block: Block, weights: str, distance: str, precision: str, compiler: str, theta: NamedShapes, tau: NamedShapes,
    x: torch.Size, device: torch.device,
) -> Step:  # fmt: skip
    """The step over a leading dimension of θ_t, τ and x, for tensors of these shapes."""

    def step(theta_0: Params, theta_t: Params, tau: Params, x_ATD: Tensor) -> tuple[Tensor, Tensor]:
        problem = MatchingProblem(block, theta_0, theta_t, tau, weights=weights)
        with sdpa_kernel(SDPBackend.MATH):
            return matching_gradient(problem, x_ATD, distance=distance, forward=forward_in(precision))

    def blank(shapes: NamedShapes) -> Params:
        return {name: torch.empty(shape, device=device) for name, shape in shapes}

    # a block can hold constants: masks, angles of positions
    trace = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)
    traced = trace(blank(theta), blank(theta), blank(tau), torch.empty(x, device=device))
    over_tasks = torch.vmap(traced, in_dims=(None, 0, 0, 0))
    return over_tasks if compiler == "eager" else torch.compile(over_tasks, backend=compiler)


def stack_params(each: Sequence[Params]) -> Params:
    """{name: (S, ...)} of S dictionaries with the same names."""
    return {name: torch.stack([params[name] for params in each]) for name in each[0]}


def shapes_of(params: Params) -> NamedShapes:
    """Names and shapes of tensors, as a key of a cache."""
    return tuple((name, tensor.shape) for name, tensor in params.items())
