"""What the work would take on one H100, on paper: its hours, what bounds them, and the bytes that are stored and moved.

Nothing of it is measured. A step takes the longest of three: its operations, its tensors' way to and from the card's
memory, each kernel by itself, and the kernels' beginnings. Cards work side by side without a word to each other, for a
unit is made by itself: n of them take an n-th of the hours and move the same bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from common.config import Config
from common.core.blocks import Block, BlockFamily, BlockModule
from common.fda.adaptation import shortened
from common.fda.matching import DISTANCES
from common.planning.cost import GIB, Ledger, Work, arithmetic, blank, cost_of_step, largest_of

# NVIDIA's data sheet of the H100 SXM: without sparsity; float32 is that of plain cores, tf32 and bf16 of tensor cores.
PEAK = {"float32": 67e12, "tf32": 494.7e12, "bf16": 989.4e12}  # operations a second
BANDWIDTH = 3.35e12  # bytes a second
SHARE = 0.4  # of both that is had; assumed
LAUNCH = 5e-6  # seconds from one kernel to the next; assumed
DISK = 1e9  # bytes a second from where the checkpoints are; assumed


@dataclass(frozen=True)
class Bytes:
    """The sizes that a plan is made of: of a model and of all its blocks as stored, and of the anchors of all units."""

    model: int
    blocks: int
    anchors: int


def hours_of(work: Work, precision: str) -> dict[str, float]:
    """Hours by what bounds them."""
    seconds = {
        "arithmetic": work.operations / (SHARE * PEAK[precision]),
        "memory": work.moved / (SHARE * BANDWIDTH),
        "launches": work.launches * LAUNCH,
    }
    return {what: each / 3600 for what, each in seconds.items()}


def hours_in_words(work: Work, read: float, precision: str) -> str:
    """GPU hours, what bounds them, and the hours of each by itself."""
    hours = hours_of(work, precision) | {"reading": read / DISK / 3600}
    bound = max(hours, key=lambda what: hours[what])
    each = ", ".join(f"{what} {alone:.3g}" for what, alone in hours.items())
    return f"{hours[bound]:.3g} GPU hours in {precision}, bounded by {bound}: {each}"


def all_of_construction(
    config: Config, family: BlockFamily, kinds: Sequence[Sequence[BlockModule]], shape: tuple[int, int, int], how: str
) -> Work:
    """The work of every unit of all blocks, in a precision."""
    work = Work()
    for group in kinds:
        module = group[0].module
        step = cost_of_step(family.pure(module), module, shape, config, how)[0]
        work += step * (len(group) * len(config.tasks) * (config.anchors.steps + 1))
    return work


def work_of_fit(block: Block, module: nn.Module, batch: tuple[int, int, int], config: Config) -> Work:
    """Work of an adaptation step on a batch of this shape; what the optimiser does is not counted."""
    settings = config.adapt.for_start(config.start.method)
    params = {name: p.requires_grad_() for name, p in blank(dict(module.named_parameters())).items()}
    with Ledger() as ledger:
        x_ATD, y_ATD = (torch.empty(batch, device="meta") for _ in range(2))
        DISTANCES[settings.distance](block(params, x_ATD), y_ATD).backward()
    return ledger.work


def all_of_adaptation(
    config: Config, family: BlockFamily, kinds: Sequence[Sequence[BlockModule]], shape: tuple[int, int, int]
) -> Work:
    """The work of the fit of all blocks."""
    settings = config.adapt.for_start(config.start.method)
    rows, epochs = len(config.tasks) * shape[0], shortened(settings.epochs, settings.speedup)
    batch = min(settings.batch_size, rows)
    work = Work()
    for group in kinds:
        module = group[0].module
        step = work_of_fit(family.pure(module), module, (batch, *shape[1:]), config)
        work += step * (len(group) * epochs * math.ceil(rows / batch))
    return work


def all_of_fine_tuning(
    config: Config, family: BlockFamily, modules: Sequence[BlockModule], batch: tuple[int, int, int], updates: int
) -> Work:
    """The work of so many updates of all blocks, of one expert on a batch of this shape; what is around them, and what
    the optimiser does, is not counted."""
    work = Work()
    for _, module in modules:
        work += work_of_fit(family.pure(module), module, batch, config) * updates
    return work


def on_paper(
    config: Config,
    family: BlockFamily,
    kinds: Sequence[Sequence[BlockModule]],
    shape: tuple[int, int, int],
    sizes: Bytes,
) -> dict[str, str]:
    """Rows on hours, storage and traffic. Each stage reads a weight once, as it is stored, and anchors in float32."""
    models, blocks = 1 + len(config.tasks), sum(map(len, kinds))
    share = len(config.run.blocks or range(blocks)) / blocks
    how = arithmetic(config, largest_of(kinds), shape, torch.device("cuda"))
    construction = all_of_construction(config, family, kinds, shape, how) * share
    adaptation = all_of_adaptation(config, family, kinds, shape) * share
    fitted = sizes.blocks * 4 / getattr(torch, config.model.dtype or "float32").itemsize  # in float32, until joined
    moved = {
        "construct": (models * sizes.blocks, sizes.anchors),
        "merge": (models * sizes.model, sizes.model),
        "adapt": ((models + 1) * sizes.blocks + sizes.anchors, fitted + sizes.model),
    }
    said = (
        f"{what} reads {read / GIB:,.1f} GiB, writes {written / GIB:,.1f}" for what, (read, written) in moved.items()
    )
    stored = {"checkpoints": models * sizes.model, "anchors": sizes.anchors, "a merged model": sizes.model}
    assumed = f"{SHARE:.0%} of peak and bandwidth, {LAUNCH * 1e6:.0f} µs a kernel, {DISK / 1e9:.0f} GB/s read"
    return {
        "H100, construct": hours_in_words(construction, moved["construct"][0], how),
        "H100, adapt": hours_in_words(adaptation, moved["adapt"][0], "float32"),
        "H100, on paper": f"{assumed}; nothing of it is measured",
        "stored": ", ".join(f"{what} {size / GIB:,.1f} GiB" for what, size in stored.items()),
        "moved": "; ".join(said),
    }
