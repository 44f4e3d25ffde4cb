"""Tables and figures of scripts/study.py, from the rows that it keeps.

A row of a number that is varied (tasks, rates, scale, real): {"at": the number, "start", "init", "norm": mean ‖τ‖/‖θ₀‖,
"pretrained", "individual", "avg": of the start, "fda", "gain": [mean, low, high]}; of ablations: {"what", "at", "fda",
"gain": against the own}; of cost and methods: {"name", "start": of an adapted model, "avg", "seconds", "cpu_seconds",
"step_seconds", "step_cpu_seconds": without the start's, "gain": over the pretrained model, "step": over the start,
"hardware"}. Scores are fractions.
"""

from functools import partial
from math import log
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from common.config import PRETRAINED
from common.evaluation.figures import COLOURS, DOT, FAINT, GREY, INK, RING, legend, save
from common.evaluation.rows import INDIVIDUAL, display
from common.evaluation.significance import Difference, difference_in_words
from common.evaluation.tables import aligned
from common.merging.registry import METHODS

Rows = list[dict[str, Any]]


def table_of(kind: str, rows: Rows, percent: bool) -> str:
    """The rows of a study in Markdown; `percent` prints hundredths of a percent, else fractions."""
    lines = {"ablations": ablation_lines, "cost": cost_lines, "methods": method_lines}
    return aligned(lines.get(kind, partial(point_lines, kind))(rows, percent))


def point_lines(kind: str, rows: Rows, percent: bool) -> list[list[str]]:
    """A line for each point and start."""
    head = {"tasks": "Tasks", "scale": "Scale", "rates": "Rate", "real": "Inputs"}[kind]
    lines = [[head, "‖τ‖/‖θ₀‖", "Pretrained", "Individual", "Start", "Avg", "FDA", "Δ"]]
    for row in rows:
        values = [value(row[key], percent) for key in (PRETRAINED, INDIVIDUAL)]
        ends = [value(row[key], percent) for key in ("avg", "fda")]
        gain = difference_in_words(Difference(*row["gain"]), percent)
        lines.append([f"{row['at']:g}", f"{100 * row['norm']:.1f} %", *values, display(row["start"]), *ends, gain])
    return lines


def ablation_lines(rows: Rows, percent: bool) -> list[list[str]]:
    """A line for each change."""
    lines = [["Changed", "To", "FDA (Pretrained)", "Against the config's own"]]
    for row in rows:
        gain = difference_in_words(Difference(*row["gain"]), percent) if row["at"] else ""
        lines.append([row["what"], row["at"], value(row["fda"], percent), gain])
    return lines


def cost_lines(rows: Rows, percent: bool) -> list[list[str]]:
    """A line for each model: seconds by the clock and of the processors, and what a point more than its start costs."""
    lines = [["Method", "Avg", "Seconds", "Processor seconds", "Gain over its start", "Processor seconds a point"]]
    for row in rows:
        gain = Difference(*row["step"])
        points = 100 * gain.mean
        each = f"{row['step_cpu_seconds'] / points:.1f}" if gain.verdict == "better" else gain.verdict
        spent = [f"{row[key]:.1f}" for key in ("seconds", "cpu_seconds")]
        lines.append([row["name"], value(row["avg"], percent), *spent, value(gain.mean, percent, "+"), each])
    return lines


def method_lines(rows: Rows, percent: bool) -> list[list[str]]:
    """A line for each start, the best first: its mean and seconds, and those of FDA from it with what it gained."""
    lines = [["Start", "Data", "Avg", "Processor seconds", "FDA", "Processor seconds of it", "Δ"]]
    alone = {row["name"]: row for row in rows if not row["start"]}
    adapted = {display(row["start"]): row for row in rows if row["start"]}
    start = {name: row["avg"] - row["step"][0] for name, row in adapted.items()}
    start |= {name: row["avg"] for name, row in alone.items()}
    for name in sorted(start, key=lambda name: -start[name]):
        seconds = f"{alone[name]['cpu_seconds']:.1f}" if name in alone else ""
        line = [name, split_of(name), value(start[name], percent), seconds]
        if fda := adapted.get(name):
            gain = difference_in_words(Difference(*fda["step"]), percent)
            line += [value(fda["avg"], percent), f"{fda['cpu_seconds']:.0f}", gain]
        lines.append([*line, *[""] * (len(lines[0]) - len(line))])
    return lines


def split_of(start: str) -> str:
    """The split of the tasks' data that a start is given inputs of, by the name that tables call it; "" if of none."""
    splits = {row.label: row.data.split for row in METHODS.values() if row.data}
    return next((splits[part] for part in start.split(" + ") if part in splits), "")


def value(fraction: float, percent: bool, sign: str = "") -> str:
    return f"{100 * fraction:{sign}.2f}" if percent else f"{fraction:{sign}.4f}"


def draw_gains(rows: Rows, path: Path, percent: bool) -> None:
    """FDA's gain against the size of the task vectors, a line a start, with intervals (PNG)."""
    scale = 100 if percent else 1
    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for start, colour in zip(dict.fromkeys(row["start"] for row in rows), COLOURS, strict=False):
        points = [row for row in rows if row["start"] == start]
        x, gains = [100 * row["norm"] for row in points], [[scale * g for g in row["gain"]] for row in points]
        errors = [[mean - low for mean, low, _ in gains], [high - mean for mean, _, high in gains]]
        axes.errorbar(x, [g[0] for g in gains], errors, color=colour, marker="o", markersize=4, label=display(start))
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xscale("log")
    norms = sorted({row["norm"] for row in rows})
    axes.set_xticks([100 * norm for norm in norms], [f"{100 * norm:.1f}" for norm in norms])
    axes.minorticks_off()
    axes.set_xlabel("‖τ‖/‖θ₀‖ of the blocks, mean over the experts (%)")
    axes.set_ylabel("FDA minus its start (points)" if percent else "FDA minus its start")
    axes.legend(frameon=False, title="start", loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def draw_methods(rows: Rows, path: Path, percent: bool) -> None:
    """Scores against processor seconds, a ring for each start and a dot for FDA from it, joined by a line whose colour
    says whether FDA is better (PNG). Named are the starts that no cheaper one equals, as far as there is room, and the
    best FDA."""
    figure, scale = Figure(figsize=(8, 5), dpi=120, layout="constrained"), 100 if percent else 1
    axes = figure.subplots()
    alone = [row for row in rows if not row["start"]]
    of_start = {row["name"]: row for row in alone}
    for row in rows:
        if row["start"]:
            colour = VERDICTS[Difference(*row["step"]).verdict]
            axes.plot(row["cpu_seconds"], scale * row["avg"], "o", color=colour, markersize=5, zorder=3)
            if own := of_start.get(display(row["start"])):
                ends = [own["cpu_seconds"], row["cpu_seconds"]], [scale * own["avg"], scale * row["avg"]]
                axes.plot(*ends, color=colour, linewidth=0.7, alpha=0.6)
    for row in alone:
        axes.plot(row["cpu_seconds"], scale * row["avg"], "o", color=INK, markerfacecolor="white", zorder=4)
    named = [row for row in alone if not any(beats(other, row) for other in alone)]
    named += sorted((row for row in rows if row["start"]), key=lambda row: row["avg"])[-1:]
    span = axes.get_ylim()[1] - axes.get_ylim()[0]
    for row in apart(named, span / scale):
        at = (row["cpu_seconds"], scale * row["avg"])
        axes.annotate(row["name"], at, xytext=(0, 6), textcoords="offset points", ha="center", va="bottom", fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.1, y=0.1)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("processor seconds, of FDA with those of its anchors and start")
    axes.set_ylabel("mean over the tasks (%)" if percent else "mean over the tasks")
    marks = [Line2D([], [], label="merge", **RING)]
    marks += [Line2D([], [], label=f"FDA from it: {verdict}", **DOT, color=c) for verdict, c in VERDICTS.items()]
    legend(figure, marks)
    save(figure, path)


def apart(named: Rows, span: float) -> Rows:
    """Of some rows those whose names do not lie upon each other in a figure of so large a span, the best first."""
    kept: Rows = []
    for row in sorted(named, key=lambda row: -row["avg"]):
        if all(
            abs(row["avg"] - other["avg"]) > span / 25 or abs(log(row["cpu_seconds"] / other["cpu_seconds"])) > log(4)
            for other in kept
        ):
            kept.append(row)
    return kept


def beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether one merge is no dearer and scores higher, or is cheaper and scores as high."""
    dear, good = one["cpu_seconds"] - other["cpu_seconds"], one["avg"] - other["avg"]
    return dear <= 0 <= good and (dear, good) != (0, 0)


VERDICTS = {"better": COLOURS[2], "worse": COLOURS[1], "not told apart": GREY}
FIGURES = {"rates": draw_gains, "scale": draw_gains, "methods": draw_methods}  # of (rows, path, percent)
