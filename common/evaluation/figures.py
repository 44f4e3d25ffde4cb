"""results.json and the anchors' traces as figures, and the report of a run: its table and figures in files."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from common.config import PRETRAINED
from common.evaluation.rows import INDIVIDUAL, Row, Values, display, rank, row_name, values_by_name
from common.evaluation.tables import by_start, footnotes, of_fewer_seeds, table
from common.io.checkpoints import replacing, write_text

Traces = Mapping[tuple[str, int], Sequence[float]]  # (task, block): mean over tensors of 1 - cos, one value a step

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F3C8D", "#4D4D4D")  # Okabe, Ito and two
STYLES: tuple[Any, ...] = ("-", "--", ":", "-.")  # one round of colours each
INK, GREY, FAINT = "#222222", "#999999", "#e6e6e6"
TICK: dict[str, Any] = {"linestyle": "none", "marker": "|", "markersize": 14, "markeredgewidth": 1.8}
DOT: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 5}
RING: dict[str, Any] = DOT | {"markerfacecolor": "white", "markeredgecolor": INK}


def plot_matching(traces: Traces, path: Path | str, *, init: str) -> None:
    """The matching loss of every anchor set while it was optimised: a panel a block, a line a task (PNG).

    0: the gradient points along the task vector in every parameter tensor; 1: at right angles to it.
    """
    tasks = list(dict.fromkeys(task for task, _ in traces))
    blocks = sorted({block for _, block in traces})
    columns = min(len(blocks), 4 if len(blocks) <= 12 else 6 if len(blocks) <= 24 else 8)
    lines = math.ceil(len(blocks) / columns)
    size = (2.1 * columns + 1.7, 1.75 * lines + 1)
    figure, grid = panels(size, lines, columns, len(blocks))
    for axes, block in zip(grid, blocks, strict=False):
        draw_traces(axes, {task: traces.get((task, block), ()) for task in tasks})
        axes.set_title(f"block {block}", fontsize=9, color=INK, pad=3)
    grid[0].set_ylim(bottom=0)
    grid[0].set_xlim(left=0)
    figure.suptitle(f"Gradient matching from {display(init)} initialisation", fontsize=12, color=INK)
    figure.supxlabel("construction step", fontsize=10, color=INK)
    figure.supylabel("mean 1 − cos", fontsize=10, color=INK)
    looks = zip(tasks, line_looks(len(tasks)), strict=True)
    legend(figure, [Line2D([], [], color=c, linestyle=s, linewidth=2.5, label=t) for t, (c, s) in looks])
    save(figure, path)


def draw_traces(axes: Axes, traces: Mapping[str, Sequence[float]]) -> None:
    """A line for each task, in a look of its own."""
    for (task, trace), (colour, style) in zip(traces.items(), line_looks(len(traces)), strict=True):
        axes.plot(trace, color=colour, linestyle=style, linewidth=1.1, label=task)


def line_looks(count: int) -> list[tuple[str, Any]]:
    """Colour and style of so many lines, which can be told apart."""
    return [(COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]) for i in range(count)]


def plot_accuracy(rows: Iterable[Row], tasks: Sequence[str], path: Path | str, percent: bool = True) -> None:
    """Every score (PNG): a panel a merge, a line a task; from the merge to the FDA models adapted from it.

    Ticks on each line: the pretrained model (grey) and the task's own expert (black), floor and ceiling.
    """
    rows = list(rows)
    scale = 100 if percent else 1
    at = {name: [scale * v for v in values] for name, values in values_by_name(rows, tasks).items()}
    nowhere = [math.nan] * (len(tasks) + 1)
    inits = list(dict.fromkeys(row["init"] for row in sorted(rows, key=rank) if row["method"] == "fda"))
    starts = {row["start"] if row["method"] == "fda" else row["method"] for row in rows} - {PRETRAINED, INDIVIDUAL}
    if not starts or any(row.get("start") == PRETRAINED for row in rows):
        starts.add(PRETRAINED)
    columns = 2 if len(starts) == 4 else min(len(starts), 3)
    lines = math.ceil(len(starts) / columns)
    size = (3.4 * columns + 2, (0.3 * len(tasks) + 0.9) * lines + 0.5)
    figure, grid = panels(size, lines, columns, len(starts))
    for axes, start in zip(grid, sorted(starts, key=lambda s: rank({"method": s})), strict=False):
        names = [row_name({"method": "fda", "start": start, "init": init}) for init in inits]
        draw_gains(axes, at.get(display(start), nowhere), [at.get(name, nowhere) for name in names])
        axes.plot(at.get("Pretrained", nowhere), range(len(nowhere)), **TICK, color=GREY, zorder=1)
        axes.plot(at.get("Individual", nowhere), range(len(nowhere)), **TICK, color=INK, zorder=5)
        axes.axhline(len(tasks) - 0.5, color=GREY, linewidth=0.8)
        axes.set_title(
            f"from {display(start)}" if any(name in at for name in names) else display(start), fontsize=10, color=INK
        )
    grid[0].set_yticks(range(len(tasks) + 1), [*tasks, "Avg"])
    grid[0].invert_yaxis()
    metrics = {row["metric"] for row in rows}
    label = metrics.pop() if len(metrics) == 1 else "score"
    figure.supxlabel(f"{label} (%)" if percent else label, fontsize=10, color=INK)
    marks = [
        Line2D([], [], label=PRETRAINED, **TICK, color=GREY),
        Line2D([], [], label=INDIVIDUAL, **TICK, color=INK),
    ]
    marks += [Line2D([], [], label="start", **RING)]
    marks += [Line2D([], [], label=f"FDA, {display(i)}", **DOT, color=c) for i, c in zip(inits, COLOURS, strict=False)]
    legend(figure, marks)
    save(figure, path)


def draw_gains(axes: Axes, start: Values, adapted: Sequence[Values]) -> None:
    """From the start of each line, a ring, to the adapted models, dots; one initialisation above the other."""
    for i, (values, colour) in enumerate(zip(adapted, COLOURS, strict=False)):
        heights = [y + 0.36 * (i - (len(adapted) - 1) / 2) for y in range(len(values))]
        axes.hlines(heights, start, values, color=colour, linewidth=1.6)
        axes.plot(values, heights, **DOT, color=colour, zorder=3)
    axes.plot(start, range(len(start)), **RING, zorder=4)


def draw_names(axes: Axes, places: Mapping[str, tuple[float, float]]) -> None:
    """The name of each point beside it, above or below, if it covers none that is there. The axes keep their limits."""
    drawn: list[tuple[float, float, float]] = []  # begin, end and height of names, in shares of the axes
    for name, place in places.items():
        begin, y = axes.transLimits.transform(place)
        end = begin + 0.014 * len(name)
        for height, offset in ((y + 0.015, 3), (y - 0.025, -8)):
            if all(end < i or begin > j or abs(height - other) > 0.025 for i, j, other in drawn):
                drawn.append((begin, end, height))
                axes.annotate(name, place, (4, offset), textcoords="offset points", fontsize=6, color=INK)
                break


def plot_front(found: Mapping[str, Any], path: Path | str, percent: bool = True) -> None:
    """What `common.evaluation.front` writes of a Pareto front (PNG): a line a point over the test sets, thin where it
    was foreseen, with dots where it was measured, black if chosen; of two test sets one against the other.
    """
    tests, scale = list(found["surrogates"]), 100 if percent else 1
    foreseen = [[scale * point["foreseen"][test] for test in tests] for point in found["front"]]
    measured = [[scale * point["scores"][test] for test in tests] for point in found["tried"]]
    chosen = [i == found["chosen"] for i in range(len(measured))]
    figure, (axes,) = panels((6.4 if len(tests) == 2 else 2.4 + 0.8 * len(tests), 4.0), 1, 1, 1)
    unit = " (%)" if percent else ""
    if len(tests) == 2:
        axes.plot(*zip(*foreseen, strict=True), linestyle="none", marker=".", markersize=3, color=COLOURS[0])
        for values, best in zip(measured, chosen, strict=True):
            axes.plot(*values, **DOT, color=INK if best else COLOURS[1], zorder=3 + best)
        axes.set_xlabel(f"{tests[0]}{unit}", color=INK)
        axes.set_ylabel(f"{tests[1]}{unit}", color=INK)
    else:
        places = range(len(tests))
        for values in foreseen:
            axes.plot(places, values, color=COLOURS[0], linewidth=0.4, alpha=0.4)
        for values, best in zip(measured, chosen, strict=True):
            axes.plot(places, values, color=INK if best else COLOURS[1], marker="o", markersize=4, zorder=3 + best)
        axes.set_xticks(places, tests, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_ylabel(f"score{unit}", color=INK)
    marks = [Line2D([], [], color=COLOURS[0], linewidth=1, label="front, as foreseen")]
    marks += [Line2D([], [], **DOT, color=COLOURS[1], label="tried"), Line2D([], [], **DOT, color=INK, label="chosen")]
    legend(figure, marks)
    save(figure, path)


def panels(
    size: tuple[float, float], lines: int, columns: int, count: int, shared: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` plain panels, with shared axes or each with its own, and the panels."""
    figure = Figure(figsize=size, dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    grid = figure.subplots(lines, columns, sharex=shared, sharey=shared, squeeze=False).ravel()
    for i, axes in enumerate(grid):
        axes.set_visible(i < count)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(length=0, labelsize=8, labelcolor=INK, labelbottom=not shared or i + columns >= count)
        axes.grid(color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, list(grid[:count])


def legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9, labelspacing=0.8)


def save(figure: Figure, path: Path | str) -> None:
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png")


def write_report(
    run_dir: Path | str,
    rows: Sequence[Row],
    tasks: Sequence[str],
    traces: Mapping[str, Traces],
    findings: Sequence[str] = (),
    *,
    percent: bool = True,
    published: Mapping | None = None,
) -> list[Path]:
    """Write table.md, with the findings behind the table, accuracy.png and, per initialisation in `traces`,
    matching_<init>.png; return their paths."""
    folder = Path(run_dir)
    paths = []
    if rows:
        paths += [folder / "table.md", folder / "accuracy.png"]
        text = table(rows, tasks, percent=percent, published=published)
        text += f"\n{fewer}\n" if (fewer := of_fewer_seeds(rows)) else ""
        short = by_start(rows, tasks, percent=percent) + "\n" if any(row["method"] == "fda" for row in rows) else ""
        said = "".join(f"- {finding}\n" for finding in findings) + "\n" * bool(findings)
        write_text(paths[0], text + "\n" + short + said + footnotes(rows, published, bool(findings)))
        plot_accuracy(rows, tasks, paths[1], percent)
    for init, curves in traces.items():
        paths.append(folder / f"matching_{init}.png")
        plot_matching(curves, paths[-1], init=init)
    return paths
