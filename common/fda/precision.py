"""Matrix products of a lower precision, where it costs the matching nothing that counts.

The outputs of an expert's block are close to those of the pretrained one: bf16 would round either by a good part of
their difference, from which all gradients come. So a linear map of the expert is computed from that of the pretrained
block, W_t x_t = W₀ x₀ + W₀ (x_t − x₀) + (W_t − W₀) x_t, and bf16 rounds each difference relative to its own size. In
the backward pass, the gradients that reach W₀ x₀ from both outputs are summed before they are rounded. On blocks of
RoBERTa-base and ViT-B/32, with a task vector of 1 % of the weights' norm, the cosine between the matching gradients of
bf16 and float32 is 0.9999 this way, and 0.97 and 0.91 under torch.autocast.

Shapes: R rows, all dimensions of an input but the last; D its width, O that of the output.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from common.core.blocks import Block
from common.core.linear import linear_by
from common.core.task_vectors import Params, as_leaf_tensors
from common.fda.matching import PairForward, plain_forward

LOW = torch.bfloat16
FEW = 2**25  # multiplications: bf16 makes a product of fewer no faster (CPU; rows of widths 128 and 384 on either side)


def effective_precision(precision: str, device: torch.device, theta: Params, x_ATD: Tensor) -> str:
    """The precision asked for, but float32 for bf16 where that gains nothing: on a CPU that is no faster in it, and
    where all products of the block would stay in float32.
    """
    slow = device.type == "cpu" and not multiplies_in_bf16()
    few = all(is_small(x_ATD, p) for p in theta.values() if p.ndim == 2)
    return "float32" if precision == "bf16" and (slow or few) else precision


def multiplies_in_bf16() -> bool:
    """Whether this CPU multiplies in bf16 faster than in float32: with AMX, or with AVX-512 on a make other than Intel.

    What has neither emulates it, which took eight times as long as AMX. Intel's AVX-512 for bf16 alone, as on virtual
    machines that hide AMX, took twice as long as float32 for a unit of SmolLM2.
    """
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or (has.get("avx512_bf16") and "Intel" not in has.get("cpu_name", "")))


@contextmanager
def in_precision(precision: str, device: torch.device) -> Iterator[None]:
    """With "tf32" all matrix products on CUDA are of that precision. Derivatives have to be taken inside as well."""
    if precision == "tf32" and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def forward_in(precision: str) -> PairForward:
    """The forward pass of one θ₀ and one θ_t, with linear maps in bf16 if that is the precision.

    Parameters, their gradients and outputs are always float32.
    """
    return DifferenceForward() if precision == "bf16" else plain_forward


class DifferenceForward:
    """φ(θ₀; x) and φ(θ_t; x); their difference and its derivatives by x are as exact as bf16 allows.

    Written for `matching` alone: derivatives are taken by θ₀ first, and then, where x requires a gradient, the
    derivatives of those by x. The rounded weights are kept for the next x.
    """

    def __init__(self) -> None:
        self.low: dict[tuple[str, int], Tensor] = {}  # by the number of the linear map, in the order of calls

    def __call__(self, block: Block, theta_0: Params, theta_t: Params, x_ATD: Tensor) -> tuple[Tensor, Tensor]:
        by_x, original, numbers = x_ATD.requires_grad, F.linear, count()
        seen: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []

        def pretrained(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if is_small(x, weight):
                y = original(x, weight, bias)
            else:
                weight_low = self.to_low("base", len(seen), weight.detach)
                y = _Linear.apply(x, weight, weight_low, bias, by_x)
            seen.append((x, weight.detach(), bias, y))
            return y

        def expert(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            number = next(numbers)  # a block calls its maps in one order
            if is_small(x, weight):
                return original(x, weight, bias)
            x_0, weight_0, bias_0, y = seen[number]
            tau_low = self.to_low("tau", number, lambda: weight.detach() - weight_0)
            difference = low_product(x - x_0, self.low["base", number]).add_(low_product(x, tau_low))
            if bias is not None and bias_0 is not None:
                difference += (bias - bias_0).detach()
            return y + difference

        with linear_by(pretrained):
            y_0 = block(theta_0, x_ATD)
        with linear_by(expert):
            y_t = block(as_leaf_tensors(theta_t), x_ATD)
        return y_0, _LastPassOnly.apply(y_t) if by_x else y_t.detach()

    def to_low(self, what: str, number: int, weight: Callable[[], Tensor]) -> Tensor:
        """A weight in bf16, rounded at its first use."""
        if (what, number) not in self.low:
            self.low[what, number] = weight().to(LOW)
        return self.low[what, number]


def is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether bf16 would gain nothing on x Wᵀ."""
    return x.shape[:-1].numel() * weight.numel() < FEW


def low_product(x: Tensor, weight_low: Tensor) -> Tensor:
    """x Wᵀ of factors in bf16, the result in float32."""
    return (_low_rows(x) @ weight_low.T).float().view(*x.shape[:-1], -1)


def _low_rows(x: Tensor) -> Tensor:
    """x as a matrix (R, ...) in bf16."""
    return x.flatten(0, -2).to(LOW)


class _LastPassOnly(torch.autograd.Function):
    """Lets no gradient of the expert's output reach θ₀: it was computed from θ₀, but as a function depends on x alone.

    The last backward pass, the one by x, goes through.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor | None:
        return None if torch.is_grad_enabled() else grad_outputs[0]


class _Linear(torch.autograd.Function):
    """x Wᵀ + b, differentiable by all three; if `by_x`, those derivatives are differentiable by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, weight_low: Tensor, bias: Tensor | None, by_x: bool) -> Tensor:
        x_RD = _low_rows(x)
        ctx.save_for_backward(x)
        ctx.low, ctx.by_x = (x_RD, weight_low), by_x
        y_RO = (x_RD @ weight_low.T).float()
        if bias is not None:
            y_RO += bias
        return y_RO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (gradient,), (x,) = grad_outputs, ctx.saved_tensors
        needs_x, needs_weight, _, needs_bias, _ = ctx.needs_input_grad
        first = torch.is_grad_enabled() or not ctx.by_x  # the last pass is by x alone
        of_x, of_weight = _LinearGradient.apply(gradient, x, *ctx.low, needs_x, needs_weight and first)
        of_bias = gradient.flatten(0, -2).sum(0) if needs_bias and first else None
        return of_x, of_weight, None, of_bias, None


class _LinearGradient(torch.autograd.Function):
    """The gradients of x Wᵀ by x and by W, G W and Gᵀ x, given that of the output G; differentiable by G and x."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, x_RD: Tensor, weight_OD: Tensor, needs_x: bool, needs_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        gradient_RO = _low_rows(gradient)
        ctx.low, ctx.shapes = (gradient_RO, x_RD, weight_OD), (gradient.shape, x.shape)
        ctx.set_materialize_grads(False)
        of_x = (gradient_RO @ weight_OD).float().view(x.shape) if needs_x else None
        return of_x, (gradient_RO.T @ x_RD).float() if needs_weight else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        by_of_x, by_of_weight = grad_outputs
        gradient_RO, x_RD, weight_OD = ctx.low
        of_gradient = of_x = None
        if by_of_x is not None:
            of_gradient = (_low_rows(by_of_x) @ weight_OD.T).float()
        if by_of_weight is not None:
            by_OD = by_of_weight.to(LOW)
            of_x = (gradient_RO @ by_OD).float().view(ctx.shapes[1])
            through_weight = x_RD @ by_OD.T
            of_gradient = through_weight.float() if of_gradient is None else of_gradient.add_(through_weight)
        return None if of_gradient is None else of_gradient.view(ctx.shapes[0]), of_x, None, None, None, None
