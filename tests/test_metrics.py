"""GLUE's numbers against cases counted by hand and against published degenerate ones."""

import pytest

from common.evaluation.metrics import METRICS, REGRESSION, accuracy, accuracy_and_f1, matthews, pearson_and_spearman

LABELS, ANSWERS = [1, 1, 1, 0, 0], [1, 1, 0, 0, 1]  # 2 true positives, 1 true negative, 1 false of each kind


def test_accuracy_and_matthews_by_hand():
    assert accuracy(LABELS, ANSWERS) == 0.6
    assert matthews(LABELS, ANSWERS) == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)
    assert matthews(LABELS, LABELS) == 1
    assert matthews(LABELS, [1 - label for label in LABELS]) == -1


def test_both_numbers_are_rounded_before_they_are_averaged():
    """F1 = 2·2 / (2·2 + 1 + 1) = 2/3, which is .6667 in the mean."""
    assert accuracy_and_f1(LABELS, ANSWERS) == pytest.approx((0.6 + 0.6667) / 2, abs=1e-12)


def test_correlations_by_hand():
    """Σ dx dy = 11, Σ dx² = 5, Σ dy² = 29; the ranks agree."""
    assert pearson_and_spearman([1, 2, 3, 4], [1, 2, 3, 8]) == pytest.approx((round(11 / 145**0.5, 4) + 1) / 2)
    assert pearson_and_spearman([1.0, 2.0, 3.0], [-2.0, -4.0, -6.0]) == -1


def test_tied_ranks_share_their_mean():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: Σ dx dy = Σ dx² = 4.5, Σ dy² = 5. Values: Σ dx dy = 3, Σ dx² = 2."""
    spearman, pearson = round(4.5 / (4.5 * 5) ** 0.5, 4), round(3 / (2 * 5) ** 0.5, 4)
    assert pearson_and_spearman([1, 2, 3, 4], [1, 2, 2, 3]) == pytest.approx((spearman + pearson) / 2)


@pytest.mark.parametrize(
    ("positive", "examples", "answer", "published"),
    [(279, 408, 1, 0.7480), (14885, 40430, 0, 0.3159)],
    ids=["MRPC, all positive", "QQP, all negative"],
)
def test_constant_answers_give_the_papers_degenerate_values(positive, examples, answer, published):
    labels = [1] * positive + [0] * (examples - positive)
    assert accuracy_and_f1(labels, [answer] * examples) == pytest.approx(published)


def test_predictions_that_are_all_alike_score_0_and_not_nan():
    assert matthews(LABELS, [1] * 5) == 0
    assert matthews([1, 1], [1, 1]) == 0
    assert pearson_and_spearman([1.0, 2.0, 3.0], [0.5, 0.5, 0.5]) == 0
    assert pearson_and_spearman([2.0, 2.0], [0.5, 0.7]) == 0
    assert accuracy_and_f1([0, 0], [0, 0]) == 0.5  # accuracy 1, F1 of a class that nobody saw 0


def test_every_metric_has_a_plain_float():
    for name in {*METRICS, *REGRESSION}:
        assert type(METRICS[name]([0, 1, 1], [0, 1, 0])) is float, name
