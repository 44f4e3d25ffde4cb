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
from common.planning.cost import GIB, HEAP_BYTES, Ledger, memory_in_words

SMALL = 48  # the smaller side of the matrices on which a merge method is tried


class Held(NamedTuple):
    """How many tensors of a shape are in memory at once while a method surveys the model, if it does, and while it
    merges, and for how many a process on a CPU then occupies memory."""

    surveying: float
    merging: float
    surveying_on_a_cpu: float
    merging_on_a_cpu: float


ALONE = Held(0.0, 1.0, 0.0, 1.0)  # a tensor that is left as it is


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
        if not math.prod(shape):  # a tensor without weights, as some files hold
            continue
        size = 4 * math.prod(shape)
        rows, weights = first_of(parts(each), shape)
        at_once = 4 * weights
        held = tried(shape, weights) if each.startswith(blocks) or scope == "all" else ALONE
        surveying, merging = held.surveying, held.merging
        needed = max(surveying * size, merging * at_once)
        device = max(device, needed)
        resident = max(held.surveying_on_a_cpu * size, held.merging_on_a_cpu * at_once)
        if resident > alone:
            alone = resident
            holds = f"{needed / size:.1f} tensors like {each}"
            if surveying * size < merging * at_once < merging * size:
                holds = f"{merging:.1f} times {rows} rows of {each}"
    return {"merge, memory": f"{memory_in_words(device, passing, alone)}; {method} holds {holds} at once"}


def first_of(parts: Sequence[slice], shape: tuple[int, ...]) -> tuple[int, int]:
    """How many rows and weights the first part of a tensor has."""
    if not shape:
        return 1, 1
    rows = len(range(*parts[0].indices(shape[0])))
    return rows, rows * math.prod(shape[1:])


def tensors_held(method: str, hyper: Hyper, tasks: int, shape: tuple[int, ...], at_once: int | None = None) -> Held:
    """How many tensors of a shape a merge has in memory at once, found by merging small ones of the same proportions.

    θ₀, a task vector and what becomes of them are among them. at_once: how many weights are merged together; None
    stands for all. Of a method's steps two stand for all, and what it leaves alone for its length (`longest`) it
    leaves alone here.
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
    found, surveying = None, Ledger(HEAP_BYTES * math.prod(small) / math.prod(shape))
    if chain.row.survey:
        with surveying:
            models = drawn(small, tasks)
            found = survey(method, lambda: [models], hyper)
    with Ledger(HEAP_BYTES * math.prod(small) / (at_once or math.prod(shape))) as merging:
        base, deltas = drawn(small, tasks)
        add(base, merge(method, base, deltas, hyper, found))
    size, ledgers = base[""].nbytes, (surveying, merging)
    return Held(*(ledger.peak / size for ledger in ledgers), *(ledger.resident / size for ledger in ledgers))


def drawn(shape: tuple[int, ...], tasks: int) -> tuple[Params, list[Params]]:
    """A random tensor of a base, and its task vectors, each drawn when it is asked for."""
    generator = torch.Generator().manual_seed(0)
    base: Params = {"": torch.randn(shape, generator=generator)}
    return base, [lazy_task_vector(lambda _: torch.randn(shape, generator=generator), base)] * tasks
