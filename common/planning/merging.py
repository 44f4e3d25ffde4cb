"""The memory of a merge: found by merging small tensors of the same proportions."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch

from common.config import PRETRAINED, Config
from common.core.task_vectors import Params, add, lazy_task_vector
from common.merging.registry import hyperparameters
from common.merging.starts import Hyper, by_part, chain_of, hyper_of, merge, survey
from common.planning.cost import GIB, HEAP_BYTES, Ledger, in_words, on_a_cpu

SMALL = 48  # the smaller side of the matrices on which a merge method is tried


class Held(NamedTuple):
    """How many tensors of a shape are in memory at once: while a method surveys the model, if it does, and while it
    merges."""

    surveying: float
    merging: float


def memory_with_data(config: Config, weights: int) -> dict[str, str]:
    """A row on the merge, if its method uses data and so holds all merged tensors of the models at once."""
    start = config.start
    if start.method == PRETRAINED or start.checkpoint or not chain_of(start.method).row.data:
        return {}
    models = 2 * len(config.tasks) + 9  # θ₀, every τ and every Fisher, or Gram matrices and their like in float64
    return {"merge, data": f"up to {models} models at once, {models * 4 * weights / GIB:.2f} GiB, and activations"}


def memory_of_merge(
    config: Config,
    shapes: Mapping[str, tuple[int, ...]],
    blocks: tuple[str, ...],
    passing: int,
    parts: Callable[[str], Sequence[slice]],
) -> dict[str, str]:
    """A row on the memory of start.method while tensors of these shapes pass, if it is one that merges them singly.

    blocks: what the names of the tensors of blocks begin with. passing: bytes on their way between files. parts: the
    rows of a tensor that are merged together.
    """
    method = config.start.method
    if method == PRETRAINED or config.start.checkpoint or chain_of(method).row.data:
        return {}
    scope = chain_of(method).row.scope
    tried = cache(partial(tensors_held, method, hyper_of(method, config.start.hyper), len(config.tasks)))
    device = alone = 0.0
    holds = ""
    for each, shape in shapes.items():
        size = 4 * math.prod(shape)
        rows, weights = first_of(parts(each), shape)
        at_once = 4 * weights
        surveying, merging = tried(shape) if each.startswith(blocks) or scope == "all" else Held(0.0, 1.0)
        needed = max(surveying * size, merging * at_once)
        device = max(device, needed)
        resident = max(held_on_a_cpu(surveying, size), held_on_a_cpu(merging, at_once))
        if resident > alone:
            alone = resident
            holds = f"{needed / size:.1f} tensors like {each}"
            if surveying * size < merging * at_once < merging * size:
                holds = f"{merging:.1f} times {rows} rows of {each}"
    return {"merge, memory": f"{in_words(device, passing, alone)}; {method} holds {holds} at once"}


def held_on_a_cpu(tensors: float, size: int) -> float:
    """Bytes that a process occupies for some tensors of so many bytes."""
    held = tensors * size
    return on_a_cpu(held, 0) if size >= HEAP_BYTES else on_a_cpu(0, held)


def first_of(parts: Sequence[slice], shape: tuple[int, ...]) -> tuple[int, int]:
    """How many rows and weights the first part of a tensor has."""
    if not shape:
        return 1, 1
    rows = len(range(*parts[0].indices(shape[0])))
    return rows, rows * math.prod(shape[1:])


def tensors_held(method: str, hyper: Hyper, tasks: int, shape: tuple[int, ...]) -> Held:
    """How many tensors of a shape a merge has in memory at once, found by merging small ones of the same proportions.

    θ₀, a task vector and what becomes of them are among them. Of a method's steps two stand for all, and what it leaves
    alone for its length (`longest`) it leaves alone here.
    """
    small = (min(math.prod(shape), SMALL**2),)
    if len(shape) == 2:
        small = tuple(math.ceil(side * min(1, SMALL / min(shape))) for side in shape)
    chain = chain_of(method)
    for part, own in by_part(chain, hyper).items():
        known, instead = hyperparameters(part), {}
        if "steps" in known:
            instead["steps"] = 2
        if "longest" in known and max(shape, default=0) > own.get("longest", known["longest"].default):
            instead["longest"] = 0
        hyper = {**hyper, **instead} if len(chain.parts) == 1 else {**hyper, part: {**own, **instead}}
    found, surveying = None, Ledger()
    if chain.row.survey:
        with surveying:
            models = drawn(small, tasks)
            found = survey(method, lambda: [models], hyper)
    with Ledger() as merging:
        base, deltas = drawn(small, tasks)
        add(base, merge(method, base, deltas, hyper, found))
    return Held(*(ledger.peak / base[""].nbytes for ledger in (surveying, merging)))


def drawn(shape: tuple[int, ...], tasks: int) -> tuple[Params, list[Params]]:
    """A random tensor of a base, and its task vectors, each drawn when it is asked for."""
    generator = torch.Generator().manual_seed(0)
    base: Params = {"": torch.randn(shape, generator=generator)}
    return base, [lazy_task_vector(lambda _: torch.randn(shape, generator=generator), base)] * tasks
