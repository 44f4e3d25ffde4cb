"""The results of runs for their page: a table that can be sorted, what is better than what, and both to be copied."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from statistics import fmean
from typing import NamedTuple

from common.config import PRETRAINED
from common.evaluation.rows import INDIVIDUAL, Row, display, is_shown, rank, row_name, values_by_seed
from common.evaluation.significance import (
    Difference,
    Scores,
    average,
    difference,
    difference_in_words,
    findings,
    scores_of,
)
from common.evaluation.tables import deviation, footnotes, is_fixed, of_fewer_seeds, table_lines
from common.merging.registry import METHODS
from common.merging.starts import JOINED
from common.report.latex import latex_of
from common.report.lines import INTERVAL, Cell, Line
from common.report.reading import RunRecord

UNITS = {"s": 1, "min": 60, "h": 3600, "GiB": 1}


class Results(NamedTuple):
    """head: after the name. lines: each start with what was adapted from it, then the next. against: of one run, for
    each merged model its differences from all others."""

    head: list[str]
    lines: list[Line]
    findings: list[str]
    notes: list[str]
    csv: str
    latex: str
    against: list[tuple[str, list[Cell]]]


def results_of(run: RunRecord, tasks: Sequence[str] | None = None) -> Results | None:
    """The results of a run, on its own test sets or on those that are named; None if there are none."""
    tasks = list(run.tasks if tasks is None else tasks)
    rows = [row for row in run.rows if row["task"] in tasks]
    if not rows:
        return None
    scores = drawn_scores(json.dumps(rows, sort_keys=True), tuple(tasks))
    by_name = {row_name(row): row for row in sorted(rows, key=rank)}
    head, *table = table_lines(rows, tasks, percent=run.percent, published=run.published)
    judged = {
        name: found
        for name, row in by_name.items()
        if row["method"] == "fda" and (found := of_names(scores, name, display(row["start"])))
    }
    at = head.index("Δ") + 1 if judged else 0
    lines, last = [], ""
    for name, *texts in table:
        paper = name == "(paper)"
        last = last if paper else name
        cells = [Cell(text, order_of(text)) for text in texts]
        if judged:
            cells.insert(at - 1, Cell("", order_of("")) if paper else interval(judged.get(name), run.percent))
        named = (f"{last} (paper)", "paper") if paper else (name, "model")
        lines.append(Line(run.name, *named, group_of(by_name[last]), cells))
    found, lines = findings(rows, tasks, percent=run.percent, scores=scores), beside_starts(lines, by_name)
    return Results(
        head=(columns := [*head[1:at], *([INTERVAL] if judged else []), *head[max(1, at) :]]),
        lines=lines,
        findings=[*filter(None, [of_fewer_seeds(rows)]), *found],
        notes=footnotes(rows, run.published, bool(found)).strip().split("\n\n"),
        csv=csv_of(run, rows, tasks, judged),
        latex=latex_of(columns, lines),
        against=against(scores, by_name, run.percent),
    )


@lru_cache(maxsize=8)
def drawn_scores(rows: str, tasks: Sequence[str]) -> dict[str, Scores]:
    """`scores_of` rows that are written as JSON: a page that is rewritten often shows the same ones."""
    return scores_of(json.loads(rows), tasks)


def together(runs: Sequence[RunRecord]) -> Results | None:
    """The lines of several runs in one table, and how models of one name differ between runs; None if the runs have no
    test set in common.
    """
    tasks = [task for task in runs[0].tasks if all(task in run.tasks for run in runs)]
    each = [found for run in runs if tasks and (found := results_of(run, tasks))]
    if not each:
        return None
    head = list(dict.fromkeys(name for found in each for name in found.head))
    empty = Cell("", order_of(""))
    lines = [
        line._replace(cells=[dict(zip(found.head, line.cells, strict=True)).get(name, empty) for name in head])
        for found in each
        for line in found.lines
    ]
    csvs = [found.csv.splitlines(keepends=True) for found in each]
    return Results(
        head=head,
        lines=lines,
        findings=[
            *(f"{run.name}: {said}" for run in runs if (said := of_fewer_seeds(run.rows))),
            *between(runs, tasks),
        ],
        notes=[f"Avg: plain mean over the test sets that all runs have: {', '.join(tasks)}."],
        csv="".join([csvs[0][0], *(line for text in csvs for line in text[1:])]),
        latex=latex_of(head, lines, run=True),
        against=[],
    )


ENDS = (PRETRAINED, INDIVIDUAL)


def between(runs: Sequence[RunRecord], tasks: Sequence[str]) -> list[str]:
    """A line for each model in the table that the first run has and another has too; those that score alike in one."""
    first, *others = [(run, scores_of([row for row in run.rows if row["task"] in tasks], tasks)) for run in runs]
    said = []
    for run, scores in others:
        merged = {row_name(row) for row in run.rows if is_shown(row) and row["method"] not in ENDS}
        alike = []
        for name in (name for name in scores if name in merged and name in first[1]):
            gain = difference(scores[name], first[1][name])
            if gain and gain.low == gain.high == 0:
                alike.append(name)
            elif gain:
                said.append(f"{name}, {run.name} against {first[0].name}: {difference_in_words(gain, run.percent)}")
        if alike:
            said.append(f"the same scores in {run.name} and {first[0].name}: {', '.join(alike)}")
    return said


def of_names(scores: Mapping[str, Scores], name: str, other: str) -> Difference | None:
    return difference(scores[name], scores[other]) if name in scores and other in scores else None


def interval(gain: Difference | None, percent: bool) -> Cell:
    """The bounds of a difference; it is sorted by the lower one."""
    if not gain:
        return Cell("", order_of(""))
    return Cell(f"{number(gain.low, percent)} to {number(gain.high, percent)}", gain.low, gain.verdict)


def number(value: float, percent: bool) -> str:
    return f"{100 * value:+.2f}" if percent else f"{value:+.4f}"


def order_of(text: str) -> float | str:
    """What a cell is sorted by: the number that it begins with, in seconds where it is a time; what has none is last
    in either direction, marked by an empty text."""
    found = re.match(r"([-+]?\d+(?:\.\d+)?)(?: (s|min|h|GiB)\b)?", text)
    return float(found[1]) * UNITS.get(found[2], 1) if found else ""


def group_of(row: Row) -> str:
    method = row["method"]
    if method in (*ENDS, "fda"):
        return "fda" if method == "fda" else "end"
    return "data" if any(part in METHODS and METHODS[part].data for part in method.split(JOINED)) else "merge"


def beside_starts(lines: Iterable[Line], by_name: Mapping[str, Row]) -> list[Line]:
    """Each start followed by what was adapted from it, the paper's values behind each."""
    lines, groups = list(lines), {}
    for line in lines:
        row = by_name[line.name.removesuffix(" (paper)")]
        groups.setdefault(display(row["start"]) if row["method"] == "fda" else row_name(row), []).append(line)
    return [line for group in groups.values() for line in group]


def against(scores: Mapping[str, Scores], by_name: Mapping[str, Row], percent: bool) -> list[tuple[str, list[Cell]]]:
    """For each merged model its difference from each other one, and the verdict; both by their means, best first."""
    shown = [name for name in scores if is_shown(by_name[name]) and by_name[name]["method"] != INDIVIDUAL]
    names = sorted(shown, key=lambda name: -average(scores[name]))
    table = []
    for name in names:
        gains = [of_names(scores, name, other) if other != name else None for other in names]
        table.append((name, [Cell(number(g.mean, percent), g.mean, g.verdict) if g else Cell("", "") for g in gains]))
    return table


# ---- to be copied ----------------------------------------------------------------------------------------------------


def csv_of(run: RunRecord, rows: Sequence[Row], tasks: Sequence[str], judged: Mapping[str, Difference]) -> str:
    """A line for each model: means over the seeds in full precision, as fractions or in percent as the tables are."""
    unit, ours = 100 if run.percent else 1, values_by_seed(rows, tasks)
    head = ["run", "model", "method", "start", "init", "label", "seeds", *tasks, "avg", "avg_sd", "delta", "delta_sd"]
    head += ["delta_low", "delta_high", "seconds", "cpu_seconds", "peak_gib"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for name, seeds in ours.items():
        of_name = [row for row in rows if row_name(row) == name]
        if not is_shown(of_name[0]):
            continue
        row, start = of_name[0], ours.get(display(of_name[0]["start"]), {}) if of_name[0]["method"] == "fda" else {}
        columns = [list(column) for column in zip(*seeds.values(), strict=True)]
        gains = [values[-1] - start[seed][-1] for seed, values in seeds.items() if seed in start]
        fixed = is_fixed(of_name)
        numbers = [fmean(c) for c in columns] + [deviation(columns[-1], fixed), fmean(gains) if gains else None]
        gain = judged.get(name)
        numbers += [deviation(gains, fixed), gain.low if gain else None, gain.high if gain else None]
        costs = [list({r.get("seed"): r[key] for r in of_name if key in r}.values()) for key in head[-3:]]
        words = [run.name, name, row["method"], row["start"] or "", row["init"] or "", row.get("label") or ""]
        said = [*words, len(seeds), *(plain(n, unit) for n in numbers)]
        writer.writerow([*said, *(plain(fmean(c) if c else None, 1) for c in costs)])
    return out.getvalue()


def plain(value: float | None, unit: int) -> str:
    return "" if value is None or value != value else f"{unit * value:.8g}"
