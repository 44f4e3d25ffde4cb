"""What a score was made of, example by example, as a short text of a row; and the score of resampled examples.

A score that is a mean over examples needs one bit of each, any other its labels and predictions.
"""

import base64
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from common.core.errors import InputError
from common.domain import Scored
from common.evaluation.metrics import METRICS, REGRESSION

RIGHT, PAIRS = "right:", "pairs:"


def scored(right: ArrayLike) -> Scored:
    """The share of right answers, from one truth value an example."""
    bits = np.asarray(right, dtype=bool)
    packed = base64.b64encode(np.packbits(bits).tobytes()).decode()
    return Scored(int(bits.sum()) / len(bits), len(bits), RIGHT + packed)


def scored_by(metric: str, labels: ArrayLike, predictions: ArrayLike) -> Scored:
    """The value of a metric of METRICS."""
    if metric == "accuracy":
        return scored(np.asarray(labels) == np.asarray(predictions))
    pairs = np.stack([np.asarray(labels, np.float32), np.asarray(predictions, np.float32)])
    value = METRICS[metric](np.asarray(labels), np.asarray(predictions))
    return Scored(value, pairs.shape[1], PAIRS + base64.b64encode(pairs.tobytes()).decode())


def resampled(answers: str, metric: str, n: int, draws: np.ndarray) -> np.ndarray:
    """The metric on resampled examples, one value a draw.

    Args:
        answers: As `scored` and `scored_by` write them.
        draws: (draws, n), indices of the examples.
    Raises:
        InputError: if the text is no such record of n examples.
    """
    kind, _, coded = answers.partition(":")
    try:
        stored = np.frombuffer(base64.b64decode(coded, validate=True), np.uint8)
        if kind + ":" == RIGHT:
            return np.unpackbits(stored, count=n).astype(bool)[draws].mean(1)
        labels, predictions = stored.view(np.float32).reshape(2, n)
    except ValueError as error:
        raise InputError(f"a row of results has damaged answers of {n} examples ({error}); score it again") from error
    if metric in BINARY and set(np.unique([labels, predictions])) <= {0, 1}:
        drawn = [of.astype(bool)[draws] for of in (labels, predictions)]
        return BINARY[metric](
            *((a & b).sum(1, dtype=float) for a in (drawn[0], ~drawn[0]) for b in (drawn[1], ~drawn[1]))
        )
    if metric in REGRESSION:
        return pearson_and_spearman(labels[draws], predictions[draws])
    function: Any = METRICS[metric]
    labels, predictions = (x.astype(int) if metric in BINARY else x for x in (labels, predictions))
    return np.array([function(labels[draw], predictions[draw]) for draw in draws])


def matthews(tp: np.ndarray, fn: np.ndarray, fp: np.ndarray, tn: np.ndarray) -> np.ndarray:
    """METRICS' of many draws at once, from how often each pair of label and prediction occurs; 0 where it is 0/0."""
    size = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return np.divide(tp * tn - fp * fn, size, out=np.zeros_like(size), where=size > 0)


def accuracy_and_f1(tp: np.ndarray, fn: np.ndarray, fp: np.ndarray, tn: np.ndarray) -> np.ndarray:
    """As `matthews`; each of the two numbers is rounded to 4 decimals first."""
    positive = 2 * tp + fp + fn
    f1 = np.divide(2 * tp, positive, out=np.zeros_like(positive), where=positive > 0)
    return (np.round((tp + tn) / (tp + fn + fp + tn), 4) + np.round(f1, 4)) / 2


def pearson_and_spearman(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """METRICS' of many draws at once, a row each; 0 where all of one are alike. Each is rounded to 4 decimals first."""
    from scipy.stats import rankdata

    of_values = correlations(labels.astype(float), predictions.astype(float))
    of_ranks = correlations(rankdata(labels, axis=1), rankdata(predictions, axis=1))
    return (np.round(of_values, 4) + np.round(of_ranks, 4)) / 2


def correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's of each row of x and y; 0 where it is 0/0."""
    differ = (np.ptp(x, 1) > 0) & (np.ptp(y, 1) > 0)  # a mean of equal numbers is rounded
    x, y = (of - of.mean(1, keepdims=True) for of in (x, y))
    size = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.divide((x * y).sum(1), size, out=np.zeros_like(size), where=differ)


BINARY = {"Matthews": matthews, "accuracy and F1": accuracy_and_f1}  # a thousand calls of a library take seconds a row
