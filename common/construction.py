"""Box 1 of the paper, one unit of it: optimise the anchors of one block for one task."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.blocks import moved
from common.matching import Block, matching_gradient
from common.task_vectors import Params, subtract

# Both work on the anchors unfolded to (A·T, D). Muon orthogonalises the step, so that no direction of D is left behind.
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "muon": partial(torch.optim.Muon, momentum=0.9, nesterov=False, weight_decay=0.0),
}
SCHEDULES = {"constant": lambda done: 1.0, "linear": lambda done: 1 - done}  # factor on lr, of the fraction done
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
    schedule: str = "constant",
    distance: str = "cos",
    chunk: int | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> OptimisedAnchors:
    """Minimise the sum of the matching losses over the anchors x (paper Eq. 1, Algorithm 1 box 1).

    Gradients are taken with respect to x alone, full batch, `chunk` anchors in memory at a time. `tau` names the
    tensors to match and their directions (default θ_t − θ₀); tensors that did not move are left out. A task vector that
    is zero throughout leaves x as it is.
    `progress` is told the step and the loss now and then.

    Deviation: the anchors after the last step are scored too; the released code never looks at them.
    Raises: FloatingPointError at the first step whose loss is not finite.
    """
    tau = moved(subtract(theta_t, theta_0) if tau is None else tau)
    if not tau:
        return OptimisedAnchors(x_init, [], 0, {})
    rows = x_init.detach().flatten(0, 1).clone().requires_grad_()
    stepper = OPTIMIZERS[optimizer]([rows], lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: SCHEDULES[schedule](step / max(1, steps)))
    best_x, best_P = x_init, torch.full((len(tau),), torch.inf, device=x_init.device, dtype=x_init.dtype)
    losses = []

    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for step in range(steps + 1):
            x = rows.view_as(x_init)
            loss_P, gradient = matching_gradient(block, theta_0, theta_t, tau, x, distance=distance, chunk=chunk)
            rows.grad = gradient.flatten(0, 1)
            with torch.no_grad():
                better = loss_P.sum() < best_P.sum()
                best_x, best_P = torch.where(better, x, best_x), torch.where(better, loss_P, best_P)
                losses.append(loss_P.mean())
            if step % CHECK_EVERY == 0 or step == steps:
                check_finite(losses)
                progress(step, losses[-1].item())
            if step < steps:
                stepper.step()
                scheduler.step()

    trace = torch.stack(losses).tolist()
    best_step = min(range(len(trace)), key=trace.__getitem__)
    return OptimisedAnchors(best_x, trace, best_step, dict(zip(tau, best_P.tolist(), strict=True)))


def check_finite(losses: list[Tensor]) -> None:
    """FloatingPointError naming the first of the last steps whose loss is NaN or Inf."""
    recent = torch.stack(losses[-CHECK_EVERY:])
    if not recent.isfinite().all():
        step = len(losses) - len(recent) + int((~recent.isfinite()).nonzero()[0])
        raise FloatingPointError(f"the matching loss is {losses[step].item()} at step {step}")
