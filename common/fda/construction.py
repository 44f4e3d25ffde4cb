"""Box 1 of the paper, one unit of it: optimise the anchors of one block for one task."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.core.blocks import Block, moved
from common.core.task_vectors import Params
from common.fda.batching import batched_matching_gradient
from common.fda.matching import matching_gradient, matching_value
from common.fda.precision import answers_in, in_precision

# Both work on the anchors unfolded to (A·T, D). Muon orthogonalises the step, so that no direction of D is left behind.
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "muon": partial(torch.optim.Muon, momentum=0.85, nesterov=False, weight_decay=0.0),
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


@dataclass(frozen=True)
class Unit:
    """One block for one task: the expert's θ_t, the tensors to match and their directions τ, the first x (A, T, D), and
    what the block sees added to x: (T, D), or 0."""

    theta_t: Params
    tau: Params
    x_init: Tensor
    offset: Tensor | float = 0.0

    def without_rest(self) -> "Unit":
        """The same with none but the tensors that moved in τ."""
        return replace(self, tau=moved(self.tau))

    def ask(self, measure: Callable[..., Any], block: Block, theta_0: Params, x_ATD: Tensor, **how: Any) -> Any:
        """What a function of `matching` says of this unit at x."""
        return measure(block, theta_0, self.theta_t, self.tau, x_ATD + self.offset, **how)


Search = Generator[Tensor, tuple[Tensor, Tensor], OptimisedAnchors]
"""Yields anchors x, and is sent what was measured there: the matching loss (P,) and its gradient (A, T, D)."""


def optimise_anchors(
    block: Block,
    theta_0: Params,
    unit: Unit,
    *,
    distance: str = "cos",
    chunk: int | None = None,
    precision: str = "float32",
    **how: Any,
) -> OptimisedAnchors:
    """Minimise the sum of the matching losses over the anchors x (paper Eq. 1, Algorithm 1 box 1) by `search`.

    Gradients are taken with respect to x alone, full batch, `chunk` anchors in memory at a time. Tensors that did not
    move are left out.
    Raises: FloatingPointError at the first step whose loss is not finite.
    """
    unit, settings = unit.without_rest(), {"distance": distance, "chunk": chunk}
    answers = answers_in(precision)

    def measure(xs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        with in_precision(precision, xs[0].device):
            return [unit.ask(matching_gradient, block, theta_0, x, answers=answers, **settings) for x in xs]

    value = partial(unit.ask, matching_value, block, theta_0, **settings)
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        return in_step([search(unit, None if precision == "float32" else value, **how)], measure)[0]


def optimise_together(
    block: Block,
    theta_0: Params,
    units: Sequence[Unit],
    *,
    distance: str = "cos",
    precision: str = "float32",
    compiler: str = "eager",
    **how: Any,
) -> list[OptimisedAnchors]:
    """`optimise_anchors` of several tasks of one block, measured in one go (see `batching`): the same to rounding.

    In memory are the anchors, θ_t and τ of all. Experts that moved unlike sets of tensors are not mixed.
    """
    units = [unit.without_rest() for unit in units]
    found: dict[int, OptimisedAnchors] = {}
    with sdpa_kernel(SDPBackend.MATH):
        for names in dict.fromkeys(tuple(unit.tau) for unit in units):
            alike = {i: unit for i, unit in enumerate(units) if tuple(unit.tau) == names}
            values = [partial(unit.ask, matching_value, block, theta_0, distance=distance) for unit in alike.values()]
            searches = [
                search(unit, None if precision == "float32" else value, **how)
                for unit, value in zip(alike.values(), values, strict=True)
            ]
            measure = batched_matching_gradient(
                block,
                theta_0,
                [(unit.theta_t, unit.tau, unit.offset) for unit in alike.values()],
                distance=distance,
                precision=precision,
                compiler=compiler,
            )
            found |= zip(alike, in_step(searches, measure), strict=True)
    return [found[i] for i in range(len(units))]


def in_step(
    searches: Sequence[Search], measure: Callable[[Sequence[Tensor]], Sequence[tuple[Tensor, Tensor]]]
) -> list[OptimisedAnchors]:
    """Run searches side by side to their ends. `measure` takes the anchors of all; those at their end rest."""
    found: dict[int, OptimisedAnchors] = {}
    xs: dict[int, Tensor] = {}
    measured: Sequence[Any] = [None] * len(searches)  # the first thing sent to a generator
    while len(found) < len(searches):
        for i, one in enumerate(searches):
            if i not in found:
                try:
                    xs[i] = one.send(measured[i])
                except StopIteration as end:
                    found[i] = end.value
        if len(found) < len(searches):
            measured = measure([xs[i] for i in range(len(searches))])
    return [found[i] for i in range(len(searches))]


def search(
    unit: Unit,
    value: Callable[[Tensor], Tensor] | None,
    *,
    steps: int,
    lr: float,
    optimizer: str = "adamw",
    schedule: str = "constant",
    stop_loss: float | None = None,
    patience: int | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Search:
    """The optimisation of one unit, which leaves it to the caller to measure loss and gradient.

    Every CHECK_EVERY steps and at the last is a look: `progress` is told step and mean loss, and the search ends where
    that is at most `stop_loss`, or was last 1 % better than all before it `patience` or more steps ago.
    The best x of all steps is kept. Where gradients are of a lower precision, `value` gives the loss (P,) in float32;
    then every look asks it, and the best x of the looks is kept: a linear schedule nearly always makes that the last.
    A task vector that is zero throughout leaves x as it is.

    Deviation: the anchors after the last step are scored too; the released code never looks at them.
    """
    x_init, tau = unit.x_init, unit.tau
    if not tau:
        return OptimisedAnchors(x_init, [], 0, {})
    rows = x_init.detach().flatten(0, 1).clone().requires_grad_()
    stepper = OPTIMIZERS[optimizer]([rows], lr=lr)
    best_P = torch.full((len(tau),), torch.inf, device=x_init.device, dtype=x_init.dtype)
    best_x, best_step = x_init, torch.zeros((), dtype=torch.long, device=x_init.device)
    losses, is_enough = [], stopping_rule(stop_loss, patience)

    for step in range(steps + 1):
        x, look = rows.view_as(x_init), step % CHECK_EVERY == 0 or step == steps
        loss_P, gradient_ATD = yield x
        losses.append(loss_P.mean())
        if value and look:
            loss_P = value(x)
        if look or not value:
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
        rows.grad = gradient_ATD.flatten(0, 1)
        stepper.param_groups[0]["lr"] = lr * SCHEDULES[schedule](step / steps)
        stepper.step()

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
