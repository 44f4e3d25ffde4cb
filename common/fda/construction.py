"""Box 1 of the paper for one unit, a block and a task: optimise its anchors (Eq. 1). Also for several units at once.

Shapes: A anchors, T tokens, D width, P parameter tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.core.blocks import nonzero_tensors
from common.fda.batching import Measure, batched_matching_gradient
from common.fda.matching import MatchingProblem, matching_gradient, matching_value
from common.fda.precision import forward_in, in_precision

# Both work on the anchors unfolded to (A·T, D). Muon orthogonalises the step, so that no direction of D is left behind.
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "muon": partial(torch.optim.Muon, momentum=0.85, nesterov=False, weight_decay=0.0),
}
SCHEDULES = {"constant": lambda done: 1.0, "linear": lambda done: 1 - done}  # factor on lr, of the fraction done
CHECK_EVERY = 20  # steps between two checks of the loss: each check waits for the device
Progress = Callable[[int, float], None]
"""progress(step, loss) is called at every check."""


@dataclass(frozen=True)
class SearchSettings:
    """How anchors are searched for.

    Args:
        steps, lr, optimizer, schedule: of the optimisation; the schedule is a factor on lr.
        distance: between the outputs of the two models' blocks; a key of `DISTANCES`.
        stop_loss: end at a check whose mean loss is this or less; None: never.
        patience: end at a check when so many steps have not lowered the mean loss by 1 %; None: never.
        precision: of the matrix products: float32, tf32 or bf16.
        snapshots: steps of which x is kept, as it is before them.
    """

    steps: int
    lr: float
    optimizer: str = "adamw"
    schedule: str = "constant"
    distance: str = "cos"
    stop_loss: float | None = None
    patience: int | None = None
    precision: str = "float32"
    snapshots: tuple[int, ...] = ()


@dataclass(frozen=True)
class OptimisedAnchors:
    """The best anchors found, and how the matching loss went.

    x: (A, T, D). trace: mean loss over the tensors before each step and after the last one, steps done + 1 numbers, in
    the precision of the optimisation. best_step: index into `trace`. losses: loss of each tensor at `best_step`, in
    float32, its weight in it. snapshots: {step: x before it, on the CPU} of those asked for that the optimisation came
    to.
    """

    x: Tensor
    trace: list[float]
    best_step: int
    losses: dict[str, float]
    snapshots: dict[int, Tensor] = field(default_factory=dict)


def optimise_anchors(
    problem: MatchingProblem,
    x_init: Tensor,
    settings: SearchSettings,
    *,
    chunk: int | None = None,
    progress: Progress = lambda step, loss: None,
) -> OptimisedAnchors:
    """Minimise the sum of the matching losses over the anchors x (paper Eq. 1, Algorithm 1 box 1), from x_init on.

    Gradients are taken with respect to x alone, full batch, `chunk` anchors in memory at a time. Tensors with a task
    vector of zero are left out.
    Raises: FloatingPointError at the first step whose loss is not finite.
    """
    problem, forward = drop_zero_tensors(problem), forward_in(settings.precision)

    def measure(xs_ATD: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        with in_precision(settings.precision, x_init.device):
            how = {"distance": settings.distance, "chunk": chunk, "forward": forward}
            return [matching_gradient(problem, x_ATD, **how) for x_ATD in xs_ATD]

    optimizer = AnchorOptimizer(problem, x_init, settings, chunk=chunk, progress=progress)
    return run_optimizers([optimizer], measure)[0]


def optimise_together(
    problems: Sequence[MatchingProblem],
    x_inits: Sequence[Tensor],
    settings: SearchSettings,
    *,
    compiler: str = "eager",
    progress: Progress = lambda step, loss: None,
) -> list[OptimisedAnchors]:
    """What `optimise_anchors` finds, to rounding, for several tasks of one block, measured in one go (see `batching`).

    In memory are the anchors, θ_t and τ of all tasks. A batch holds experts that changed the same tensors; others get
    batches of their own.
    """
    problems = [drop_zero_tensors(problem) for problem in problems]
    found: dict[int, OptimisedAnchors] = {}
    for names in dict.fromkeys(tuple(problem.tau) for problem in problems):
        batch = [i for i, problem in enumerate(problems) if tuple(problem.tau) == names]
        optimizers = [AnchorOptimizer(problems[i], x_inits[i], settings, progress=progress) for i in batch]
        measure = batched_matching_gradient(
            [problems[i] for i in batch],
            distance=settings.distance,
            precision=settings.precision,
            compiler=compiler,
        )
        found |= zip(batch, run_optimizers(optimizers, measure), strict=True)
    return [found[i] for i in range(len(problems))]


def run_optimizers(optimizers: Sequence["AnchorOptimizer"], measure: Measure) -> list[OptimisedAnchors]:
    """Step all optimizers until each is done. `measure` takes the anchors of all; those of a finished one rest."""
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        while not all(optimizer.done for optimizer in optimizers):
            measured = measure([optimizer.x for optimizer in optimizers])
            for optimizer, (loss_P, gradient_ATD) in zip(optimizers, measured, strict=True):
                if not optimizer.done:
                    optimizer.update(loss_P, gradient_ATD)
    return [optimizer.best() for optimizer in optimizers]


class AnchorOptimizer:
    """The optimisation of one unit's anchors: it holds x and takes a step each time it is told loss and gradient there.

    Every CHECK_EVERY steps and at the last one the loss is checked: `progress` is told step and mean loss, and the
    optimisation is done at the last step, or earlier as `stop_loss` and `patience` say.
    The best x of all steps is kept. Where gradients are of a lower precision, every check computes the loss in float32,
    and the best x of the checks is kept: under a linear schedule that is nearly always the last.
    A task vector that is zero throughout leaves x as it is.

    Deviation: the anchors after the last step are scored too; the released code never looks at them.
    """

    def __init__(
        self,
        problem: MatchingProblem,
        x_init: Tensor,
        settings: SearchSettings,
        *,
        chunk: int | None = None,
        progress: Progress = lambda step, loss: None,
    ) -> None:
        self.settings, self.progress, self.names = settings, progress, list(problem.tau)
        self.exact_loss: Callable[[Tensor], Tensor] | None = None
        if settings.precision != "float32":
            self.exact_loss = partial(matching_value, problem, distance=settings.distance, chunk=chunk)
        rows = x_init.detach().flatten(0, 1).clone().requires_grad_()
        self.rows, self.x = rows, rows.view_as(x_init)
        self.optimizer = OPTIMIZERS[settings.optimizer]([rows], lr=settings.lr)
        self.step, self.losses = 0, list[Tensor]()
        self.best_x, self.best_step = x_init, torch.zeros((), dtype=torch.long, device=x_init.device)
        self.best_P = torch.full((len(self.names),), torch.inf, device=x_init.device, dtype=x_init.dtype)
        self.lowest, self.lowest_step = float("inf"), 0  # mean loss of a check that was 1 % below all before it
        self.done, self.snapshots = not self.names, dict[int, Tensor]()
        self.keep_snapshot()

    def update(self, loss_P: Tensor, gradient_ATD: Tensor) -> None:
        """Take in the matching loss at x and the gradient of its sum, and move x unless this was the last step."""
        self.losses.append(loss_P.mean())
        check = self.step % CHECK_EVERY == 0 or self.step == self.settings.steps
        if self.exact_loss is not None and check:
            loss_P = self.exact_loss(self.x)
        if self.exact_loss is None or check:
            self.keep_better(loss_P)
        if check:
            check_finite(self.losses)
            loss = loss_P.mean().item()
            self.progress(self.step, loss)
            self.done = self.is_enough(loss) or self.step == self.settings.steps
        if not self.done:
            self.move(gradient_ATD)

    @torch.no_grad()
    def keep_better(self, loss_P: Tensor) -> None:
        """Keep x if it is the best so far, without waiting for the device."""
        better = loss_P.sum() < self.best_P.sum()
        self.best_x, self.best_P = torch.where(better, self.x, self.best_x), torch.where(better, loss_P, self.best_P)
        self.best_step = torch.where(better, self.step, self.best_step)

    def is_enough(self, loss: float) -> bool:
        """Whether `stop_loss` or `patience` ends the optimisation at a check with this mean loss."""
        settings = self.settings
        if loss < 0.99 * self.lowest:
            self.lowest, self.lowest_step = loss, self.step
        low_enough = settings.stop_loss is not None and loss <= settings.stop_loss
        return low_enough or (settings.patience is not None and self.step - self.lowest_step >= settings.patience)

    def move(self, gradient_ATD: Tensor) -> None:
        """One step of the optimizer along the gradient."""
        settings = self.settings
        self.rows.grad = gradient_ATD.flatten(0, 1)
        self.optimizer.param_groups[0]["lr"] = settings.lr * SCHEDULES[settings.schedule](self.step / settings.steps)
        self.optimizer.step()
        self.step += 1
        self.keep_snapshot()

    def keep_snapshot(self) -> None:
        """Keep x as it is before the step that comes, if that was asked for."""
        if self.step in self.settings.snapshots:
            self.snapshots[self.step] = self.x.detach().to("cpu", copy=True)

    def best(self) -> OptimisedAnchors:
        """What was found."""
        trace = torch.stack(self.losses).tolist() if self.losses else []
        losses = dict(zip(self.names, self.best_P.tolist(), strict=True))
        return OptimisedAnchors(self.best_x, trace, int(self.best_step), losses, self.snapshots)


def drop_zero_tensors(problem: MatchingProblem) -> MatchingProblem:
    """The problem of matching only those tensors whose task vector is not zero: the others have no direction."""
    return replace(problem, tau=nonzero_tensors(problem.tau))


def check_finite(losses: Sequence[Tensor]) -> None:
    """Raises: FloatingPointError naming the first of the last CHECK_EVERY steps whose loss is NaN or Inf."""
    recent = torch.stack(list(losses[-CHECK_EVERY:]))
    if not recent.isfinite().all():
        step = len(losses) - len(recent) + int((~recent.isfinite()).nonzero()[0])
        raise FloatingPointError(f"the matching loss is {losses[step].item()} at step {step}")
