"""Whether one model is better than another: a paired bootstrap over the examples of the test sets, and over seeds.

Both models answer the same examples, so the difference of their means varies far less than either mean does. Every draw
takes as many examples of each test set as it has, with replacement, the same for both (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 16); of several seeds it takes as many with replacement, too, their
deviations from their mean widened by √(n / (n − 1)), since those of few seeds are too small by that.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np

from common.evaluation.answers import resampled
from common.evaluation.rows import INDIVIDUAL, Row, display, in_same_rest, is_shown, rank, row_name

DRAWS = 1000
LEVEL = 0.95


class Difference(NamedTuple):
    """The difference of two mean scores, and the bounds of its interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """better or worse, if the interval lies on one side of 0."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "not told apart"


Scores = Mapping[int | None, np.ndarray]
"""{seed: (tasks, 1 + draws) scores; the first of each task is that of the examples as they are}"""


def scores_of(rows: Iterable[Row], tasks: Sequence[str]) -> dict[str, Scores]:
    """The scores of every model, by its row's name, on all draws; without models that lack a task or the answers to
    it."""
    answered = [row for row in sorted(rows, key=rank) if row.get("answers")]
    columns: dict[tuple[str, int | None], list[np.ndarray]] = {}
    for i, task in enumerate(tasks):
        of_task = [row for row in answered if row["task"] == task]
        if of_task:
            n, examples = of_task[0]["n"], of_task[0].get("test_set")
            generator = np.random.default_rng((0, i))
            draws = np.vstack([np.arange(n), generator.integers(n, size=(DRAWS, n))])  # of one task at a time in memory
            for row in of_task:
                if (row["n"], row.get("test_set")) == (n, examples):
                    values = resampled(row["answers"], row["metric"], n, draws)
                    columns.setdefault((row_name(row), row.get("seed")), []).append(values)
    scores: dict[str, dict[int | None, np.ndarray]] = {}
    for (name, seed), values in columns.items():
        if len(values) == len(tasks):
            scores.setdefault(name, {})[seed] = np.stack(values)
    return dict(scores)


def average(scores: Scores) -> float:
    """The mean score over the tasks, on the examples as they are, over the seeds."""
    return float(sum(drawn.mean(0)[0] for drawn in scores.values()) / len(scores))


def difference(ours: Scores, theirs: Scores) -> Difference | None:
    """Of the means over the tasks of two models on the same draws; None if they have no seed in common."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    apart = np.stack([ours[seed].mean(0) - theirs[seed].mean(0) for seed in seeds])
    mean, drawn = float(apart[:, 0].mean()), widened(apart[:, 1:])
    chosen = np.random.default_rng(1).integers(len(seeds), size=(len(seeds), drawn.shape[1]))
    low, high = np.quantile(np.take_along_axis(drawn, chosen, 0).mean(0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(mean, float(low), float(high))


def widened(drawn: np.ndarray) -> np.ndarray:
    """Values (seeds, draws) with the deviations of a few seeds from their mean as large as those of many would be."""
    mean, seeds = drawn.mean(0), len(drawn)
    return mean + (drawn - mean) * sqrt(seeds / max(1, seeds - 1))


def findings(
    rows: Sequence[Row], tasks: Sequence[str], *, percent: bool = True, scores: Mapping[str, Scores] | None = None
) -> list[str]:
    """A line for each adapted model against its start, and one on which model is best; none without answers.

    `scores`: what `scores_of` gives for the rows, if it was asked before.
    """
    scores, lines = scores_of(rows, tasks) if scores is None else scores, []
    shown = {row_name(row): row for row in rows if is_shown(row)}
    for name, row in sorted(shown.items(), key=lambda item: rank(item[1])):
        if row["method"] != "fda" or name not in scores:
            continue
        start, said = display(row["start"]), None
        for other, rest in ((start, ""), (in_same_rest(row), " with the same rest")):
            gain = difference(scores[name], scores[other]) if other in scores else None
            if gain and gain != said:  # some starts have the same rest themselves
                of_tasks = "" if rest else by_task(scores[name], scores[other], tasks)
                lines.append(f"{name} against {start}{rest}: {difference_in_words(gain, percent)}{of_tasks}")
            said = gain
    merged = [name for name in scores if shown.get(name, {}).get("method", INDIVIDUAL) != INDIVIDUAL]
    if lines and len(merged) > 1:
        best = max(merged, key=lambda name: average(scores[name]))
        gains = {name: difference(scores[best], scores[name]) for name in merged if name != best}
        level = [name for name, gain in gains.items() if gain and gain.verdict != "better"]
        beside = f"not told apart from it: {', '.join(level)}" if level else "better than every other merged model"
        known = [name for name, gain in gains.items() if gain] + [best]
        unknown = [name for name, row in shown.items() if row["method"] != INDIVIDUAL and name not in known]
        apart = f"; not compared, without answers or a seed in common: {', '.join(unknown)}" if unknown else ""
        lines.append(f"best mean: {best}; {beside}{apart}")
    return lines


def by_task(ours: Scores, theirs: Scores, tasks: Sequence[str]) -> str:
    """On how many tasks two models of some seeds in common differ; nothing of a single one, which is the mean."""
    if len(tasks) == 1:
        return ""
    verdicts = []
    for i in range(len(tasks)):
        of_task = [{seed: drawn[i : i + 1] for seed, drawn in scores.items()} for scores in (ours, theirs)]
        gain = difference(*of_task)
        assert gain
        verdicts.append(gain.verdict)
    worse = [task for task, verdict in zip(tasks, verdicts, strict=True) if verdict == "worse"]
    return f"; of {len(tasks)} tasks better on {verdicts.count('better')}, worse on {', '.join(worse) or 'none'}"


def difference_in_words(gain: Difference, percent: bool) -> str:
    """The difference, its interval and the verdict."""
    mean, low, high = (f"{100 * x:+.2f}" if percent else f"{x:+.4f}" for x in gain)
    return f"{mean} ({low} to {high}), {gain.verdict}"
