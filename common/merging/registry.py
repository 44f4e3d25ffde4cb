"""Merging in parameter space: each method is one function from the experts' task vectors to the merged one.

    method(base, deltas, **hyper) -> delta

`base` is θ₀, `deltas` one τᵢ a task; the result has the names and shapes of `base` and is float32, or float64 where the
deltas are. Methods are pure and act tensor by tensor, so any part of a model may be passed: a block, or one tensor of a
model that does not fit in memory. To add one: a file with its formula, source and defaults, and a line in `METHODS`;
CONTRIBUTING.md has an example. Methods that use inputs of the tasks are in `WITH_DATA`, see with_data.py.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_origin

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import LazyParams, Params, is_finite, require_same_tensors
from common.merging.average import average
from common.merging.breadcrumbs import breadcrumbs
from common.merging.calibration import NO_CALIBRATION
from common.merging.consensus import consensus_ta
from common.merging.dare import dare_ta, dare_ties
from common.merging.doge import doge_ta
from common.merging.iso import iso_c, iso_cts
from common.merging.opcm import opcm
from common.merging.pcb import pcb
from common.merging.slerp import slerp
from common.merging.task_arithmetic import task_arithmetic
from common.merging.ties import ties
from common.merging.tsv import tsv
from common.merging.widen import widen_merging
from common.merging.with_data import WITH_DATA
from common.merging.wudi import wudi
from common.merging.wudi_exact import wudi_exact


@torch.no_grad()
def merge(method: str, base: Params, deltas: Sequence[Params], hyper: Mapping[str, Any]) -> Params:
    """The merged task vector of the experts by the method of that name (a key of `METHODS`).

    Raises InputError on an unknown method or hyperparameter, on no task at all, and on a task vector whose tensors
    differ from the base's or hold a value that is not finite.
    """
    check_hyper(method, hyper, len(deltas))
    checked = [_checked(delta, base, f"task {i} of {len(deltas)}") for i, delta in enumerate(deltas, start=1)]
    return METHODS[method](base, checked, **hyper)


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
    """Refuses, before anything is loaded, what `merge` would refuse: InputError naming the key and the choices.

    Names and types are checked; with the number of tasks also the values, by merging that many models of no tensors.
    """
    if method not in METHODS | WITH_DATA:
        raise InputError(f"unknown merge method {method!r}: choose one of {', '.join(METHODS | WITH_DATA)}")
    accepted = hyperparameters(method)
    for name, value in hyper.items():
        if name not in accepted:
            raise InputError(f"{method}: unknown hyperparameter {name!r}, accepted: {', '.join(accepted) or 'none'}")
        kind = accepted[name].annotation
        if not _is_of(value, kind):
            raise InputError(f"{method}: {name} must be {inspect.formatannotation(kind)}, it is {value!r}")
    if tasks is not None:
        if tasks < 1:
            raise InputError(f"{method}: at least one task is needed to merge")
        probes = [[NO_CALIBRATION] * tasks] if method in WITH_DATA else []
        function(method)({}, [{}] * tasks, *probes, **hyper)


def hyperparameters(method: str) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a method, with annotation and default, by name."""
    parameters = inspect.signature(function(method)).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def function(method: str) -> Callable[..., Params]:
    """The function behind a key of `METHODS` or `WITH_DATA`."""
    return WITH_DATA[method].method if method in WITH_DATA else METHODS[method]


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value read from YAML fits an annotation: a plain type, None, a Sequence of one type, or their union."""
    if get_origin(kind) is Sequence:
        return isinstance(value, list | tuple) and all(_is_of(item, get_args(kind)[0]) for item in value)
    if get_args(kind):
        return any(_is_of(value, member) for member in get_args(kind))
    return type(value) is kind or (kind is float and type(value) is int)


METHODS: dict[str, Callable[..., Params]] = {
    "average": average,
    "slerp": slerp,
    "ta": task_arithmetic,
    "ties": ties,
    "dare_ta": dare_ta,
    "dare_ties": dare_ties,
    "breadcrumbs": breadcrumbs,
    "pcb": pcb,
    "consensus_ta": consensus_ta,
    "tsv": tsv,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "wudi": wudi,
    "wudi_exact": wudi_exact,
    "doge_ta": doge_ta,
    "opcm": opcm,
    "widen": widen_merging,
}

# Methods whose papers merge the Transformer blocks alone: every tensor outside them stays at the base.
SCOPE_BLOCKS = frozenset({"wudi", "wudi_exact", "doge_ta"})
