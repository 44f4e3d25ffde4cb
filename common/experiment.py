"""An experiment with its inputs open and checked: what every stage needs before it begins."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from common.config import Config
from common.core.blocks import Block, BlockFamily, nonzero_tensors
from common.core.errors import InputError
from common.core.fused import fuse, fused_block, fused_tensors
from common.core.task_vectors import Params, require_same_shapes, subtract
from common.fda.adaptation import FitSettings, shortened
from common.fda.anchors import SCALES
from common.io.checkpoints import Checkpoint
from common.io.heads import open_like
from common.io.matched import Matching
from common.io.tensors import WHOLE, in_rows, with_size
from common.io.unread import settle_unread, with_copies
from common.io.unstacked import unstacked
from common.io.written import computed_as
from common.merging.starts import hyper_of

# What steps take, measured with the toys: passes of a matching step and of one of a fit, in products of a pass forward;
# seconds besides the products; multiplications a second of one core.
MATCHING, FIT, STEP, RATE = 14, 4, 2e-3, 4e10
ROWS = 2**20  # weights of the rows of a tensor that are worked on at a time, where none hangs on others

Unit = tuple[int, tuple[str, ...]]
"""What anchors are made for in one go: a block, and one task or all."""


@dataclass(frozen=True)
class Experiment:
    """Everything open: headers read, names and shapes compared, no weight in memory yet.

    functions: each block as a pure function. prefixes: how the names of each block's tensors begin. shape: (A, T, D) of
    the anchors of one task and block. matching: which row of an expert's embedding is which of the merged model's.
    """

    config: Config
    family: BlockFamily
    functions: tuple[Block, ...]
    prefixes: tuple[str, ...]
    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    shape: tuple[int, int, int]
    device: torch.device
    matching: Matching

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.prefixes)

    @property
    def blocks(self) -> list[int]:
        """Indices of the blocks to work on."""
        return list(range(self.depth)) if self.config.run.blocks is None else sorted(set(self.config.run.blocks))

    @cached_property
    def computed_as(self) -> dict[str, Any]:
        """What says how the layers compute besides their weights, read once: every file of anchors says it."""
        return computed_as(self.config.model)

    @property
    def largest_product(self) -> int:
        """Multiplications of the largest matrix product of a block, over a task's anchors or a batch of adaptation."""
        anchors, tokens, _ = self.shape
        rows = tokens * max(anchors, self.config.adapt.for_start(self.config.start.method).batch_size)
        return rows * max((size for sizes in self.matrices.values() for size in sizes), default=0)

    @property
    def matrices(self) -> dict[str, list[int]]:
        """{prefix: number of weights of every matrix} of one block of each kind: blocks can be thousands."""
        kinds = dict(zip(self.functions, self.prefixes, strict=True)).values()
        shapes = {prefix: self.base.shapes_under(prefix).values() for prefix in kinds}
        return {prefix: [math.prod(s) for s in of_kind if len(s) == 2] for prefix, of_kind in shapes.items()}

    @property
    def construct_seconds(self) -> float:
        """What the anchors of a unit take on one core, roughly: no more hangs on it than where the work is done."""
        tasks = 1 if self.config.anchors.together == "no" else len(self.experts)
        return tasks * self.config.anchors.steps * self.step_seconds(MATCHING * self.shape[0])

    @property
    def adapt_seconds(self) -> float:
        """What the adaptation of a block takes on one core, roughly."""
        fit = self.config.adapt.for_start(self.config.start.method)
        batches = math.ceil(len(self.experts) * self.shape[0] / fit.batch_size)
        return shortened(fit.epochs, fit.speedup) * batches * self.step_seconds(FIT * fit.batch_size)

    def step_seconds(self, anchors: int) -> float:
        """A step, whose products are those of so many anchors on their way through the largest block."""
        return STEP + max(map(sum, self.matrices.values())) * anchors * self.shape[1] / RATE

    def read(self, checkpoint: Checkpoint, names: Iterable[str]) -> Params:
        """The named tensors, on the device."""
        return {name: p.to(self.device) for name, p in checkpoint.read(names).items()}

    def rows_of(self, name: str) -> list[slice]:
        """Rows of a tensor, a part after the other, where all models store it as it is merged; else all of it."""
        if not all(each.has_rows(name) for each in (self.base, *self.experts.values())):
            return [WHOLE]
        return in_rows(tuple(self.base.shapes[name]), ROWS)

    def read_rows(self, checkpoint: Checkpoint, name: str, rows: slice) -> Tensor:
        """One tensor, or some of its rows, on the device."""
        if rows == WHOLE:
            return self.read(checkpoint, [name])[name]
        return checkpoint.read_rows(name, rows).to(self.device)

    def read_block(self, checkpoint: Checkpoint, index: int) -> Params:
        """θ of one block, on the device, under the names it has within the block."""
        prefix = self.prefixes[index]
        return {n.removeprefix(prefix): p for n, p in self.read(checkpoint, checkpoint.names(prefix)).items()}

    @property
    def units(self) -> list[Unit]:
        """Every block with every task, or with all of anchors.together; those of a block one after the other."""
        tasks = tuple(self.experts)
        sets = [tasks] if self.config.anchors.together != "no" else [(task,) for task in tasks]
        return [(index, some) for index in self.blocks for some in sets]

    def read_units(self, units: Iterable[Unit]) -> Iterator[tuple[int, Params, dict[str, Params]]]:
        """For every unit: block, θ₀, {task: θ_t}, on the device. Each weight is read once if blocks come in turn."""
        last, theta_0 = None, {}
        for index, tasks in units:
            theta_0 = theta_0 if index == last else self.read_block(self.base, index)
            last = index
            yield index, theta_0, {task: self.read_block(self.experts[task], index) for task in tasks}

    def rest_names(self) -> list[str]:
        """Names of the merged tensors that lie outside the anchored blocks."""
        return [name for name in self.base.names(self.family.scope) if not name.startswith(self.prefixes)]

    def task_vector(self, task: str, theta_0: Params, theta_t: Params) -> Params:
        """τ of one block without what cannot be matched; InputError if the expert differs from the base nowhere."""
        tau = subtract(theta_t, theta_0)
        if not nonzero_tensors(tau) and not any(
            nonzero_tensors(subtract(self.read_block(self.experts[task], i), self.read_block(self.base, i)))
            for i in range(self.depth)
        ):
            raise InputError(
                f"the expert of {task}, {self.experts[task].path}, equals the base in every "
                "anchored block; it can still be merged: scripts/merge.py"
            )
        return self.family.without_null_gradients(tau) if self.config.anchors.skip_null_gradients else tau

    def matched(self, theta: Params) -> Params:
        """θ or τ of a block as the matching loss has it: with model.fuse_qkv, q, k and v are one tensor."""
        return fuse(theta, fused_tensors(theta)) if self.config.model.fuse_qkv else theta

    def matched_function(self, index: int, theta: Params) -> Block:
        """A block as a function of what `matched` makes of its θ."""
        block = self.functions[index]
        return fused_block(block, fused_tensors(theta)) if self.config.model.fuse_qkv else block

    def require_moved_blocks(self) -> None:
        """InputError on an expert whose headers tell that it differs from the base in no anchored block."""
        for task, expert in self.experts.items():
            if not any(map(expert.touches, self.prefixes)):
                where = f"none of {self.prefixes[0]} to {self.prefixes[-1]}"
                hint = "so no anchors can be made for it; scripts/merge.py merges it all the same"
                raise InputError(f"the expert of {task}, {expert.path}, changes {where}, {hint}")

    def given_start(self) -> Checkpoint:
        """The checkpoint that start.checkpoint names; InputError if it does not fit the base."""
        path = self.config.start.path
        start = open_like(self.base, path, self.family.names, self.family.vocabulary)
        base = Checkpoint(self.base.path, self.family.names)
        settle_unread(base, [start], self.family.unread)
        start = unstacked(start, self.family.pieces)
        if self.config.model.vocabulary != "refuse":
            by_token = with_copies(self.family.by_token, base, self.family.unread)
            axes = {n: axis for n, axis in by_token.items() if n in start.shapes and n in self.base.shapes}
            start.resize({n: with_size(start.shapes[n], axis, self.base.shapes[n][axis]) for n, axis in axes.items()})
        if self.family.before_head and not self.base.names(self.family.before_head):
            for name in start.names(self.family.before_head):  # left to the heads; a merge that we wrote has it again
                start.drop(name)
        scope = self.family.scope
        require_same_shapes(start.shapes_under(scope), self.base.shapes_under(scope), str(start.path))
        return start

    def hyper(self, method: str) -> dict[str, Any]:
        """All hyperparameters of a start, as `merge` takes them: its defaults, and over them the config's."""
        return hyper_of(method, self.config.start.hyper, defaults=True)

    def fit_settings(self) -> FitSettings:
        """How blocks are fitted from start.method."""
        adapt = self.config.adapt.for_start(self.config.start.method)
        return FitSettings(adapt.distance, adapt.lr, adapt.epochs, adapt.batch_size, adapt.speedup)

    def positions(self, task: str) -> Tensor:
        """What is added to the anchors of a task before a block sees them, on the device: 0, or with
        anchors.position_embeddings rows 0 to T - 1 of the expert's position embeddings, (T, D).

        The anchors are optimised without them and stored with them, as in the released files: adaptation adds nothing.
        """
        if not self.config.anchors.position_embeddings:
            return torch.zeros((), device=self.device)
        return self.read(self.experts[task], [self.family.positions])[self.family.positions][: self.shape[1]]

    def anchor_scale(self) -> float:
        """Factor on the initial anchors."""
        scale = self.config.anchors.scale
        return SCALES[self.config.anchors.init] if scale is None else scale
