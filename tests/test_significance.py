"""Answers kept with a score, and which differences of scores are beyond the error of the test set."""

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef

from common.core.errors import InputError
from common.evaluation.answers import resampled, scored, scored_by
from common.evaluation.metrics import METRICS
from common.evaluation.significance import DRAWS, Difference, difference, findings, scores_of, widened
from common.evaluation.tables import table
from common.layout import SAME_REST

TASKS = ["A", "B"]


def rows_of(method, right, start=None, label="", seed=None):
    """One row a task, of a model that has these shares of the answers right, the first ones."""
    rows = []
    for task, bits in zip(TASKS, right, strict=True):
        row = {"method": method, "start": start, "init": "weight" if start else None, "label": label, "task": task}
        rows.append(row | {"metric": "accuracy"} | scored(bits)._asdict() | ({} if seed is None else {"seed": seed}))
    return rows


def bits(n, right):
    return np.arange(n) < right


def test_answers_come_back_as_they_were_scored():
    right = np.random.default_rng(0).random(203) < 0.7
    found = scored(right)
    assert found[:2] == (right.mean(), 203)
    draws = np.stack([np.arange(203), np.zeros(203, int), np.arange(203)[::-1]])
    assert resampled(found.answers, "accuracy", 203, draws).tolist() == [right.mean(), float(right[0]), right.mean()]
    labels, predictions = np.arange(60) % 2, (np.arange(60) % 3 == 0).astype(int)
    matthews = scored_by("Matthews", labels, predictions)
    assert matthews.value == pytest.approx(matthews_corrcoef(labels, predictions)) and matthews.n == 60
    half = np.stack([np.arange(60), np.arange(60) // 2])
    expected = [matthews_corrcoef(labels[draw], predictions[draw]) for draw in half]
    assert resampled(matthews.answers, "Matthews", 60, half) == pytest.approx(expected)
    assert scored_by("accuracy", labels, predictions) == scored(labels == predictions)


@pytest.mark.parametrize("metric", ["Matthews", "accuracy and F1", "Pearson and Spearman"])
@pytest.mark.parametrize("classes", [2, 3])
def test_many_draws_at_once_are_as_one_by_one(metric, classes):
    generator = np.random.default_rng(0)
    labels, predictions = (
        generator.integers(0, 2, 90),
        generator.integers(0, 2 if metric == "accuracy and F1" else classes, 90),
    )
    if metric == "Pearson and Spearman":
        labels, predictions = 0.1 * labels, 0.1 * predictions + 0.1 * labels
    draws = np.vstack([generator.integers(90, size=(50, 90)), np.full((1, 90), 3)])  # the last: one example alone
    found = resampled(scored_by(metric, labels, predictions).answers, metric, 90, draws)
    expected = [METRICS[metric](labels[draw], predictions[draw]) for draw in draws]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.01e-4)  # of rounding to 4 decimals


@pytest.mark.parametrize("answers", ["right:AA", "pairs:AAAA", "right:?", "nothing", ""])
def test_damaged_answers_are_refused(answers):
    with pytest.raises(InputError, match="damaged answers of 60 examples"):
        resampled(answers, "Matthews", 60, np.arange(60)[None])


def test_the_interval_is_that_of_the_difference_of_paired_answers():
    """Of 800 examples 40 are right in one model alone: the mean difference has the variance p (1 - p) / n, p = 0.05."""
    ours, theirs = bits(800, 440), bits(800, 400)
    one, other = rows_of("fda", [ours, ours], "ta"), rows_of("ta", [theirs, theirs])
    scores = scores_of([*one, *other], TASKS)
    gain = difference(scores["FDA (TA, Weight)"], scores["TA"])
    deviation = (0.05 * 0.95 / 800 / 2) ** 0.5  # of the mean of two tasks
    assert gain.mean == pytest.approx(0.05)
    assert gain.low == pytest.approx(0.05 - 1.96 * deviation, abs=0.1 * deviation * 1.96)
    assert gain.high == pytest.approx(0.05 + 1.96 * deviation, abs=0.1 * deviation * 1.96)
    assert scores["TA"][None].shape == (2, DRAWS + 1)


def test_seeds_that_differ_widen_the_interval():
    theirs = [row for s in (0, 1, 2) for row in rows_of("ta", [bits(400, 200)] * 2, seed=s)]
    same = [row for s in (0, 1, 2) for row in rows_of("fda", [bits(400, 220)] * 2, "ta", seed=s)]
    apart = [row for s, n in enumerate((180, 220, 260)) for row in rows_of("fda", [bits(400, n)] * 2, "ta", seed=s)]
    gains = []
    for ours in (same, apart):
        scores = scores_of([*ours, *theirs], TASKS)
        gains.append(difference(scores["FDA (TA, Weight)"], scores["TA"]))
    assert gains[0].mean == pytest.approx(gains[1].mean) == pytest.approx(0.05)
    assert (gains[0].verdict, gains[1].verdict) == ("better", "not told apart")


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_deviations_of_few_seeds_are_as_large_as_those_of_many(seeds):
    """Resampled with replacement, n values have the variance over n, of many the variance over n − 1 (Bessel)."""
    drawn = np.random.default_rng(0).normal(size=(seeds, 7))
    found = widened(drawn)
    np.testing.assert_allclose(found.mean(0), drawn.mean(0))
    expected = drawn.std(0, ddof=1) if seeds > 1 else np.zeros(7)
    np.testing.assert_allclose(found.std(0), expected, atol=1e-12)


def test_verdicts():
    assert [Difference(0, *ends).verdict for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0.0, 0.0))] == [
        "better", "worse", "not told apart", "not told apart",
    ]  # fmt: skip


def test_what_a_table_shows_is_said_and_the_same_rest_is_a_column():
    rows = [
        *rows_of("pretrained", [bits(800, 300)] * 2),
        *rows_of("individual", [bits(800, 780)] * 2),
        *rows_of("ta", [bits(800, 400)] * 2),
        *rows_of("ta", [bits(800, 436)] * 2, label=SAME_REST),
        *rows_of("fda", [bits(800, 440)] * 2, "ta"),
    ]
    lines = findings(rows, TASKS)
    assert lines[0].startswith("FDA (TA, Weight) against TA: +5.00 (")
    assert lines[0].endswith(", better; of 2 tasks better on 2, worse on none")
    assert lines[1].startswith("FDA (TA, Weight) against TA with the same rest: +0.50 (") and "tasks" not in lines[1]
    assert lines[2] == "best mean: TA pretrained rest" or lines[2].startswith("best mean: FDA (TA, Weight); ")
    shown = [[cell.strip() for cell in line.split("|")] for line in table(rows, TASKS).splitlines()]
    assert shown[0][1:-1] == ["Method", "A", "B", "Avg", "Δ", "Δ (same rest)"]
    assert [line[1] for line in shown[2:]] == ["Pretrained", "Individual", "TA", "FDA (TA, Weight)"]
    assert shown[-1][-3:-1] == ["+5.00", "+0.50"]
    assert findings([{k: v for k, v in row.items() if k != "answers"} for row in rows], TASKS) == []


def test_a_model_that_kept_its_start_s_rest_is_compared_with_the_start():
    """Of two adapted models from one start, each has the start in its own rest beside it; without that row, none."""
    start, in_base = rows_of("ta", [bits(800, 440)] * 2), rows_of("ta", [bits(800, 400)] * 2, label=SAME_REST)
    own = [row | {"rest": "start"} for row in rows_of("fda", [bits(800, 480)] * 2, "ta")]
    base = [row | {"rest": "pretrained"} for row in rows_of("fda", [bits(800, 480)] * 2, "ta", "base")]

    def gains(rows):
        lines = [line.split("|")[1:-1] for line in table(rows, TASKS).splitlines()]
        column = [cell.strip() for cell in lines[0]].index("Δ (same rest)")
        return {line[0].strip(): line[column].strip() for line in lines if "FDA" in line[0]}

    both = {"FDA (TA, Weight)": "+5.00", "FDA (TA, Weight) base": "+10.00"}
    assert gains([*start, *in_base, *own, *base]) == both
    other = [row | {"start": "tsv"} for row in base]  # whose start in the base's rest nobody scored
    assert gains([*start, *in_base, *base, *other])["FDA (TSV, Weight) base"] == "–"
    assert "same rest" not in table([*start, *in_base, *own], TASKS), "no model has another rest than its start"
    said = findings([*start, *in_base, *own], TASKS)
    assert len(said) == 2 and said[0].startswith("FDA (TA, Weight) against TA: +5.00")


def test_the_best_says_what_it_was_not_compared_with():
    rows = [*rows_of("ta", [bits(800, 400)] * 2), *rows_of("fda", [bits(800, 480)] * 2, "ta")]
    silent = [row | {"answers": None} for row in rows_of("wudi", [bits(800, 700)] * 2)]
    expected = "best mean: FDA (TA, Weight); better than every other merged model"
    assert findings(rows, TASKS)[-1] == expected
    assert findings([*rows, *silent], TASKS)[-1] == (
        f"{expected}; not compared, without answers or a seed in common: WUDI"
    )
    elsewhere = [row | {"test_set": "sha256:another"} for row in rows_of("tsv", [bits(800, 700)] * 2)]
    assert findings([*rows, *elsewhere], TASKS)[-1].endswith("a seed in common: TSV"), "of other examples"


def test_a_mean_that_one_task_decides_is_told_by_the_tasks():
    """A gains 5 points, B loses 20: worse in the mean, better on one of two."""
    ours, theirs = [bits(800, 440), bits(800, 240)], [bits(800, 400)] * 2
    rows = [*rows_of("fda", ours, "ta"), *rows_of("ta", theirs)]
    assert findings(rows, TASKS)[0].endswith(", worse; of 2 tasks better on 1, worse on B")
    one = [row for row in rows if row["task"] == "A"]
    assert findings(one, ["A"])[0].endswith(", better")
