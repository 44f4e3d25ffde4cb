"""What a score was made of, example by example, as a short text of a row; and the score of resampled examples.

A score that is a mean over examples needs one bit of each, any other its labels and predictions.
"""

import base64
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from common.core.errors import InputError
from common.domain import Scored
from common.evaluation.metrics import METRICS

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
    function: Any = METRICS[metric]
    whole = metric in ("Matthews", "accuracy and F1")  # these take classes
    labels, predictions = (x.astype(int) if whole else x for x in (labels, predictions))
    return np.array([function(labels[draw], predictions[draw]) for draw in draws])
