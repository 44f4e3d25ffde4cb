"""The merge methods that use inputs of the tasks: how much of which split, in batches of what size.

    method(base, deltas, probes, *, examples, **hyper) -> delta

Like the methods of `METHODS`, but over all merged tensors of the model at once, in memory, and with one `Probe` a task:
its inputs, never a label, and the model as a function of its weights. `examples` is their number for each task.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from common.core.task_vectors import Params
from common.merging.adamerging import adamerging
from common.merging.fisher import fisher
from common.merging.prodistill import prodistill
from common.merging.regmean import regmean
from common.merging.regmean_pp import regmean_pp


@dataclass(frozen=True)
class Use:
    """A method, the split its inputs are of, and how many are in a batch."""

    method: Callable[..., Params]
    split: Literal["train", "test"]
    batch: int


WITH_DATA = {
    "fisher": Use(fisher, "train", 1),
    "regmean": Use(regmean, "train", 32),
    "regmean_pp": Use(regmean_pp, "train", 32),
    "adamerging": Use(adamerging, "test", 16),
    "prodistill": Use(prodistill, "train", 16),
}
