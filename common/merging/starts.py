"""What start.method can name: one merge method, or a chain of filters, a method, and calibrations, joined by "+".

    pact+wudi        the method WUDI on task vectors that PACT has filtered
    iso_cts+svc      SVC after Iso-CTS
    pact+ties+svc    both

A chain goes from left to right; its parts are keys of `METHODS` and `STEPS` in registry.py. The name is safe on every
file system and shell, and the folder of the merge has it. Hyperparameters are given by part.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.core.annotations import require_finite, require_kind
from common.core.errors import InputError
from common.core.task_vectors import LazyParams, Params, is_finite, made_anew, require_same_tensors
from common.merging.calibration import NO_CALIBRATION, CalibrationTask
from common.merging.registry import METHODS, STEPS, Method, every_row, hyperparameters, method_choices
from common.merging.tensorwise import Parts

JOINED = "+"
Hyper = Mapping[str, Any]
"""Of a single method its hyperparameters by name; of a chain those of each part, by the key of the part."""


@dataclass(frozen=True)
class Chain:
    """A start, taken apart: keys of steps before the method, of the method, and of steps after it."""

    before: tuple[str, ...]
    method: str
    after: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """All keys, in their order."""
        return (*self.before, self.method, *self.after)

    @property
    def row(self) -> Method:
        """The method's."""
        return METHODS[self.method]


def chain_of(start: str) -> Chain:
    """The parts of a start. InputError if it names what there is not, or not filters, one method, calibrations."""
    keys = tuple(start.split(JOINED))
    if len(keys) == 1 and start not in METHODS:
        choices = f"choose one of {', '.join(method_choices())}"
        if start in STEPS:
            example = f"{start}+ta" if STEPS[start].stage == "before" else f"ta+{start}"
            raise InputError(f"{start} is no merge method by itself; join it with one, as in {example}: {choices}")
        raise InputError(f"unknown merge method {start!r}: {choices}")
    for key in keys:
        if key not in every_row():
            raise InputError(
                f"{start}: there is no {key!r}; before + stand {listed('before')}, behind it {listed('after')}, and "
                f"between them one of {', '.join(method_choices())}"
            )
    stages = [STEPS[key].stage if key in STEPS else "method" for key in keys]
    if stages != sorted(stages, key=("before", "method", "after").index) or stages.count("method") != 1:
        raise InputError(
            f"{start}: a chain is one merge method, before it {listed('before')}, behind it {listed('after')}"
        )
    if len(set(keys)) < len(keys):
        raise InputError(f"{start}: {next(key for key in keys if keys.count(key) > 1)} stands there twice")
    place = stages.index("method")
    return Chain(keys[:place], keys[place], keys[place + 1 :])


def listed(stage: str) -> str:
    """The keys of the steps of a stage."""
    return ", ".join(key for key, step in STEPS.items() if step.stage == stage)


def hyper_of(start: str, given: Mapping[str, Hyper], defaults: bool = False) -> dict[str, Any]:
    """What `merge` takes as hyperparameters of a start, out of those `given` by part, with the defaults if asked."""
    parts = chain_of(start).parts
    own = {part: {n: p.default for n, p in hyperparameters(part).items()} if defaults else {} for part in parts}
    found = {part: own[part] | dict(given.get(part, {})) for part in parts}
    return found if len(parts) > 1 else found[start]


def by_part(chain: Chain, hyper: Hyper) -> Mapping[str, Hyper]:
    """{part: its hyperparameters} out of what `merge` takes. InputError if a chain is given others than its parts'."""
    if len(chain.parts) == 1:
        return {chain.method: hyper}
    for key, value in hyper.items():
        if key not in chain.parts or not isinstance(value, Mapping):
            raise InputError(
                f"{JOINED.join(chain.parts)}: hyperparameters are given by part, as in {{{chain.method}: {{…}}}}, "
                f"not {key!r}"
            )
    return {part: hyper.get(part, {}) for part in chain.parts}


@torch.no_grad()
def merge(
    start: str,
    base: Params,
    deltas: Sequence[Params],
    hyper: Hyper,
    surveyed: Any = None,
    calibration: Sequence[CalibrationTask] | None = None,
) -> Params:
    """The merged task vector of the experts by a start: a key in `METHODS`, or a chain.

    Args:
        surveyed: what `survey` found of the whole model, where these are a part of it. None: they are the whole.
        calibration: of a method that uses data, the inputs of each task.

    Raises: InputError on an unknown method or hyperparameter, on no task at all, and on a task vector whose tensors
    differ from the base's or hold a value that is not finite.
    """
    check_hyper(start, hyper, len(deltas))
    chain = chain_of(start)
    of, row = by_part(chain, hyper), chain.row
    deltas = filtered(chain, of, base, deltas)
    if row.data:
        with torch.enable_grad():
            delta = row.function(base, [dict(each) for each in deltas], calibration, **of[chain.method])
    elif row.survey:
        found = row.surveyor(lambda: [(base, deltas)], **of[chain.method]) if surveyed is None else surveyed
        delta = row.function(base, deltas, found, **of[chain.method])
    else:
        delta = row.function(base, deltas, **of[chain.method])
    for key in chain.after:
        delta = STEPS[key].function(base, deltas, delta, **of[key])
    return delta


@torch.no_grad()
def survey(start: str, parts: Parts, hyper: Hyper) -> Any:
    """What a start must know of the whole model before any part of it is merged; None if nothing."""
    chain = chain_of(start)
    if not chain.row.survey:
        return None
    of = by_part(chain, hyper)

    def of_method() -> Iterator[tuple[Params, Sequence[Params]]]:
        yield from ((base, filtered(chain, of, base, deltas)) for base, deltas in parts())

    return chain.row.surveyor(of_method, **of[chain.method])


def filtered(chain: Chain, hyper: Mapping[str, Hyper], base: Params, deltas: Sequence[Params]) -> Sequence[Params]:
    """The task vectors that the method of a chain is given, each tensor checked when it is asked for."""
    deltas = [_checked(delta, base, f"task {i} of {len(deltas)}") for i, delta in enumerate(deltas, start=1)]
    for key in chain.before:
        deltas = STEPS[key].function(base, deltas, **hyper[key])
    return deltas


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

    return LazyParams(base, checked, made_anew(delta))


# ---- the door --------------------------------------------------------------------------------------------------------


def check_hyper(start: str, hyper: Hyper, tasks: int | None = None) -> None:
    """Refuses what a merge would refuse, before anything is loaded: InputError naming the key and the choices.

    Names and types are checked; with the number of tasks also the values, by merging that many models of no tensors.
    """
    chain = chain_of(start)
    for part, own in by_part(chain, hyper).items():
        check_hyper_of(part, own, tasks)


def check_hyper_of(part: str, hyper: Hyper, tasks: int | None = None) -> None:
    """`check_hyper` of one key of `METHODS` or `STEPS`; no hyperparameter of any can be infinite."""
    accepted = hyperparameters(part)
    for name, value in hyper.items():
        if name not in accepted:
            raise InputError(f"{part}: unknown hyperparameter {name!r}, accepted: {', '.join(accepted) or 'none'}")
        kind = accepted[name].annotation
        require_kind(value, kind, f"{part}: {name}")
        require_finite(value, f"{part}: {name}")
    if tasks is None:
        return
    if tasks < 1:
        raise InputError(f"{part}: at least one task is needed to merge")
    function, row = partial(every_row()[part].function, {}, [{}] * tasks), METHODS.get(part)
    if row is None:
        function(*([{}] if STEPS[part].stage == "after" else []), **hyper)
    elif row.data:
        function([NO_CALIBRATION] * tasks, **hyper)
    else:
        function(*([row.surveyor(lambda: [], **hyper)] if row.survey else []), **hyper)
