"""Box 1 of the paper, one unit of it: optimise the anchors of one block for one task."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.blocks import moved
from common.matching import Block, matching_loss
from common.task_vectors import Params, subtract

OPTIMIZERS = {"adamw": torch.optim.AdamW}
CHECK_EVERY = 20  # steps between two looks at the loss: each look waits for the device


@dataclass(frozen=True)
class OptimisedAnchors:
    """The best anchors met, and how the matching loss went.

    x: (A, T, D). trace: mean loss over the tensors before each step and after the last one, steps + 1 numbers.
    best_step: index into `trace`. losses: loss of each tensor at `best_step`.
    """

    x: Tensor
    trace: list[float]
    best_step: int
    losses: dict[str, float]


def optimise_anchors(
    block: Block,
    theta_0: Params,
    theta_t: Params,
    x_init: Tensor,
    *,
    tau: Params | None = None,
    steps: int,
    lr: float,
    optimizer: str = "adamw",
    distance: str = "cos",
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> OptimisedAnchors:
    """Minimise the sum of the matching losses over the anchors x (paper Eq. 1, Algorithm 1 box 1).

    Gradients are taken with respect to x alone, full batch. `tau` names the tensors to match and their directions
    (default θ_t − θ₀); tensors that did not move are left out. A task vector that is zero throughout leaves x as it is.
    `progress` is told the step and the loss now and then.

    Deviation: the anchors after the last step are scored too; the released code never looks at them.
    Raises: FloatingPointError at the first step whose loss is not finite.
    """
    tau = moved(subtract(theta_t, theta_0) if tau is None else tau)
    if not tau:
        return OptimisedAnchors(x_init, [], 0, {})
    x = x_init.detach().clone().requires_grad_()
    stepper = OPTIMIZERS[optimizer]([x], lr=lr)
    best_x, best_P = x_init, torch.full((len(tau),), torch.inf, device=x.device, dtype=x.dtype)
    losses = []

    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for step in range(steps + 1):
            loss_P = matching_loss(block, theta_0, theta_t, tau, x, distance=distance)
            (x.grad,) = torch.autograd.grad(loss_P.sum(), x)
            with torch.no_grad():
                better = loss_P.sum() < best_P.sum()
                best_x, best_P = torch.where(better, x, best_x), torch.where(better, loss_P, best_P)
                losses.append(loss_P.mean())
            if step % CHECK_EVERY == 0 or step == steps:
                check_finite(losses)
                progress(step, losses[-1].item())
            if step < steps:
                stepper.step()

    trace = torch.stack(losses).tolist()
    best_step = min(range(len(trace)), key=trace.__getitem__)
    return OptimisedAnchors(best_x, trace, best_step, dict(zip(tau, best_P.tolist(), strict=True)))


def check_finite(losses: list[Tensor]) -> None:
    """FloatingPointError naming the first of the last steps whose loss is NaN or Inf."""
    recent = torch.stack(losses[-CHECK_EVERY:])
    if not recent.isfinite().all():
        step = len(losses) - len(recent) + int((~recent.isfinite()).nonzero()[0])
        raise FloatingPointError(f"the matching loss is {losses[step].item()} at step {step}")
