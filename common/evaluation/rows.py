"""The rows of results.json: what one evaluation wrote, how rows are named, ordered, stored and averaged.

A row is what one evaluation wrote: {"method": "pretrained" | "individual" | a merge method | "fda", "start": for fda
the method that adaptation started from, else None, "init": for fda "weight" | "gauss", else None, "label", "task",
"split", "metric", "value": a fraction, "n": examples scored, "config": digest, "commit": git commit of the scores}. An
adapted model has "rest", adapt.rest of it, a test set read in a folder "test_set", what identifies its files. "scorer"
identifies what else decides the answers, as heads, tokenizers and prompts do; rows older than it lack it. A merged
model has "inputs", what identifies base and experts, an adapted one "start_checkpoint", that of its start. A model that
the run made has "made", the git commit that it was made by, "made_on", the GPU or processor, and where it was timed
"seconds", "cpu_seconds", "peak_gib" and "hardware" as well, a row of scripts/compare.py's seeds its "seed".
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from common.config import PRETRAINED
from common.core.errors import InputError
from common.io.checkpoints import write_text
from common.io.json_files import interpreted, read_object
from common.layout import SAME_REST
from common.merging.registry import METHODS, every_row
from common.merging.starts import JOINED

INDIVIDUAL = "individual"  # what rows call the experts, each scored on its own task
Row = Mapping[str, Any]
Values = Sequence[float]  # a line of a table: one fraction a task, then their mean; NaN where there is none

# What tables call models, methods and initialisations, in the order of their rows. Others: upper case, last.
LABELS = {
    PRETRAINED: "Pretrained",
    INDIVIDUAL: "Individual",
    **{name: row.label for name, row in every_row().items()},
    "gauss": "Gauss",
    "weight": "Weight",
}
RESULTS_FILE = 'results file, JSON with "tasks" and "rows"'
KEY = ("method", "start", "init", "label", "task", "split", "seed")


def display(word: str) -> str:
    """What tables call a model, method or initialisation; of a chain of merge steps the names of its parts; Gaussian
    anchors of a σ, as "σ 0.01", by it."""
    parts = word.split(JOINED)
    if set(parts) <= LABELS.keys():
        return " + ".join(LABELS[part] for part in parts)
    return word if word.startswith("σ ") else word.upper()


def row_name(row: Row) -> str:
    """The name the paper's tables give a row: "Pretrained", "TSV", "FDA (TA, Weight)"; a label stands behind it.

    Anchors that only gave the closed form of adapt.warm_start, with no epoch behind it: "RegMean of anchors (…)".
    """
    label = f" {row['label']}" if row.get("label") else ""
    if row["method"] == "fda":
        how = "RegMean of anchors" if row.get("epochs") == 0 else "FDA"
        return f"{how} ({display(row['start'])}, {display(row['init'])}){label}"
    return display(row["method"]) + label


def in_same_rest(row: Row) -> str:
    """The name of the row that an adapted model's differs from in its blocks alone: the start within the pretrained
    model, or the start itself if that is the pretrained one or gave the rest too. Rows of old runs do not say the rest:
    theirs was the pretrained one."""
    start = display(row["start"])
    return start if row["start"] == PRETRAINED or row.get("rest") == "start" else f"{start} {SAME_REST}"


def is_shown(row: Row) -> bool:
    """Whether a row has a line of its own; a start in the rest of another model is there for a difference alone."""
    return row["method"] == "fda" or row.get("label") != SAME_REST


def rank(row: Row) -> tuple:
    """Sorts rows like the paper: pretrained, individual, merges, then FDA by start and initialisation."""
    order = {word: i for i, word in enumerate(LABELS)}

    def place(word: str) -> int:  # of a chain that of its method
        return order.get(next((part for part in word.split(JOINED) if part in METHODS), word), len(order))

    fda = row["method"] == "fda"
    words = (row["start"] if fda else row["method"], row.get("init") or "", row.get("label") or "")
    return (fda, *((place(word), word.count(JOINED), word) for word in words))


def upsert(rows: Iterable[Row], new: Row) -> list[Row]:
    """The rows with `new` in place of the one that has the same KEY, or at the end."""
    return [row for row in rows if any(row.get(k) != new.get(k) for k in KEY)] + [new]


def write_results(path: Path | str, rows: Iterable[Row], tasks: Sequence[str], apart: Iterable[Row] = ()) -> None:
    """Write results.json whole or not at all, with rows that are in no table. The same rows in any order give the same
    bytes."""
    contents = {"tasks": list(tasks), "rows": in_order(rows)}
    contents |= {"apart": kept} if (kept := in_order(apart)) else {}
    write_text(Path(path), json.dumps(contents, indent=1, sort_keys=True) + "\n")


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order of the paper's tables, then by task, split and seed."""
    return sorted(rows, key=lambda row: (rank(row), row["task"], row.get("split", ""), row.get("seed", 0)))


def read_results(path: Path | str) -> tuple[list[Row], list[str]]:
    """(rows, tasks) of a results.json. InputError if there is none or it is damaged."""
    if not Path(path).is_file():
        raise InputError(f"there are no results at {path}; evaluate a model first")
    contents = read_object(Path(path), RESULTS_FILE)
    with interpreted(Path(path), RESULTS_FILE):
        rows, tasks = in_order(contents["rows"]), [str(task) for task in contents["tasks"]]
        if not all(row_name(row) and isinstance(row["value"], int | float) for row in rows):
            raise TypeError("a value is no number")
    return contents["rows"], tasks


def read_apart(path: Path) -> list[Row]:
    """The rows of a results.json that are kept out of all tables, see kept.py. InputError if they are damaged."""
    contents = read_object(path, RESULTS_FILE)
    with interpreted(path, RESULTS_FILE):
        return in_order(contents.get("apart", []))


def values_by_seed(rows: Iterable[Row], tasks: Sequence[str]) -> dict[str, dict[int | None, Values]]:
    """{row name: {seed: a value for each task, then their plain mean}}, in the order of the paper's tables; NaN if
    missing. The rows of a run without seeds have the seed None."""
    scores: dict[str, dict[int | None, dict[str, float]]] = {}
    for row in sorted(rows, key=rank):
        scores.setdefault(row_name(row), {}).setdefault(row.get("seed"), {})[row["task"]] = row["value"]

    def with_mean(by_task: Mapping[str, float]) -> Values:
        values = [by_task.get(task, math.nan) for task in tasks]
        return [*values, sum(values) / len(values)]

    return {name: {seed: with_mean(of) for seed, of in seeds.items()} for name, seeds in scores.items()}


def values_by_name(rows: Iterable[Row], tasks: Sequence[str]) -> dict[str, Values]:
    """{row name: a value for each task, then their plain mean}, each the mean over the seeds; NaN if missing."""
    return {name: means(seeds.values()) for name, seeds in values_by_seed(rows, tasks).items()}


def means(lists: Iterable[Values]) -> Values:
    return [fmean(column) for column in zip(*lists, strict=True)]
