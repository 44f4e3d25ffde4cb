"""Expert Merging: one coefficient for each task and tensor, trained to answer as each expert does on few inputs.

θ = θ₀ + Σᵢ σ(xᵢₗ) τᵢₗ for every parameter tensor l. On the inputs of task i, with p of the expert θ₀ + τᵢ and q of θ,
    − Σ softmax(p) log softmax(q), the mean over inputs
    + `hidden` times the mean over the blocks of the mean square of what they put out, less what the expert's do
    + `anchor` times the sum over the tasks of the mean over the tensors of |σ(xᵢₗ) − λ|
is minimised, λ the coefficients' first value. The inputs of all tasks take turns, eight in a step.

Source: "Expert Merging: model merging with unsupervised expert alignment and importance-guided layer chunking"
(arXiv 2509.25712), and its code. Defaults: λ 0.1, 5 inputs of each task, once, lr 0.5, anchor 5, hidden 1, theirs.
Deviation: which optimiser and which blocks' outputs they take was not verified: Adam, and all. Gradients longer than 1
are cut, as theirs. Expert Merging++, more coefficients in important layers, is left out. A regression has mean square
error. Their models leave out norms, biases and embeddings; here every tensor has a coefficient.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from common.core.errors import InputError
from common.core.task_vectors import Params, add
from common.merging.calibration import Batch, CalibrationTask, block_params
from common.merging.tensorwise import require_examples, total
from common.run.progress import counted

TURNS = 8  # inputs in a step
LONGEST = 1.0  # norm of a gradient


def expert_merging(
    base: Params,
    deltas: Sequence[Params],
    calibration: Sequence[CalibrationTask],
    *,
    examples: int = 5,
    initial: float = 0.1,
    hidden: float = 1.0,
    anchor: float = 5.0,
    lr: float = 0.5,
    epochs: int = 1,
    seed: int = 0,
) -> Params:
    """The delta with trained coefficients; `seed` draws which inputs are used, `examples` of each task."""
    require_examples("expert_merging", examples)
    if not 0 < initial < 1 or lr <= 0 or epochs < 0 or min(hidden, anchor) < 0:
        raise InputError(
            "expert_merging: initial in (0, 1), lr > 0, epochs, hidden and anchor ≥ 0 are needed: "
            f"{initial}, {lr}, {epochs}, {hidden}, {anchor}"
        )
    if not base:
        return {}
    x = {name: torch.logit(theta.new_full((len(deltas),), initial)).requires_grad_() for name, theta in base.items()}
    adam = torch.optim.Adam(x.values(), lr=lr)
    inputs = [(i, batch) for i, task in enumerate(calibration) for batch in task.batches]
    turns = sorted(range(len(inputs)), key=lambda k: (sum(i == inputs[k][0] for i, _ in inputs[:k]), inputs[k][0]))
    for _ in range(epochs):
        for first in counted(range(0, len(turns), TURNS), "steps"):
            group = turns[first : first + TURNS]
            adam.zero_grad()
            for k in group:
                i, batch = inputs[k]
                theta = add(base, combined(x, deltas))
                loss = disagreement(calibration[i], add(base, deltas[i]), theta, batch, hidden)
                apart = [(each.sigmoid() - initial).abs().sum() for each in x.values()]
                ((loss + anchor * torch.stack(apart).sum() / len(apart)) / len(group)).backward()
            torch.nn.utils.clip_grad_norm_(list(x.values()), LONGEST)
            adam.step()
    with torch.no_grad():
        return combined(x, deltas)


def combined(x: Params, deltas: Sequence[Params]) -> dict[str, Tensor]:
    """Σᵢ σ(xᵢₗ) τᵢₗ."""
    return {
        name: total(lam * delta[name] for lam, delta in zip(each.sigmoid(), deltas, strict=True))
        for name, each in x.items()
    }


def disagreement(task: CalibrationTask, expert: Params, theta: Params, batch: Batch, hidden: float) -> Tensor:
    """How far the merged model's answers, and its blocks' outputs, are from the expert's on one batch."""
    with torch.no_grad():
        wanted_AC = task.answer(expert, batch)
    logits_AC = task.answer(theta, batch)
    if logits_AC.shape[1] > 1:
        loss = -(wanted_AC.softmax(1) * logits_AC.log_softmax(1)).sum(1).mean()
    else:
        loss = mse_loss(logits_AC, wanted_AC)
    if hidden and task.prefixes:
        with torch.no_grad():
            targets = outputs(task, expert, batch)
        gaps = [mse_loss(y, target) for y, target in zip(outputs(task, theta, batch), targets, strict=True)]
        loss = loss + hidden * torch.stack(gaps).mean()
    return loss


def outputs(task: CalibrationTask, theta: Params, batch: Batch) -> list[Tensor]:
    """What each block puts out, in order."""
    entrance, found = task.embed(theta, batch), []
    for prefix in task.prefixes:
        found.append(task.block(block_params(theta, prefix), entrance))
        entrance = replace(entrance, x_ATD=found[-1])
    return found
