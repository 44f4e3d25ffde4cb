"""Figures of a run's scores: by task, and against what they took."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.config import PRETRAINED
from common.evaluation.rows import INDIVIDUAL, Row, display, rank, row_name, values_by_name
from common.report.charts import Chart, Panel, Spec, layers, named, quantity, tips
from common.report.reading import RunRecord

WIDE, HIGH = 0.2, 0.06  # of a name in a figure, as shares of it on a phone


def accuracy(run: RunRecord) -> Chart | None:
    """A panel a start: every score from the start to what was adapted from it, between floor and ceiling."""
    if not run.rows:
        return None
    scale, tasks = 100 if run.percent else 1, [*run.tasks, "Avg"]
    at = {n: [scale * v for v in values] for n, values in values_by_name(run.rows, run.tasks).items()}
    adapted = {row_name(row): row for row in sorted(run.rows, key=rank) if row["method"] == "fda"}
    starts = {row["start"] for row in adapted.values()} | {row["method"] for row in run.rows}
    starts -= {"fda", INDIVIDUAL, *([PRETRAINED] if adapted and not made_of(adapted, PRETRAINED) else [])}
    order = sorted(starts, key=lambda start: rank({"method": start}))
    kinds = list(dict.fromkeys(kind_of(row) for row in adapted.values()))
    metrics = {row["metric"] for row in run.rows}
    label = f"{metrics.pop() if len(metrics) == 1 else 'score'}{' (%)' if run.percent else ''}"
    panels = []
    for start in order:
        ends = {end: at.get(display(end)) for end in (PRETRAINED, INDIVIDUAL)} | {"start": at.get(display(start))}
        data = [
            {"task": task, "what": what, "x": values[i]}
            for what, values in ends.items()
            for i, task in enumerate(tasks)
            if values and values[i] == values[i]
        ]
        data += [
            {"task": task, "what": "fda", "kind": kind_of(row), "x": at[name][i]}
            | ({"from": ends["start"][i]} if ends["start"] else {})
            for name, row in made_of(adapted, start).items()
            for i, task in enumerate(tasks)
            if at[name][i] == at[name][i]
        ]
        alt = f"{label} by task from {display(start)}; the numbers are in the table of results."
        panels.append(Panel(display(start), alt, accuracy_panel(data, tasks, kinds, label)))
    caption = (
        "Ticks: the pretrained model (faint) and each task's own expert (strong), floor and ceiling. Ring: the start; "
        "dots: what was adapted from it."
    )
    return Chart(caption, panels, kinds)


def made_of(adapted: Mapping[str, Row], start: str) -> dict[str, Row]:
    return {name: row for name, row in adapted.items() if row["start"] == start}


def kind_of(row: Row) -> str:
    """What tells the adapted models of one start apart."""
    return f"FDA, {display(row['init'])} {row.get('label') or ''}".rstrip()


def accuracy_panel(data: Sequence[Spec], tasks: Sequence[str], kinds: Sequence[str], label: str) -> Spec:
    y = named("task", sort=list(tasks), axis={"labelLimit": 110})
    x = quantity("x", label, zero=False)
    shift = {"yOffset": named("kind", sort=list(kinds))} if len(kinds) > 1 else {}
    colour = {"color": named("kind", scale={"domain": list(kinds)}, legend=None)}
    tip = tips(("task", "task"), ("what", "model"), ("kind", "anchors"), ("x", label, ".4~f"))

    def of(what: str, mark: Spec, **encoding: Any) -> Spec:
        return {"transform": [{"filter": {"field": "what", "equal": what}}], "mark": mark, "encoding": encoding}

    return layers(
        data,
        of("fda", {"type": "rule", "strokeWidth": 2}, y=y, x=x, x2={"field": "from"}, **shift, **colour),
        of(PRETRAINED, {"type": "tick", "thickness": 2, "style": "floor"}, y=y, x=x, tooltip=tip),
        of(INDIVIDUAL, {"type": "tick", "thickness": 2, "style": "ceiling"}, y=y, x=x, tooltip=tip),
        of("fda", {"type": "point", "filled": True, "size": 45}, y=y, x=x, tooltip=tip, **shift, **colour),
        of("start", {"type": "point", "style": "ring", "size": 45}, y=y, x=x, tooltip=tip),
        height=22 * len(tasks) + 10 * len(tasks) * max(0, len(kinds) - 1),
    )


def seconds(runs: Sequence[RunRecord]) -> Chart | None:
    """Mean score against what it took to make each model, its start included."""
    data = [point for run in runs for point in points_of(run)]
    if not data:
        return None
    data = [
        point | {"shown": point["label"] if free else ""} for point, free in zip(data, have_room(data), strict=True)
    ]
    by_run = len(runs) > 1
    groups = [run.name for run in runs] if by_run else list(dict.fromkeys(point["kind"] for point in data))
    hardware = ", ".join(dict.fromkeys(row["hardware"] for run in runs for row in run.rows if "hardware" in row))
    caption = (
        "What it took to make a model from the experts: of a merge, merging and writing; of FDA, its start, the "
        f"construction of the anchors and the adaptation. Names are those of the starts. Measured on {hardware}."
    )
    alt = "Mean score against seconds of each model; the numbers are in the table of results."
    return Chart(caption, [Panel("", alt, seconds_panel(data, groups, by_run, runs[0].percent))], groups)


def points_of(run: RunRecord) -> list[dict[str, Any]]:
    """Of every model whose cost is known a point: seconds, and the mean score over tasks and seeds."""
    averages = {name: values[-1] for name, values in values_by_name(run.rows, run.tasks).items()}
    known = [row for row in run.rows if "seconds" in row]
    spent: dict[str, list[float]] = {}
    for (name, _), row in {(row_name(row), row.get("seed")): row for row in known}.items():
        spent.setdefault(name, []).append(row["seconds"])
    points = []
    for name, row in {row_name(row): row for row in sorted(known, key=rank)}.items():
        start = display(row["start"]) if row["method"] == "fda" else ""
        if averages[name] == averages[name]:
            took = sum(sum(spent[made]) / len(spent[made]) for made in (name, start) if made in spent)
            point = {"name": name, "label": start or name, "run": run.name, "kind": kind_of(row) if start else "merge"}
            average = averages[name] * (100 if run.percent else 1)
            points.append(point | {"seconds": max(took, 0.01), "avg": average})
    return points


def seconds_panel(data: list[dict[str, Any]], groups: Sequence[str], by_run: bool, percent: bool) -> Spec:
    """Points with their names where there is room; colours tell runs apart, or kinds of models within one."""
    x = quantity("seconds", "seconds", type="log", nice=True) | {"axis": {"tickCount": 4}}
    y = quantity("avg", "Avg (%)" if percent else "Avg", zero=False)
    colour = named("run" if by_run else "kind", scale={"domain": groups}, legend=None)
    tip = tips(("name", "model"), ("run", "run"), ("seconds", "seconds", ".1f"), ("avg", "Avg", ".2f"))
    shape = {"shape": named("kind", "", legend={"orient": "bottom", "columns": 2})} if by_run else {}
    return layers(
        data,
        {
            "mark": {"type": "point", "filled": True, "size": 70, "opacity": 0.9},
            "encoding": {"x": x, "y": y, "color": colour, "tooltip": tip, **shape},
        },
        *([] if by_run else [start_above(x, y)]),
        height=320,
    )


def have_room(data: Sequence[Spec]) -> list[bool]:
    """Which points have room for a name above: no other that has one lies nearer than a name is WIDE and HIGH, in
    shares of the axes. That of seconds shows whole decades."""
    at = [(math.log10(point["seconds"]), point["avg"]) for point in data]
    (left, *_, right), (low, *_, high) = (sorted([*axis, *axis]) for axis in zip(*at, strict=True))
    decades, heights = max(math.ceil(right) - math.floor(left), 1), max(high - low, 1e-9)
    kept: list[tuple[float, float]] = []
    free = []
    for x, y in ((x / decades, y / heights) for x, y in at):
        free.append(all(abs(x - other) > WIDE or abs(y - above) > HIGH for other, above in kept))
        if free[-1]:
            kept.append((x, y))
    return free


def start_above(x: Spec, y: Spec) -> Spec:
    mark = {"type": "text", "dy": -9, "fontSize": 10, "limit": 130}
    return {"mark": mark, "encoding": {"x": x, "y": y, "text": {"field": "shown"}}}
