"""Box 1 of the paper, one unit of it: optimise the anchors of one block for one task."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.blocks import moved
from common.matching import Block, matching_gradient, matching_value
from common.runtime import in_precision
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

    x: (A, T, D). trace: mean loss over the tensors before each step and after the last one, steps done + 1 numbers, as
    the optimisation saw them. best_step: index into `trace`. losses: loss of each tensor at `best_step`, in float32.
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
    precision: str = "float32",
    stop_loss: float | None = None,
    patience: int | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> OptimisedAnchors:
    """Minimise the sum of the matching losses over the anchors x (paper Eq. 1, Algorithm 1 box 1).

    Gradients are taken with respect to x alone, full batch, `chunk` anchors in memory at a time. `tau` names the
    tensors to match and their directions (default θ_t − θ₀); tensors that did not move are left out. A task vector that
    is zero throughout leaves x as it is.
    Every CHECK_EVERY steps and at the last is a look: `progress` is told step and mean loss, and the work ends where
    that is at most `stop_loss`, or was last 1 % better than all before it `patience` or more steps ago.
    In float32 the best x of all steps is kept. In a lower `precision` every look computes the loss anew in float32, and
    the best x of the looks is kept: a linear schedule nearly always makes that the last.

    Deviation: the anchors after the last step are scored too; the released code never looks at them.
    Raises: FloatingPointError at the first step whose loss is not finite.
    """
    tau = moved(subtract(theta_t, theta_0) if tau is None else tau)
    if not tau:
        return OptimisedAnchors(x_init, [], 0, {})
    setting, how = (theta_0, theta_t, tau), {"distance": distance, "chunk": chunk}
    rows = x_init.detach().flatten(0, 1).clone().requires_grad_()
    stepper = OPTIMIZERS[optimizer]([rows], lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: SCHEDULES[schedule](step / max(1, steps)))
    best_P = torch.full((len(tau),), torch.inf, device=x_init.device, dtype=x_init.dtype)
    best_x, best_step = x_init, torch.zeros((), dtype=torch.long, device=x_init.device)
    losses, is_enough = [], stopping_rule(stop_loss, patience)

    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for step in range(steps + 1):
            x, look = rows.view_as(x_init), step % CHECK_EVERY == 0 or step == steps
            with in_precision(block, precision, x.device) as lowered:
                loss_P, gradient = matching_gradient(lowered, *setting, x, **how)
            losses.append(loss_P.mean())
            if precision != "float32" and look:
                loss_P = matching_value(block, *setting, x, **how)
            if precision == "float32" or look:
                with torch.no_grad():
                    better = loss_P.sum() < best_P.sum()
                    best_x, best_P = torch.where(better, x, best_x), torch.where(better, loss_P, best_P)
                    best_step = torch.where(better, step, best_step)
            if look:
                check_finite(losses)
                seen = loss_P.mean().item()
                progress(step, seen)
                if is_enough(step, seen) or step == steps:
                    break
            rows.grad = gradient.flatten(0, 1)
            stepper.step()
            scheduler.step()

    trace = torch.stack(losses).tolist()
    return OptimisedAnchors(best_x, trace, int(best_step), dict(zip(tau, best_P.tolist(), strict=True)))


def stopping_rule(stop_loss: float | None, patience: int | None) -> Callable[[int, float], bool]:
    """Whether a look at (step, loss) is the last one needed; it remembers the looks before."""
    best, since = float("inf"), 0

    def is_enough(step: int, loss: float) -> bool:
        nonlocal best, since
        if loss < 0.99 * best:
            best, since = loss, step
        return (stop_loss is not None and loss <= stop_loss) or (patience is not None and step - since >= patience)

    return is_enough


def check_finite(losses: list[Tensor]) -> None:
    """FloatingPointError naming the first of the last steps whose loss is NaN or Inf."""
    recent = torch.stack(losses[-CHECK_EVERY:])
    if not recent.isfinite().all():
        step = len(losses) - len(recent) + int((~recent.isfinite()).nonzero()[0])
        raise FloatingPointError(f"the matching loss is {losses[step].item()} at step {step}")
