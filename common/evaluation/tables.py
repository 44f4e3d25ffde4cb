"""Rows of results as the paper's table. Nothing here computes a score: rows come in scored."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev

from common.evaluation.rows import (
    INDIVIDUAL,
    Row,
    Values,
    display,
    in_same_rest,
    is_shown,
    means,
    rank,
    row_name,
    values_by_seed,
)
from common.evaluation.significance import DRAWS, LEVEL
from common.run.stages import seconds_in_words

MISSING = "–"
BOOTSTRAP = (
    f"better, worse: the {100 * LEVEL:.0f} % interval of the difference of Avg, in brackets, or of one task's score, "
    f"lies on one side of 0; by a paired bootstrap over the test examples, {DRAWS:,} draws. Each task is judged by "
    "itself: of twenty equal ones, one would be told apart."
)


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

    Δ (same rest) is against the start's blocks within the rest that the adapted ones have, if that is another for any
    row: what adaptation did, without what the rest does. `percent` prints hundredths of a percent, else fractions with
    four decimals. With several seeds cells are means, and Avg and Δ, taken seed by seed, have the sample standard
    deviation behind them unless all seeds scored one model.
    Time and Memory follow if any row has them. With `published`, one table of configs/paper_results.yaml, each row that
    the paper has is followed by the paper's values, marked "(paper)".
    """
    return aligned(table_lines(rows, tasks, percent=percent, published=published))


def table_lines(
    rows: Iterable[Row], tasks: Sequence[str], *, percent: bool = True, published: Mapping | None = None
) -> list[list[str]]:
    """The cells of `table`, its head first."""
    rows = list(rows)
    ours = values_by_seed(rows, tasks)
    paper = published_values(published, tasks) if published else {}
    adapted = {row_name(row): row for row in rows if row["method"] == "fda"}
    start_of = {name: display(row["start"]) for name, row in adapted.items()}
    timed, both = any("seconds" in row for row in rows), compares_rests(rows)
    same_rest = ["Δ (same rest)"] if both else []
    lines = [["Method", *tasks, "Avg", "Δ", *same_rest, *(["Time", "Memory"] if timed else [])]]
    for name, seeds in ours.items():
        of_name = [row for row in rows if row_name(row) == name]
        if not any(map(is_shown, of_name)):
            continue
        start, fixed = start_of.get(name, ""), is_fixed(of_name)
        values = [cell(value, percent) for value in means(seeds.values())[:-1]]
        average = spread([v[-1] for v in seeds.values()], percent, fixed)
        against = [start, *([in_same_rest(adapted[name]) if start else ""] if both else [])]
        gains = [gain_cell(seeds, ours.get(other, {}), percent, fixed) if start else "" for other in against]
        lines.append([name, *values, average, *gains, *(cost_cells(of_name) if timed else [])])
        if name in paper:
            start = paper.get(start_of.get(name, ""), [math.nan])
            gain = cell(paper[name][-1] - start[-1], percent, "+") if name in start_of else ""
            blank = [""] * (both + 2 * timed)
            lines.append(["(paper)", *(cell(value, percent) for value in paper[name]), gain, *blank])
    return lines


def gain_cell(
    seeds: Mapping[int | None, Values], starts: Mapping[int | None, Values], percent: bool, fixed: bool
) -> str:
    """Avg minus that of the start, seed by seed."""
    gains = [values[-1] - starts.get(seed, [math.nan])[-1] for seed, values in seeds.items()]
    return spread(gains, percent, fixed, "+")


def by_start(rows: Iterable[Row], tasks: Sequence[str], *, percent: bool = True) -> str:
    """A short table, a line a start: its Avg, then Avg and Δ of what each kind of anchors made of it, see `table`;
    Time is the merge's, and behind each Δ that of the anchors and the adaptation."""
    rows = sorted((row for row in rows if row["method"] != INDIVIDUAL and is_shown(row)), key=rank)
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
                line.append(spread([v[-1] for v in ours[name].values()], percent, fixed := is_fixed(of(name))))
                line += [gain_cell(ours[name], ours[start], percent, fixed), cost_cells(of(name))[0]]
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
    mean, apart = cell(fmean(values), percent, sign), deviation(values, fixed)
    return mean if apart is None else f"{mean} ± {cell(apart, percent)}"


def deviation(values: Values, fixed: bool) -> float | None:
    """The sample standard deviation; None where the values need be the same, or are not all there."""
    return None if fixed or len(values) < 2 or any(map(math.isnan, values)) else stdev(values)


def cost_cells(rows: Iterable[Row]) -> list[str]:
    """Seconds and GiB of the rows of one name in print, means over the seeds that have them."""
    costs = {row.get("seed"): (row["seconds"], row["peak_gib"]) for row in rows if "seconds" in row}
    if not costs:
        return [MISSING, MISSING]
    seconds, gib = means(costs.values())
    return [seconds_in_words(seconds), f"{gib:.2f} GiB"]


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


def compares_rests(rows: Sequence[Row]) -> bool:
    """Whether an adapted model has another rest than its start, and the start's blocks are there in that rest."""
    names = {row_name(row) for row in rows if not is_shown(row)}
    return any(row["method"] == "fda" and in_same_rest(row) in names for row in rows)


def same_rest_note(rows: Sequence[Row]) -> list[str]:
    """What Δ (same rest) is, where it is shown."""
    if not compares_rests(rows):
        return []
    return [
        "Δ (same rest): Avg minus the Avg of the start's blocks within what lies around the adapted blocks, which is "
        "the pretrained model unless adapt.rest is start."
    ]


def of_fewer_seeds(rows: Iterable[Row], names: Iterable[str] | None = None) -> str:
    """A line on the rows whose means are over fewer seeds than those of others, all or some by name; "" if none are."""
    seeds_of: dict[str, set[int]] = {}
    for row in sorted(filter(is_shown, rows), key=rank):
        seeds_of.setdefault(row_name(row), set()).update([row["seed"]] if "seed" in row else [])
    every, groups = set().union(*seeds_of.values()), dict[tuple[int, ...], list[str]]()
    for name, seeds in seeds_of.items():
        if seeds != every and (names is None or name in names):
            groups.setdefault(tuple(sorted(seeds)), []).append(name)
    named = (f"{', '.join(of)} (of {', '.join(map(str, seeds))})" for seeds, of in groups.items())
    return f"Means over fewer seeds than {', '.join(map(str, sorted(every)))}: {'; '.join(named)}." if groups else ""


def scored_on(rows: Sequence[Row]) -> str:
    """Metric and number of examples of each task, those of one kind together: accuracy on 600 of digits, letters."""
    groups: dict[tuple[str, int], dict[str, None]] = {}
    for row in rows:
        groups.setdefault((row["metric"], row["n"]), {})[row["task"]] = None
    each = len(groups) == 1
    return "; ".join(f"{m} on {n} of {'each task' if each else ', '.join(tasks)}" for (m, n), tasks in groups.items())


def footnotes(rows: Iterable[Row], published: Mapping | None, judged: bool = False) -> str:
    """What the numbers are and where they come from: metrics, examples, configs and commits; `judged` if differences
    are said with their intervals."""

    def listed(texts: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(texts))

    rows = sorted(rows, key=rank)
    notes = [
        "Avg: plain mean over the tasks. Δ: Avg minus the Avg of the model that adaptation started from.",
        *same_rest_note(rows),
        *([BOOTSTRAP] if judged else []),
        f"Metric and examples scored: {scored_on(rows)}.",
        f"Configs {listed(r['config'] for r in rows)}; "
        f"commits {listed(each for r in rows for each in (r.get('made', r['commit']), r['commit']))}.",
    ]
    if machines := listed(row["made_on"] for row in rows if "made_on" in row):
        notes.append(f"Made on {machines}.")
    seeds = sorted({row["seed"] for row in rows if "seed" in row})
    if len(seeds) == 1:
        notes.append(f"Seed {seeds[0]}.")
    elif seeds:
        deviation = "±: sample standard deviation of Avg, and of Δ taken seed by seed."
        notes.append(f"Means over the seeds {', '.join(map(str, seeds))}. {deviation}")
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
