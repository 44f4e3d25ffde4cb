"""Figures of what a run went through: losses, task vectors, seconds."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.report.charts import COLOURS, DASHES, Chart, Panel, Spec, layers, named, quantity, tips
from common.report.reading import RunRecord
from common.report.vectors import cosines, relative

POINTS = 80  # of a curve


def thinned(curve: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most POINTS + 1 steps of a curve, its first and its last among them, and what it is there."""
    every = max(1, -(-(len(curve) - 1) // POINTS))
    steps = [*range(0, len(curve) - 1, every), len(curve) - 1] if curve else []
    return steps, [float(f"{curve[step]:.4g}") for step in steps]


def matching(run: RunRecord, init: str) -> Chart:
    """A panel a block, a line a task: the matching loss while anchors were optimised."""
    curves = run.matching[init]
    tasks = [task for task in run.config["tasks"] if any(task == t for t, _ in curves)]
    tasks += sorted({task for task, _ in curves} - set(tasks))
    panels = []
    for block in sorted({block for _, block in curves}):
        of_block = {task: curves[task, block] for task in tasks if (task, block) in curves}
        panels.append(Panel(f"block {block}", said_of(of_block), lines(of_block, tasks, "step", [0, 1])))
    caption = (
        "Mean over the tensors of 1 − cos: 0, the gradient points along the task vector; 1, at right angles to it."
    )
    return Chart(caption, panels, tasks)


def said_of(curves: Mapping[str, Sequence[float]]) -> str:
    return "; ".join(f"{name} from {c[0]:.3f} to {min(c):.3f}" for name, c in curves.items() if c)


def lines(curves: Mapping[str, Sequence[float]], names: Sequence[str], steps: str, least: Sequence[float]) -> Spec:
    """Curves of some of `names`, whose places there are their colours. least: the least range of the values shown."""
    data = [{"name": name, "x": at, "y": values} for name, c in curves.items() for at, values in [thinned(c)]]
    dashes = [DASHES[i // COLOURS % len(DASHES)] for i in range(len(names))]
    one = {"type": "line", "strokeWidth": 1.5, "clip": True}
    encoding = {
        "x": quantity("x", steps, nice=False),
        "y": quantity("y", None, domainMin=least[0], **({"domainMax": least[1]} if reach(curves) <= least[1] else {})),
        "color": named("name", scale={"domain": list(names)}, legend=None),
        "strokeDash": named("name", scale={"domain": list(names), "range": dashes}, legend=None),
        "tooltip": tips(("name", "task"), ("x", steps), ("y", "loss", ".4f")),
    }
    return layers(data, {"mark": one, "encoding": encoding}, height=130, transform=[{"flatten": ["x", "y"]}])


def reach(curves: Mapping[str, Sequence[float]]) -> float:
    return max((value for curve in curves.values() for value in curve), default=0)


def adaptation(run: RunRecord) -> Chart | None:
    """A panel a model, a line a block: the adaptation loss over the epochs."""
    panels, names = [], {made.folder: made.name for made in run.made}
    for folder, curves in sorted(run.adapted.items(), key=lambda item: list(names).index(item[0]) if names else 0):
        data = [
            {"block": block, "x": [step + 1 for step in at], "y": values}
            for block, curve in curves.items()
            for at, values in [thinned(curve)]
        ]
        positive = all(value > 0 for curve in curves.values() for value in curve)
        encoding = {
            "x": quantity("x", "epoch", nice=False),
            "y": quantity("y", None, type="log" if positive else "linear") | {"axis": {"tickCount": 3}},
            "color": {
                "field": "block",
                "type": "quantitative",
                "scale": {"range": "heatmap"},
                "legend": {"tickMinStep": 1},
            },
            "tooltip": tips(("block", "block"), ("x", "epoch"), ("y", "loss", ".4~g")),
        }
        mark = {"type": "line", "strokeWidth": 1.5, "point": {"size": 12}}
        spec = layers(data, {"mark": mark, "encoding": encoding}, height=170, transform=[{"flatten": ["x", "y"]}])
        alt = said_of({f"block {block}": curve for block, curve in curves.items()})
        panels.append(Panel(names.get(folder, folder), alt, spec))
    if not panels or not any(curve for curves in run.adapted.values() for curve in curves.values()):
        return None
    return Chart("Mean loss per anchor in each epoch, a line a block, on a logarithmic axis where it can be.", panels)


def norms(found: Mapping[str, Any]) -> Chart:
    """‖τ‖/‖θ₀‖ by block and task."""
    data = [
        {"task": task, "block": block, "value": 100 * value}
        for task, values in relative(found).items()
        for block, value in enumerate(values)
    ]
    spec = heatmap(data, ("block", "block"), ("task", None), "ramp", ".1f", list(found["tasks"]))
    alt = "The size of each task vector by block; the numbers are in the table below."
    return Chart("‖τ‖/‖θ₀‖ of each block in percent.", [Panel("", alt, spec)])


def angles(found: Mapping[str, Any]) -> Chart:
    """The cosine of each pair of task vectors."""
    tasks = list(found["tasks"])
    data = [
        {"task": a, "other": b, "value": value}
        for a, row in zip(tasks, cosines(found), strict=True)
        for b, value in zip(tasks, row, strict=True)
    ]
    spec = heatmap(data, ("other", None), ("task", None), "diverging", ".2f", tasks)
    alt = "The cosine of each pair of task vectors; the numbers are in the table below."
    return Chart("Cosine of the task vectors over all anchored blocks.", [Panel("", alt, spec)])


def heatmap(
    data: Sequence[Spec], x: tuple[str, str | None], y: tuple[str, str | None], colours: str, how: str, order: list[str]
) -> Spec:
    """Cells of a colour each, with their value written in them where there is room."""
    bounds = {"domain": [-1, 0, 1]} if colours == "diverging" else {"domainMin": 0}
    scale = {"range": colours, "interpolate": "rgb", **bounds}
    columns = len({d[x[0]] for d in data})
    axes = {
        "x": named(x[0], x[1], sort=order if x[0] == "other" else None, axis={"labelAngle": 0 if x[1] else -60}),
        "y": named(y[0], y[1], sort=order, axis={"labelLimit": 110}),
    }
    filled = {"field": "value", "type": "quantitative", "scale": scale, "legend": None}
    tip = tips((y[0], y[1] or y[0]), (x[0], x[1] or "and"), ("value", "value", ".4~g"))
    cells = {"mark": {"type": "rect"}, "encoding": {**axes, "color": filled, "tooltip": tip}}
    text = {"mark": {"type": "text", "fontSize": 10}, "encoding": {**axes, "text": {"field": "value", "format": how}}}
    height = max(60, 26 * len({d[y[0]] for d in data}))
    return layers(data, cells, *([text] if columns <= 12 else []), height=height)


def stages(run: RunRecord) -> Chart | None:
    """Seconds of each stage."""
    data = [{"stage": stage, "seconds": note["seconds"]} for stage, note in run.notes.items()]
    if not data:
        return None
    encoding = {
        "y": named("stage", sort=list(run.notes), axis={"labelLimit": 200}),
        "x": quantity("seconds", "seconds"),
        "tooltip": tips(("stage", "stage"), ("seconds", "seconds", ".1f")),
    }
    spec = layers(data, {"mark": {"type": "bar"}, "encoding": encoding}, height=20 * len(data) + 10)
    return Chart("", [Panel("", "Seconds of each stage; the numbers are in the table below.", spec)])
