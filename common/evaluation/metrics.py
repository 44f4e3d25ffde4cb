"""The numbers that GLUE tasks report, by scikit-learn and scipy. Each takes labels and predictions of N examples.

Where a task reports two numbers it reports their mean, each rounded to 4 decimals first, as the published tables do.
A correlation with labels or predictions that are all alike is 0 here, where the definition gives 0/0.
The two libraries take a second to import, which commands that score nothing go without.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

NO_POSITIVES: Any = 0  # F1 where there are none; scikit-learn's default is a word, and checkers take its type for all


def accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Part of the predictions that equal their label."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def matthews(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Matthews correlation coefficient, -1 to 1."""
    from sklearn.metrics import matthews_corrcoef

    return 0.0 if are_alike(labels) or are_alike(predictions) else float(matthews_corrcoef(labels, predictions))


def accuracy_and_f1(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Mean of accuracy and of F1 of class 1."""
    from sklearn.metrics import f1_score

    f1 = float(f1_score(labels, predictions, zero_division=NO_POSITIVES))
    return mean_of_rounded([accuracy(labels, predictions), f1])


def pearson_and_spearman(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Mean of Pearson's correlation and of Spearman's rank correlation, -1 to 1."""
    from scipy.stats import pearsonr, spearmanr

    if are_alike(labels) or are_alike(predictions):
        return 0.0
    results: list[Any] = [pearsonr(labels, predictions), spearmanr(labels, predictions)]
    return mean_of_rounded([float(result.statistic) for result in results])


def are_alike(values: ArrayLike) -> bool:
    """Whether all values are the same."""
    return bool(np.ptp(np.asarray(values)) == 0)


def mean_of_rounded(numbers: Sequence[float]) -> float:
    """Plain mean of numbers that are rounded to 4 decimals."""
    return sum(round(number, 4) for number in numbers) / len(numbers)


METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "Matthews": matthews,
    "accuracy and F1": accuracy_and_f1,
    "Pearson and Spearman": pearson_and_spearman,
}
REGRESSION = frozenset({"Pearson and Spearman"})
CORRELATIONS = frozenset({"Matthews", *REGRESSION})  # what is 0/0 where all labels are alike
