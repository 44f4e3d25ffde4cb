"""Tables and figures of scripts/study.py, from the rows that it keeps.

A row of a number that is varied (tasks, rates, scale, real): {"at": the number, "start", "init", "norm": mean ‖τ‖/‖θ₀‖,
"pretrained", "individual", "avg": of the start, "fda", "gain": [mean, low, high]}; of ablations: {"what", "at", "fda",
"gain": against the own}; of cost: {"name", "avg", "seconds", "cpu_seconds", "step_seconds", "step_cpu_seconds":
without the start's, "gain": over the pretrained model, "step": over the start, "hardware"}. Scores are fractions.
"""

from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.config import PRETRAINED
from common.evaluation.figures import COLOURS, GREY, save
from common.evaluation.rows import display
from common.evaluation.significance import Difference, in_words
from common.evaluation.tables import aligned

Rows = list[dict[str, Any]]


def table_of(kind: str, rows: Rows, percent: bool) -> str:
    """The rows of a study in Markdown; `percent` prints hundredths of a percent, else fractions."""
    return aligned(
        {"ablations": ablation_lines, "cost": cost_lines}.get(kind, partial(point_lines, kind))(rows, percent)
    )


def point_lines(kind: str, rows: Rows, percent: bool) -> list[list[str]]:
    """A line for each point and start."""
    head = {"tasks": "Tasks", "scale": "Scale", "rates": "Rate", "real": "Inputs"}[kind]
    lines = [[head, "‖τ‖/‖θ₀‖", "Pretrained", "Individual", "Start", "Avg", "FDA", "Δ"]]
    for row in rows:
        values = [value(row[key], percent) for key in (PRETRAINED, "individual")]
        ends = [value(row[key], percent) for key in ("avg", "fda")]
        gain = in_words(Difference(*row["gain"]), percent)
        lines.append([f"{row['at']:g}", f"{100 * row['norm']:.1f} %", *values, display(row["start"]), *ends, gain])
    return lines


def ablation_lines(rows: Rows, percent: bool) -> list[list[str]]:
    """A line for each change."""
    lines = [["Changed", "To", "FDA (Pretrained)", "Against the config's own"]]
    for row in rows:
        gain = in_words(Difference(*row["gain"]), percent) if row["at"] else ""
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


def value(fraction: float, percent: bool, sign: str = "") -> str:
    return f"{100 * fraction:{sign}.2f}" if percent else f"{fraction:{sign}.4f}"


def draw(rows: Rows, path: Path) -> None:
    """FDA's gain against the size of the task vectors, a line a start, with intervals (PNG)."""
    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for start, colour in zip(dict.fromkeys(row["start"] for row in rows), COLOURS, strict=False):
        points = [row for row in rows if row["start"] == start]
        x, gains = [100 * row["norm"] for row in points], [[100 * g for g in row["gain"]] for row in points]
        errors = [[mean - low for mean, low, _ in gains], [high - mean for mean, _, high in gains]]
        axes.errorbar(x, [g[0] for g in gains], errors, color=colour, marker="o", markersize=4, label=display(start))
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xscale("log")
    norms = sorted({row["norm"] for row in rows})
    axes.set_xticks([100 * norm for norm in norms], [f"{100 * norm:.1f}" for norm in norms])
    axes.minorticks_off()
    axes.set_xlabel("‖τ‖/‖θ₀‖ of the blocks, mean over the experts (%)")
    axes.set_ylabel("FDA minus its start (points)")
    axes.legend(frameon=False, title="start", loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
