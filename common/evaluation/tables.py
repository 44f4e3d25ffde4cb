"""results.json as the paper's table. Nothing here computes a score: rows come in scored.

A row is what one evaluation wrote: {"method": "pretrained" | "individual" | a merge method | "fda", "start": for fda
the method that adaptation started from, else None, "init": for fda "weight" | "gauss", else None, "label", "task",
"split", "metric", "value": a fraction, "n": examples scored, "config": digest, "commit": git commit}. A model that the
run made and timed has "seconds", "peak_gib" and "hardware" as well, a row of scripts/compare.py's seeds its "seed".
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common.core.errors import InputError
from common.io.checkpoints import write_text
from common.io.json_files import interpreted, read_object
from common.merging.registry import METHODS

Row = Mapping[str, Any]
Values = Sequence[float]  # a table row: one fraction a task, then their mean; NaN where there is none

# What tables call models, methods and initialisations, in the order of their rows. Others: upper case, last.
LABELS = {
    "pretrained": "Pretrained",
    "individual": "Individual",
    **{name: method.label for name, method in METHODS.items()},
    "gauss": "Gauss",
    "weight": "Weight",
}
KEY = ("method", "start", "init", "label", "task", "split", "seed")
MISSING = "–"


def display(word: str) -> str:
    return LABELS.get(word, word.upper())


def row_name(row: Row) -> str:
    """The name the paper's tables give a row: "Pretrained", "TSV", "FDA (TA, Weight)"; a label stands behind it.

    Anchors that only gave the closed form of adapt.warm_start, with no epoch behind it: "RegMean of anchors (…)".
    """
    if row["method"] == "fda":
        how = "RegMean of anchors" if row.get("epochs") == 0 else "FDA"
        return f"{how} ({display(row['start'])}, {display(row['init'])}) {row.get('label') or ''}".rstrip()
    return display(row["method"])


def rank(row: Row) -> tuple:
    """Sorts rows like the paper: pretrained, individual, merges, then FDA by start and initialisation."""
    order = {word: i for i, word in enumerate(LABELS)}
    fda = row["method"] == "fda"
    words = (row["start"] if fda else row["method"], row.get("init") or "", row.get("label") or "")
    return (fda, *((order.get(word, len(order)), word) for word in words))


def upsert(rows: Iterable[Row], new: Row) -> list[Row]:
    """The rows with `new` in place of the one that has the same KEY, or at the end."""
    return [row for row in rows if any(row.get(k) != new.get(k) for k in KEY)] + [new]


def write_results(path: Path | str, rows: Iterable[Row], tasks: Sequence[str]) -> None:
    """Write results.json whole or not at all. The same rows in any order give the same bytes."""
    contents = {"tasks": list(tasks), "rows": in_order(rows)}
    write_text(Path(path), json.dumps(contents, indent=1, sort_keys=True) + "\n")


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order of the paper's tables, then by task, split and seed."""
    return sorted(rows, key=lambda row: (rank(row), row["task"], row.get("split", ""), row.get("seed", 0)))


def read_results(path: Path | str) -> tuple[list[Row], list[str]]:
    """(rows, tasks) of a results.json. InputError if there is none or it is damaged."""
    if not Path(path).is_file():
        raise InputError(f"there are no results at {path}; evaluate a model first")
    what = 'results file, JSON with "tasks" and "rows"'
    contents = read_object(Path(path), what)
    with interpreted(Path(path), what):
        rows, tasks = in_order(contents["rows"]), [str(task) for task in contents["tasks"]]
        if not all(row_name(row) and isinstance(row["value"], int | float) for row in rows):
            raise TypeError("a value is no number")
    return contents["rows"], tasks


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


def published_values(published: Mapping, tasks: Sequence[str]) -> dict[str, Values]:
    """{row name: a fraction for each task, then their mean} in a table of configs/paper_results.yaml; NaN where it has
    none, and for the mean where the paper's is over other tasks.
    """
    unit = 100 if published["unit"] == "percent" else 1
    columns = [*published["tasks"], "Avg"]
    wanted = [*tasks, "Avg" if set(tasks) == set(published["tasks"]) else None]
    scores = {name: dict(zip(columns, values, strict=True)) for name, values in published["rows"].items()}
    return {name: [by_task.get(column, math.nan) / unit for column in wanted] for name, by_task in scores.items()}


def table(rows: Iterable[Row], tasks: Sequence[str], *, percent: bool = True, published: Mapping | None = None) -> str:
    """The paper's table in Markdown, aligned for the terminal: tasks, Avg, and Δ, an FDA row's Avg minus its start's.

    `percent` prints hundredths of a percent, else fractions with four decimals. With several seeds cells are means, and
    Avg and Δ, taken seed by seed, have the sample standard deviation behind them unless all seeds scored one model.
    Time and Memory follow if any row has them. With `published`, one table of configs/paper_results.yaml, each row that
    the paper has is followed by the paper's values, marked "(paper)".
    """
    rows = list(rows)
    ours = values_by_seed(rows, tasks)
    paper = published_values(published, tasks) if published else {}
    start_of = {row_name(row): display(row["start"]) for row in rows if row["method"] == "fda"}
    timed = any("seconds" in row for row in rows)
    lines = [["Method", *tasks, "Avg", "Δ", *(["Time", "Memory"] if timed else [])]]
    for name, seeds in ours.items():
        of_name = [row for row in rows if row_name(row) == name]
        starts, fixed = ours.get(start_of.get(name, ""), {}), is_fixed(of_name)
        values = [cell(value, percent) for value in means(seeds.values())[:-1]]
        average = spread([v[-1] for v in seeds.values()], percent, fixed)
        gains = [v[-1] - starts.get(seed, [math.nan])[-1] for seed, v in seeds.items()]
        gain = spread(gains, percent, fixed, "+") if name in start_of else ""
        lines.append([name, *values, average, gain, *(cost_cells(of_name) if timed else [])])
        if name in paper:
            start = paper.get(start_of.get(name, ""), [math.nan])
            gain = cell(paper[name][-1] - start[-1], percent, "+") if name in start_of else ""
            lines.append(
                ["(paper)", *(cell(value, percent) for value in paper[name]), gain, *(["", ""] if timed else [])]
            )
    return aligned(lines)


def by_start(rows: Iterable[Row], tasks: Sequence[str], *, percent: bool = True) -> str:
    """A short table, a line a start: its Avg, then Avg and Δ of what each kind of anchors made of it, see `table`;
    Time is the merge's, and behind each Δ that of the anchors and the adaptation."""
    rows = sorted((row for row in rows if row["method"] != "individual"), key=rank)
    ours, named = values_by_seed(rows, tasks), {row_name(row): row for row in rows}
    starts = {name: row["method"] for name, row in named.items() if row["method"] != "fda"}
    kinds = list(
        dict.fromkeys((row["init"], row.get("label") or "") for row in named.values() if row["method"] == "fda")
    )
    titles = [f"FDA ({display(init)}) {label}".rstrip() for init, label in kinds]
    lines = [["Start", "Avg", "Time", *(head for title in titles for head in (title, "Δ", "Time"))]]

    def of(name: str) -> list[Row]:
        return [row for row in rows if row_name(row) == name]

    for start, method in starts.items():
        average = spread([v[-1] for v in ours[start].values()], percent, is_fixed(of(start)))
        line = [start, average, cost_cells(of(start))[0]]
        for kind in kinds:
            made = [n for n, r in named.items() if (r["start"], r["init"], r.get("label") or "") == (method, *kind)]
            for name in made[:1]:
                gains = [v[-1] - ours[start].get(seed, [math.nan])[-1] for seed, v in ours[name].items()]
                line.append(spread([v[-1] for v in ours[name].values()], percent, fixed := is_fixed(of(name))))
                line += [spread(gains, percent, fixed, "+"), cost_cells(of(name))[0]]
            if not made:
                line += [MISSING, MISSING, MISSING]
        lines.append(line)
    return aligned(lines)


def is_fixed(rows: Iterable[Row]) -> bool:
    """Whether the rows of one name were scored on the same checkpoint of each task, whatever the seed."""
    scored = {(row["task"], row.get("checkpoint", row.get("seed"))) for row in rows}
    return len(scored) == len({task for task, _ in scored})


def spread(values: Values, percent: bool, fixed: bool, sign: str = "") -> str:
    """The mean, and the sample standard deviation if there are several values that need not be the same."""
    mean = cell(fmean(values), percent, sign)
    return mean if fixed or len(values) < 2 or mean == MISSING else f"{mean} ± {cell(stdev(values), percent)}"


def cost_cells(rows: Iterable[Row]) -> list[str]:
    """Seconds and GiB of the rows of one name in print, means over the seeds that have them."""
    costs = {row.get("seed"): (row["seconds"], row["peak_gib"]) for row in rows if "seconds" in row}
    if not costs:
        return [MISSING, MISSING]
    seconds, gib = means(costs.values())
    size, unit = next((s, u) for s, u in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 2 * s or s == 1)
    return [f"{seconds / size:.1f} {unit}", f"{gib:.2f} GiB"]


def cell(value: float, percent: bool, sign: str = "") -> str:
    if math.isnan(value):
        return MISSING
    return f"{100 * value:{sign}.2f}" if percent else f"{value:{sign}.4f}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, header first: first column to the left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join((first, *rest))} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join(line(cells) for cells in (lines[0], rule, *lines[1:])) + "\n"


def footnotes(rows: Iterable[Row], published: Mapping | None) -> str:
    """What the numbers are and where they come from: metrics, examples, configs and commits."""

    def listed(texts: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(texts))

    rows = sorted(rows, key=rank)
    notes = [
        "Avg: plain mean over the tasks. Δ: Avg minus the Avg of the model that adaptation started from.",
        "Metric and examples scored: " + listed(f"{r['task']} {r['metric']} {r['n']}" for r in rows) + ".",
        f"Configs {listed(r['config'] for r in rows)}; commits {listed(r['commit'] for r in rows)}.",
    ]
    if seeds := listed(str(row["seed"]) for row in sorted(rows, key=lambda r: r.get("seed", 0)) if "seed" in row):
        notes.append(f"Means over the seeds {seeds}. ±: sample standard deviation of Avg, and of Δ taken seed by seed.")
    if hardware := listed(row["hardware"] for row in rows if "hardware" in row):
        notes.append(
            "Time: of a merge, merging and writing it; of FDA, construction with that initialisation and adaptation, "
            "without the merge that it starts from. Memory: the most taken meanwhile, by the process (CPU) or by "
            f"tensors on the device (CUDA). Measured on {hardware}."
        )
    used = {
        f"{row_name(row)} {n} of {task} ({row['data']['split']})"
        for row in rows
        if "data" in row and row["method"] != "fda"
        for task, n in row["data"]["examples"].items()
    }
    if used:
        notes.append("Inputs of the tasks that merges used: " + ", ".join(sorted(used)) + ".")
    if published:
        notes.append(f"(paper): {published['title']}, {published['source']}; see configs/paper_results.yaml.")
    return "\n\n".join(notes) + "\n"
