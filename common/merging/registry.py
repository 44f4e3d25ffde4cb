"""The merge methods: a row for each in `METHODS`, and `merge`, which runs one that needs no data.

    method(base, deltas, **hyper) -> delta

`base` is θ₀, `deltas` has the task vector τᵢ of each task; the merged task vector δ has the names and shapes of `base`
and is float32, or float64 where the deltas are. Methods leave their inputs as they are and act on one tensor at a time,
so any part of a model may be passed: a block, or one tensor of a model that does not fit in memory. Methods that use
inputs of the tasks take these as a third argument, and all merged tensors of the model at once: see calibration.py.

To add a method: one file with its formula, source and defaults, and one line in `METHODS`. CONTRIBUTING.md adds one.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Literal

import torch
from torch import Tensor

from common.core.annotations import is_of
from common.core.errors import InputError
from common.core.task_vectors import LazyParams, Params, is_finite, require_same_tensors
from common.merging.calibration import NO_CALIBRATION


@dataclass(frozen=True)
class Data:
    """The inputs of each task that a method uses: the split they are taken from, and how many are in a batch."""

    split: Literal["train", "test"]
    batch: int


@dataclass(frozen=True)
class Method:
    """A merge method.

    where: "file:function", the file in common/merging/ without its ending.
    label: what tables call it.
    idea: what it does, in six words at most.
    scope: "blocks" if its paper merges the Transformer blocks alone, so that all other tensors stay at the base.
    data: the inputs of the tasks that it uses; None if the weights are all it needs.
    """

    where: str
    label: str
    idea: str
    scope: Literal["all", "blocks"] = "all"
    data: Data | None = None

    @property
    def function(self) -> Callable[..., Params]:
        """(base, deltas, **hyper) -> delta, or (base, deltas, calibration, *, examples, **hyper) -> delta with data."""
        return resolve_name(f"common.merging.{self.where}")

    @property
    def file(self) -> str:
        """Its place in the repository."""
        return f"common/merging/{self.where.split(':')[0]}.py"


# In the order in which tables list them.
METHODS: dict[str, Method] = {
    "fisher": Method("fisher:fisher", "Fisher", "mean weighted by Fisher information", data=Data("train", 1)),
    "regmean": Method("regmean:regmean", "RegMean", "least squares to the experts' outputs", data=Data("train", 32)),
    "regmean_pp": Method("regmean_pp:regmean_pp", "RegMean++", "RegMean, block by block", data=Data("train", 32)),
    "adamerging": Method("adamerging:adamerging", "AdaMerging", "coefficients of least entropy", data=Data("test", 16)),
    "prodistill": Method("prodistill:prodistill", "ProDistill", "distils experts by block", data=Data("train", 16)),
    "average": Method("average:average", "Average", "mean of the task vectors"),
    "slerp": Method("slerp:slerp", "SLERP", "between two models, along an arc"),
    "ta": Method("task_arithmetic:task_arithmetic", "TA", "scaled sum of the task vectors"),
    "ties": Method("ties:ties", "TIES", "trim, elect signs, average what agrees"),
    "dare_ta": Method("dare:dare_ta", "DARE (TA)", "drop at random, rescale, then TA"),
    "dare_ties": Method("dare:dare_ties", "DARE (TIES)", "drop at random, rescale, then TIES"),
    "breadcrumbs": Method("breadcrumbs:breadcrumbs", "Breadcrumbs", "sum without outliers and small changes"),
    "pcb": Method("pcb:pcb", "PCB", "weights compete by size and agreement"),
    "consensus_ta": Method("consensus:consensus_ta", "Consensus TA", "sum of weights several tasks use"),
    "tsv": Method("tsv:tsv", "TSV", "leading singular vectors, made orthogonal"),
    "iso_c": Method("iso:iso_c", "Iso-C", "sum with equal singular values"),
    "iso_cts": Method("iso:iso_cts", "Iso-CTS", "Iso-C with directions of each task"),
    "wudi": Method("wudi:wudi", "WUDI", "least interference with each task vector", "blocks"),
    "wudi_exact": Method("wudi_exact:wudi_exact", "WUDI (exact)", "minimum of WUDI in closed form", "blocks"),
    "swudi": Method("swudi:swudi", "SWUDI", "WUDI along shared directions, by time", "blocks"),
    "swudi_a": Method("swudi:swudi_a", "SWUDI-A", "WUDI along leading shared directions", "blocks"),
    "doge_ta": Method("doge:doge_ta", "DOGE TA", "TA after reconciling the task vectors", "blocks"),
    "opcm": Method("opcm:opcm", "OPCM", "one by one, orthogonal parts alone"),
    "widen": Method("widen:widen", "WIDEN", "columns weighed by length and direction"),
}


def method_choices() -> list[str]:
    """The keys of `METHODS` as refusals list them: first the methods that need no data."""
    return sorted(METHODS, key=lambda name: METHODS[name].data is not None)


def method_table() -> list[tuple[str, str, str, str]]:
    """A row for each method, as pages list them: its name with its key, its idea, the data it needs, its file."""
    rows = [("Method (`start.method`)", "Idea", "Needs data", "File")]
    for key, method in METHODS.items():
        needs = f"{method.data.split} inputs" if method.data else "no"
        rows.append((f"{method.label} (`{key}`)", method.idea, needs, f"`{method.file}`"))
    return rows


@torch.no_grad()
def merge(method: str, base: Params, deltas: Sequence[Params], hyper: Mapping[str, Any]) -> Params:
    """The merged task vector of the experts by a method that needs no data, named by its key in `METHODS`.

    Raises: InputError on an unknown method or hyperparameter, on no task at all, and on a task vector whose tensors
    differ from the base's or hold a value that is not finite.
    """
    check_hyper(method, hyper, len(deltas))
    checked = [_checked(delta, base, f"task {i} of {len(deltas)}") for i, delta in enumerate(deltas, start=1)]
    return METHODS[method].function(base, checked, **hyper)


def _checked(delta: Params, base: Params, whose: str) -> Params:
    """A task vector with the names of `base`, of which each tensor is checked when it is asked for: it may be lazy."""
    if delta.keys() != base.keys():
        require_same_tensors(delta, base)

    def checked(name: str) -> Tensor:
        tau = delta[name]
        require_same_tensors({name: tau}, {name: base[name]})
        if not is_finite(tau):
            raise InputError(f"{name}: the task vector of {whose} holds NaN or infinite values")
        return tau

    return LazyParams(base, checked)


def check_hyper(method: str, hyper: Mapping[str, Any], tasks: int | None = None) -> None:
    """Refuses what a merge would refuse, before anything is loaded: InputError naming the key and the choices.

    Names and types are checked; with the number of tasks also the values, by merging that many models of no tensors.
    """
    if method not in METHODS:
        raise InputError(f"unknown merge method {method!r}: choose one of {', '.join(method_choices())}")
    accepted = hyperparameters(method)
    for name, value in hyper.items():
        if name not in accepted:
            raise InputError(f"{method}: unknown hyperparameter {name!r}, accepted: {', '.join(accepted) or 'none'}")
        kind = accepted[name].annotation
        if not is_of(value, kind):
            raise InputError(f"{method}: {name} must be {inspect.formatannotation(kind)}, it is {value!r}")
    if tasks is not None:
        if tasks < 1:
            raise InputError(f"{method}: at least one task is needed to merge")
        calibration = [[NO_CALIBRATION] * tasks] if METHODS[method].data else []
        METHODS[method].function({}, [{}] * tasks, *calibration, **hyper)


def hyperparameters(method: str) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a method, with annotation and default, by name."""
    parameters = inspect.signature(METHODS[method].function).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
