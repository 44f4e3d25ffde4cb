"""What a merge method that uses data sees of a task: unlabelled inputs, and the model as pure functions of its weights.

    answer(θ, batch) -> logits      the merged tensors θ under their names in the checkpoint; the task's head is fixed
    enter(θ, batch) -> entrance     what reaches the first block
    block(θₗ, entrance) -> y_ATD    one block, θₗ under the names within it; what is behind x_ATD is the same for all

A domain makes one for each task, see `probe` in Vision/domain.py. All functions have derivatives.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.core.blocks import BlockFamily
from common.core.task_vectors import Params

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class BlockInputs:
    """What a model calls a block with: x_ATD, and everything behind it (masks)."""

    x_ATD: Tensor
    others: tuple
    named: Mapping[str, Any]


@dataclass(frozen=True)
class CalibrationTask:
    """A task's inputs and its model. prefixes: beginning of the names of each block's tensors, in order.

    batches: may be gone through repeatedly; made anew each time, so that they need not all be in memory.
    """

    answer: Callable[[Params, Batch], Tensor]
    enter: Callable[[Params, Batch], BlockInputs]
    block: Callable[[Params, BlockInputs], Tensor]
    prefixes: Sequence[str]
    batches: Iterable[Batch]
    examples: int


def _never(*_: object) -> Any:
    raise AssertionError("a task without inputs is asked nothing")


NO_CALIBRATION = CalibrationTask(
    _never, _never, _never, prefixes=(), batches=(), examples=0
)  # goes with a model of no tensors


class _Reached(Exception):
    """Ends a forward pass where the first block begins."""


def calibration_task_of(
    model: nn.Module,
    family: BlockFamily,
    batches: Iterable[Batch],
    examples: int,
    device: torch.device,
    prefix: str = "",
    logits: Callable[[Any], Tensor] = lambda output: output,
) -> CalibrationTask:
    """A probe of a model that is called with a batch's tensors by name; its merged tensors may be without memory.

    prefix: what precedes the names of the checkpoint in the model. logits: from what the model returns.
    """
    modules = family.modules(model.get_submodule(prefix.removesuffix(".")))
    first, names = modules[0], {name for name, _ in model.eval().named_parameters()}

    def run(theta: Params, batch: Batch) -> Any:
        named = {prefix + name: p for name, p in theta.items() if prefix + name in names}
        return functional_call(model, named, kwargs={key: x.to(device) for key, x in batch.items()})

    def enter(theta: Params, batch: Batch) -> BlockInputs:
        seen: list[BlockInputs] = []

        def stop(module: nn.Module, args: tuple, named: dict) -> None:
            seen.append(BlockInputs(args[0], args[1:], named))
            raise _Reached

        with first.register_forward_pre_hook(stop, with_kwargs=True), suppress(_Reached):
            run(theta, batch)
        return seen[0]

    def block(theta: Params, entrance: BlockInputs) -> Tensor:
        y = functional_call(first, dict(theta), (entrance.x_ATD, *entrance.others), dict(entrance.named))
        return y[0] if isinstance(y, tuple) else y

    prefixes = [family.prefix(index) for index in range(len(modules))]
    return CalibrationTask(lambda theta, batch: logits(run(theta, batch)), enter, block, prefixes, batches, examples)


def part(theta: Params, prefix: str) -> dict[str, Tensor]:
    """The tensors of one block, under the names within it."""
    return {name.removeprefix(prefix): p for name, p in theta.items() if name.startswith(prefix)}


@torch.no_grad()
def first_block_inputs(probe: CalibrationTask, theta: Params) -> list[BlockInputs]:
    """What reaches the first block of a model, batch by batch."""
    return [probe.enter(theta, batch) for batch in probe.batches]


@torch.no_grad()
def next_block_inputs(probe: CalibrationTask, theta: Params, flow: Sequence[BlockInputs]) -> list[BlockInputs]:
    """What reaches the next block of a model, θ being that of this one."""
    return [replace(entrance, x_ATD=probe.block(theta, entrance)) for entrance in flow]
