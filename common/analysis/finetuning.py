"""A small fine-tuning of a whole model on one task, and the updates that it makes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.core.seeding import seeded
from common.core.task_vectors import Params, as_leaf_tensors
from common.merging.calibration import LabelledTask

DECAY, LONGEST = 0.1, 1.0  # weight decay and the norm that gradients are cut to, of those who made the paper's experts


def update_vectors(
    task: LabelledTask,
    theta: Params,
    parts: Sequence[Sequence[str]],
    *,
    updates: int,
    batch: int,
    lr: float,
    seed: int,
    label: str,
    progress: Callable[[float, float], None] = lambda share, loss: None,
) -> list[Tensor]:
    """Fine-tune every tensor of θ with AdamW on the task, and keep what each update does to some tensors.

    Args:
        task: the labelled examples; each epoch takes them in an order drawn by `seed` and `label`.
        parts: names of tensors, a list for each part that is looked at by itself.
        updates, batch, lr: how many, of how many examples each, at which constant rate.
        progress: is told after each which share of them is done, and the loss before it.

    Returns: for each part its update vectors Δw_j, (updates, weights of the part), in float32.
    """
    theta = as_leaf_tensors({name: p.clone() for name, p in theta.items()})
    optimizer = torch.optim.AdamW(theta.values(), lr=lr, weight_decay=DECAY)
    sizes = [sum(theta[name].numel() for name in part) for part in parts]
    device = next(iter(theta.values())).device
    kept, order = [torch.empty(updates, size, device=device) for size in sizes], torch.empty(0, dtype=torch.long)
    generator = seeded(seed, "fine-tuning", label)
    for j in range(updates):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(task.examples, generator=generator)])
        before = [flat(theta, part) for part in parts]
        optimizer.zero_grad()
        loss = task.loss(theta, task.batch(order[:batch].tolist()))
        loss.backward()
        order = order[batch:]
        torch.nn.utils.clip_grad_norm_([p for p in theta.values() if p.grad is not None], LONGEST)
        optimizer.step()
        for row, was, part in zip(kept, before, parts, strict=True):
            row[j] = flat(theta, part) - was
        progress((j + 1) / updates, loss.item())
    return kept


def flat(theta: Params, names: Sequence[str]) -> Tensor:
    """The named tensors as one vector, outside any graph."""
    return torch.cat([theta[name].detach().flatten() for name in names])
