"""The matching gradients of several tasks of one block in one go.

A small block leaves a GPU idle: launching its kernels takes longer than running them. Here one step, with all that
automatic differentiation does in it, is written down once as a list of operations; that list is mapped over the tasks,
and can be compiled. Results are those of the tasks one by one, to rounding.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.core.blocks import Block
from common.core.task_vectors import Params
from common.fda.matching import matching_gradient
from common.fda.precision import answers_in, in_precision

Step = Callable[[Params, Params, Params, Tensor], tuple[Tensor, Tensor]]
"""step(theta_0, theta_t, tau, x_ATD) -> matching loss (P,), gradient (A, T, D)."""
Like = tuple[tuple[str, torch.Size], ...]
"""Names and shapes of some tensors."""


def batched_matching_gradient(
    block: Block, theta_0: Params, units: Sequence[tuple[Params, Params, Tensor | float]], *, distance: str,
    precision: str, compiler: str,
) -> Callable[[Sequence[Tensor]], list[tuple[Tensor, Tensor]]]:  # fmt: skip
    """`matching_gradient` of S tasks: from the S tensors x_ATD to as many pairs (loss_P, gradient_ATD).

    units: θ_t, τ, and what is added to x, of each task; all τ name the same tensors. `compiler`: eager, or a backend of
    torch.compile.
    """
    thetas, taus, offsets = zip(*units, strict=True)
    theta_t, tau = stacked(thetas), stacked(taus)
    shapes, device = (like(theta_0), like(taus[0])), next(iter(theta_0.values())).device

    def measure(xs_ATD: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        x_SATD = torch.stack([x + offset for x, offset in zip(xs_ATD, offsets, strict=True)]).detach()
        step = mapped(block, distance, precision, compiler, *shapes, x_SATD.shape[1:], device)
        with in_precision(precision, device):  # tf32 is a switch of the device; bf16 is written into the step
            loss_SP, gradient_SATD = step(theta_0, theta_t, tau, x_SATD)
        return list(zip(loss_SP, gradient_SATD, strict=True))

    return measure


@lru_cache(maxsize=4)  # all blocks of a model are alike
def mapped(
    block: Block, distance: str, precision: str, compiler: str, theta: Like, tau: Like, x: torch.Size,
    device: torch.device,
) -> Step:  # fmt: skip
    """The step over a leading dimension of θ_t, τ and x, for tensors of these shapes."""

    def step(theta_0: Params, theta_t: Params, tau: Params, x_ATD: Tensor) -> tuple[Tensor, Tensor]:
        settings = {"distance": distance, "answers": answers_in(precision)}
        with sdpa_kernel(SDPBackend.MATH):
            return matching_gradient(block, theta_0, theta_t, tau, x_ATD, **settings)

    def blank(like: Like) -> Params:
        return {name: torch.empty(shape, device=device) for name, shape in like}

    written = make_fx(step, tracing_mode="fake")(blank(theta), blank(theta), blank(tau), torch.empty(x, device=device))
    over_tasks = torch.vmap(written, in_dims=(None, 0, 0, 0))
    return over_tasks if compiler == "eager" else torch.compile(over_tasks, backend=compiler)


def stacked(each: Sequence[Params]) -> Params:
    """{name: (S, ...)} of S dictionaries with the same names."""
    return {name: torch.stack([params[name] for params in each]) for name in each[0]}


def like(params: Params) -> Like:
    return tuple((name, tensor.shape) for name, tensor in params.items())
