"""The merge methods, a row for each in `METHODS`, and what goes before or behind any of them, a row each in `STEPS`.

    method(base, deltas, **hyper) -> delta

`base` is θ₀, `deltas` has the task vector τᵢ of each task; the merged task vector δ has the names and shapes of `base`
and is float32, or float64 where the deltas are. Methods leave their inputs as they are and act on one tensor at a time,
so any part of a model may be passed: a block, or one tensor of a model that does not fit in memory. Two kinds take a
third argument: inputs of the tasks (`data`), and then all merged tensors of the model at once, see calibration.py; or
what a first pass over the whole model found (`survey`), see whole.py. `starts.py` runs them.

To add a method: one file with its formula, source and defaults, and one line in `METHODS`. CONTRIBUTING.md adds one.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Literal


@dataclass(frozen=True)
class Data:
    """The inputs of each task that a method uses: the split they are taken from, and how many are in a batch."""

    split: Literal["train", "test"]
    batch: int


@dataclass(frozen=True)
class RegistryRow:
    """What a start can be made of.

    where: "file:function", the file in common/merging/ without its ending.
    label: what tables call it.
    idea: what it does, in six words at most.
    """

    where: str
    label: str
    idea: str

    @property
    def function(self) -> Callable[..., Any]:
        """Of a method (base, deltas, **hyper) -> delta, see the head of this file; of a step see `Step`."""
        return resolve_name(f"common.merging.{self.where}")

    @property
    def file(self) -> str:
        """Its place in the repository."""
        return f"common/merging/{self.where.split(':')[0]}.py"


@dataclass(frozen=True)
class Method(RegistryRow):
    """A merge method.

    scope: "blocks" if its paper merges the Transformer blocks alone, so that all other tensors stay at the base.
    data: the inputs of the tasks that it uses; None if the weights are all it needs.
    survey: "file:function" of its first pass over the model, (parts, **hyper) -> what the method takes as its third
        argument; "" if it needs none.
    by_weight: whether each weight of δ hangs on that weight of the τᵢ and on the survey alone, bit for bit, so that the
        rows of a tensor can be merged by themselves.
    """

    scope: Literal["all", "blocks"] = "all"
    data: Data | None = None
    survey: str = ""
    by_weight: bool = False

    @property
    def surveyor(self) -> Callable[..., Any]:
        """The first pass, of a method that has one."""
        return resolve_name(f"common.merging.{self.survey}")


@dataclass(frozen=True)
class Step(RegistryRow):
    """What any method can be joined with.

    stage: "before": (base, deltas, **hyper) -> the deltas that the method is given; "after": (base, deltas, delta,
        **hyper) -> the delta in place of the method's.
    """

    stage: Literal["before", "after"] = "after"


# In the order in which tables list them.
METHODS: dict[str, Method] = {
    "fisher": Method("fisher:fisher", "Fisher", "mean weighted by Fisher information", data=Data("train", 1)),
    "regmean": Method("regmean:regmean", "RegMean", "least squares to the experts' outputs", data=Data("train", 32)),
    "regmean_pp": Method("regmean_pp:regmean_pp", "RegMean++", "RegMean, block by block", data=Data("train", 32)),
    "adamerging": Method("adamerging:adamerging", "AdaMerging", "coefficients of least entropy", data=Data("test", 16)),
    "concrete": Method("concrete:concrete", "Concrete", "one mask of least entropy", data=Data("test", 16)),
    "fw_merging": Method("fw:fw_merging", "FW-Merging", "steps towards the best expert", data=Data("test", 20)),
    "adarank": Method("adarank:adarank", "AdaRank", "singular components of least entropy", data=Data("test", 16)),
    "expert_merging": Method(
        "expert_merging:expert_merging", "Expert Merging", "coefficients that answer as experts", data=Data("train", 1)
    ),
    "prodistill": Method("prodistill:prodistill", "ProDistill", "distils experts by block", data=Data("train", 16)),
    "average": Method("average:average", "Average", "mean of the task vectors", by_weight=True),
    "slerp": Method("slerp:slerp", "SLERP", "between two models, along an arc"),
    "layer_swap": Method(
        "layer_swap:layer_swap", "Layer swap", "outer layers of another expert", survey="layer_swap:depth"
    ),
    "ta": Method("task_arithmetic:task_arithmetic", "TA", "scaled sum of the task vectors", by_weight=True),
    "rws": Method("rws:rws", "RWS", "one expert, patched by the others"),
    "ties": Method(
        "ties:ties", "TIES", "trim, elect signs, average what agrees", survey="ties:thresholds", by_weight=True
    ),
    "dare_ta": Method("dare:dare_ta", "DARE (TA)", "drop at random, rescale, then TA"),
    "dare_ties": Method("dare:dare_ties", "DARE (TIES)", "drop at random, rescale, then TIES"),
    "breadcrumbs": Method("breadcrumbs:breadcrumbs", "Breadcrumbs", "sum without outliers and small changes"),
    "pcb": Method("pcb:pcb", "PCB", "weights compete by size and agreement", survey="pcb:whole_ranges"),
    "sce": Method("sce:sce", "SCE", "weighs experts where they differ most"),
    "varm": Method("sce:varm", "VaRM", "mean weighted by squared changes"),
    "consensus_ta": Method("consensus:consensus_ta", "Consensus TA", "sum of weights several tasks use"),
    "tsv": Method("tsv:tsv", "TSV", "leading singular vectors, made orthogonal"),
    "dc_merge": Method("dc_merge:dc_merge", "DC-Merge", "TIES in a common singular basis"),
    "star": Method("star:star", "STAR", "leading singular directions, rescaled, averaged"),
    "cart": Method("cart:cart", "CART", "mean plus leading differences to it"),
    "iso_c": Method("iso:iso_c", "Iso-C", "sum with equal singular values"),
    "iso_cts": Method("iso:iso_cts", "Iso-CTS", "Iso-C with directions of each task"),
    "wudi": Method("wudi:wudi", "WUDI", "least interference with each task vector", "blocks"),
    "wudi_exact": Method("wudi_exact:wudi_exact", "WUDI (exact)", "minimum of WUDI in closed form", "blocks"),
    "swudi": Method("swudi:swudi", "SWUDI", "WUDI along shared directions, by time", "blocks"),
    "swudi_a": Method("swudi:swudi_a", "SWUDI-A", "WUDI along leading shared directions", "blocks"),
    "optmerge": Method("optmerge:optmerge", "OptMerge", "WUDI on truncated task vectors"),
    "actmat": Method("actmat:actmat", "ACTMat", "least squares on task vectors' covariance"),
    "tact": Method("actmat:tact", "TACT", "ACTMat on the largest changes"),
    "ace": Method("ace:ace", "ACE", "covariances of centred task vectors, evened"),
    "doge_ta": Method(
        "doge:doge_ta", "DOGE TA", "TA after reconciling the task vectors", "blocks", survey="doge:thresholds"
    ),
    "opcm": Method("opcm:opcm", "OPCM", "one by one, orthogonal parts alone", survey="opcm:whole_factor"),
    "widen": Method("widen:widen", "WIDEN", "columns weighed by length and direction"),
}


STEPS: dict[str, Step] = {
    "pact": Step("pact:pact", "PACT", "task vectors without others' shared directions", "before"),
    "svc": Step("svc:svc", "SVC", "singular values calibrated after merging", "after"),
}


def every_row() -> dict[str, RegistryRow]:
    """The rows of both tables, by key."""
    return {**METHODS, **STEPS}


def hyperparameters(key: str) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a method or step, with annotation and default, by name."""
    parameters = inspect.signature(every_row()[key].function).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def method_choices() -> list[str]:
    """The keys of `METHODS` as refusals list them: first the methods that need no data."""
    return sorted(METHODS, key=lambda name: METHODS[name].data is not None)


def method_table() -> list[tuple[str, str, str, str]]:
    """A row for each method and step, as pages list them: name with key, its idea, the data it needs, its file."""
    lines = [("Method (`start.method`)", "Idea", "Needs data", "File")]
    for key, method in METHODS.items():
        needs = f"{method.data.split} inputs" if method.data else "no"
        lines.append((f"{method.label} (`{key}`)", method.idea, needs, link(method.file)))
    for key, step in STEPS.items():
        where = f"`{key}+…`" if step.stage == "before" else f"`…+{key}`"
        lines.append((f"{step.label} ({where})", step.idea, "no", link(step.file)))
    return lines


def link(file: str) -> str:
    """A file of common/merging/ for a page there."""
    name = file.rpartition("/")[2]
    return f"[{name}]({name})"
