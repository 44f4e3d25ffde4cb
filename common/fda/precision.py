"""Matrix products of a lower precision, where it costs the matching nothing that counts.

An expert's block answers nearly as the pretrained one does: bf16 would round either answer by a good part of their
difference, from which all gradients come. So a linear map of the expert is told by the same map of the pretrained
block, W_t x_t = W₀ x₀ + W₀ (x_t − x₀) + (W_t − W₀) x_t, and bf16 rounds each difference by a part of itself; going
back, what reaches W₀ x₀ from both answers is summed before it is rounded. On blocks of RoBERTa-base and ViT-B/32 with a
task vector of 1 % of its norm the cosine of the matching gradient with that of float32 is 0.9999 so, and 0.97 and 0.91
under torch.autocast.

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
from common.core.task_vectors import Params, as_leaf_tensors
from common.fda.matching import Answers, side_by_side

LOW = torch.bfloat16
FEW = 2**25  # multiplications: bf16 makes a product of fewer no faster (CPU; rows of widths 128 and 384 on either side)
NATIVE = ("amx_bf16", "avx512_bf16")  # what a CPU has that multiplies in bf16; another one emulates it


def effective_precision(precision: str, device: torch.device, theta: Params, x_ATD: Tensor) -> str:
    """The precision asked for, but float32 for bf16 where that gains nothing: on a CPU that has to emulate it, which
    took eight times as long as AMX, and where all products of the block would stay in float32.
    """
    emulated = device.type == "cpu" and not any(torch.cpu.get_capabilities().get(flag) for flag in NATIVE)
    few = all(is_small(x_ATD, p) for p in theta.values() if p.ndim == 2)
    return "float32" if precision == "bf16" and (emulated or few) else precision


@contextmanager
def in_precision(precision: str, device: torch.device) -> Iterator[None]:
    """All matrix products in tf32, if that is it (on CUDA; elsewhere float32). Derivatives are to be taken inside."""
    if precision == "tf32" and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def answers_in(precision: str) -> Answers:
    """How the blocks of one θ₀ and one θ_t answer, with linear maps in bf16 if that is the precision.

    Parameters, their gradients and outputs are float32 always.
    """
    return DifferenceForward() if precision == "bf16" else side_by_side


class DifferenceForward:
    """φ(θ₀; x) and φ(θ_t; x), their difference and its derivatives by x as exact as bf16 can tell them.

    For what `matching` does alone: derivatives are taken by θ₀, and then, where x requires a gradient, of those by x.
    The rounded weights are kept for the next x.
    """

    def __init__(self) -> None:
        self.low: dict[tuple[str, int], Tensor] = {}  # by the number of the map, in the order of calls

    def __call__(self, block: Block, theta_0: Params, theta_t: Params, x_ATD: Tensor) -> tuple[Tensor, Tensor]:
        by_x, usual, numbers = x_ATD.requires_grad, F.linear, count()
        met: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []

        def pretrained(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if is_small(x, weight):
                y = usual(x, weight, bias)
            else:
                weight_low = self.rounded("base", len(met), weight.detach)
                y = _Linear.apply(x, weight, weight_low, bias, by_x)
            met.append((x, weight.detach(), bias, y))
            return y

        def expert(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            number = next(numbers)  # a block calls its maps in one order
            if is_small(x, weight):
                return usual(x, weight, bias)
            x_0, weight_0, bias_0, y = met[number]
            moved_low = self.rounded("moved", number, lambda: weight.detach() - weight_0)
            difference = product(x - x_0, self.low["base", number]).add_(product(x, moved_low))
            if bias is not None and bias_0 is not None:
                difference += (bias - bias_0).detach()
            return y + difference

        with _linear_is(pretrained):
            y_0 = block(theta_0, x_ATD)
        with _linear_is(expert):
            y_t = block(as_leaf_tensors(theta_t), x_ATD)
        return y_0, _LastPassOnly.apply(y_t) if by_x else y_t.detach()

    def rounded(self, what: str, number: int, weight: Callable[[], Tensor]) -> Tensor:
        """A weight in bf16, made once."""
        if (what, number) not in self.low:
            self.low[what, number] = weight().to(LOW)
        return self.low[what, number]


def is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether bf16 would gain nothing on x Wᵀ."""
    return x.shape[:-1].numel() * weight.numel() < FEW


def product(x: Tensor, weight_low: Tensor) -> Tensor:
    """x Wᵀ in float32."""
    return (_rows(x) @ weight_low.T).float().view(*x.shape[:-1], -1)


def _rows(x: Tensor) -> Tensor:
    """(R, ...) in bf16."""
    return x.flatten(0, -2).to(LOW)


@contextmanager
def _linear_is(function: Callable[..., Tensor]) -> Iterator[None]:
    """Let all modules call this for torch's linear. Torch's function modes would not see into nn.MultiheadAttention."""
    usual = F.linear
    F.linear = function
    try:
        yield
    finally:
        F.linear = usual


class _LastPassOnly(torch.autograd.Function):
    """The expert's answer, told by the pretrained block's: a function of x, but of θ₀ only in how it was computed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        return None if torch.is_grad_enabled() else gradient


class _Linear(torch.autograd.Function):
    """x Wᵀ + b; derived by all three, and then, if `by_x`, all that by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, weight_low: Tensor, bias: Tensor | None, by_x: bool) -> Tensor:
        x_RD = _rows(x)
        ctx.save_for_backward(x)
        ctx.low, ctx.by_x = (x_RD, weight_low), by_x
        y_RO = (x_RD @ weight_low.T).float()
        if bias is not None:
            y_RO += bias
        return y_RO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        needs_x, needs_weight, _, needs_bias, _ = ctx.needs_input_grad
        first = torch.is_grad_enabled() or not ctx.by_x  # the last pass is by x alone
        of_x, of_weight = _LinearGradient.apply(gradient, x, *ctx.low, needs_x, needs_weight and first)
        of_bias = gradient.flatten(0, -2).sum(0) if needs_bias and first else None
        return of_x, of_weight, None, of_bias, None


class _LinearGradient(torch.autograd.Function):
    """G W and Gᵀ x of the gradient G, as functions of G and x; derived by both, not by W."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, x_RD: Tensor, weight_OD: Tensor, needs_x: bool, needs_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        gradient_RO = _rows(gradient)
        ctx.low, ctx.shapes = (gradient_RO, x_RD, weight_OD), (gradient.shape, x.shape)
        ctx.set_materialize_grads(False)
        of_x = (gradient_RO @ weight_OD).float().view(x.shape) if needs_x else None
        return of_x, (gradient_RO.T @ x_RD).float() if needs_weight else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_of_x: Tensor | None, by_of_weight: Tensor | None) -> Any:
        gradient_RO, x_RD, weight_OD = ctx.low
        of_gradient = of_x = None
        if by_of_x is not None:
            of_gradient = (_rows(by_of_x) @ weight_OD.T).float()
        if by_of_weight is not None:
            by_OD = by_of_weight.to(LOW)
            of_x = (gradient_RO @ by_OD).float().view(ctx.shapes[1])
            turned = x_RD @ by_OD.T
            of_gradient = turned.float() if of_gradient is None else of_gradient.add_(turned)
        return None if of_gradient is None else of_gradient.view(ctx.shapes[0]), of_x, None, None, None, None
