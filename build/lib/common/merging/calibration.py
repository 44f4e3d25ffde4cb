"""What a merge method that uses data is given of a task: unlabelled inputs, and the model as functions of its weights.

    answer(θ, batch) -> logits      θ: the merged tensors under their names in the checkpoint; the task's head is fixed
    features(θ, batch) -> z         what the task's head is given
    embed(θ, batch) -> inputs       what the model calls its first block with
    block(θₗ, inputs) -> y_ATD      any block, θₗ under the names within it: all blocks are called with the same masks

A domain makes one for each task, see `calibration_task` in Vision/domain.py. All functions can be differentiated.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.core.blocks import BlockFamily
from common.core.task_vectors import Params

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class BlockInputs:
    """The arguments that a model calls a block with: x_ATD first, then the other positional and the named ones."""

    x_ATD: Tensor
    others: tuple
    named: Mapping[str, Any]


def _without_inputs(*_: object) -> Any:
    raise AssertionError("a task without inputs was asked for an answer")


@dataclass(frozen=True)
class CalibrationTask:
    """A task's inputs and its model.

    answer, features, embed, block: see the head of this file.
    prefixes: how the names of each block's tensors begin, in the order of the blocks.
    batches: can be passed over several times; each pass may load them anew, so that they need not all be in memory.
    examples: how many inputs there are in all batches.
    """

    answer: Callable[[Params, Batch], Tensor]
    embed: Callable[[Params, Batch], BlockInputs]
    block: Callable[[Params, BlockInputs], Tensor]
    prefixes: Sequence[str]
    batches: Iterable[Batch]
    examples: int
    features: Callable[[Params, Batch], Tensor] = _without_inputs


NO_CALIBRATION = CalibrationTask(  # for a model of no tensors, on which hyperparameters are checked
    _without_inputs, _without_inputs, _without_inputs, prefixes=(), batches=(), examples=0
)


@dataclass(frozen=True)
class LabelledTask:
    """Labelled examples of a task, and the loss that its model is fine-tuned with.

    loss(θ, batch) -> the mean over a batch, which can be differentiated. batch(numbers): these examples, of 0 to
    `examples` − 1.
    """

    loss: Callable[[Params, Batch], Tensor]
    batch: Callable[[Sequence[int]], Batch]
    examples: int


class _Reached(Exception):
    """Ends a forward pass where a module begins."""


def calibration_task_of(
    model: nn.Module,
    family: BlockFamily,
    batches: Iterable[Batch],
    examples: int,
    device: torch.device,
    head: Iterable[nn.Module],
    prefix: str = "",
    logits: Callable[[Any], Tensor] = lambda output: output,
) -> CalibrationTask:
    """The CalibrationTask of a model that is called with a batch's tensors by name.

    Args:
        model: the task's model with its head; the tensors that are merged may be on the meta device.
        batches, examples: the inputs and their number. Each batch is moved to `device` when it is used.
        head: the modules behind what is merged; the first that is called is given the features.
        prefix: what precedes the names of the checkpoint in the model ("roberta.").
        logits: takes the logits out of what the model returns.
    """
    modules = family.modules(model.get_submodule(prefix.removesuffix(".")))
    first, names, head = modules[0].module, {name for name, _ in model.eval().named_parameters()}, list(head)

    def run(theta: Params, batch: Batch) -> Any:
        named = {prefix + name: p for name, p in theta.items() if prefix + name in names}
        return functional_call(model, named, kwargs={key: x.to(device) for key, x in batch.items()})

    def reach(modules: Iterable[nn.Module], theta: Params, batch: Batch) -> BlockInputs:
        """What the first of some modules that is called is called with."""
        seen: list[BlockInputs] = []

        def stop(module: nn.Module, args: tuple, named: dict) -> None:
            seen.append(BlockInputs(args[0], args[1:], named))
            raise _Reached

        with ExitStack() as hooks, suppress(_Reached):
            for module in modules:
                hooks.enter_context(module.register_forward_pre_hook(stop, with_kwargs=True))
            run(theta, batch)
        return seen[0]

    def block(theta: Params, inputs: BlockInputs) -> Tensor:
        y = functional_call(first, dict(theta), (inputs.x_ATD, *inputs.others), dict(inputs.named))
        return y[0] if isinstance(y, tuple) else y

    prefixes = [prefix for prefix, _ in modules]
    return CalibrationTask(
        answer=lambda theta, batch: logits(run(theta, batch)),
        features=lambda theta, batch: reach(head, theta, batch).x_ATD,
        embed=partial(reach, [first]),
        block=block,
        prefixes=prefixes,
        batches=batches,
        examples=examples,
    )


def block_params(theta: Params, prefix: str) -> dict[str, Tensor]:
    """The tensors of one block, under the names within it; `prefix` is how their names in the model begin."""
    return {name.removeprefix(prefix): p for name, p in theta.items() if name.startswith(prefix)}


@torch.no_grad()
def first_block_inputs(task: CalibrationTask, theta: Params) -> list[BlockInputs]:
    """What the model with these weights calls its first block with, batch by batch."""
    return [task.embed(theta, batch) for batch in task.batches]


@torch.no_grad()
def next_block_inputs(task: CalibrationTask, theta: Params, inputs: Sequence[BlockInputs]) -> list[BlockInputs]:
    """What reaches the next block, batch by batch, from the `inputs` of one block and that block's θ."""
    return [replace(each, x_ATD=task.block(theta, each)) for each in inputs]
