"""What the project knows about text encoders: their blocks (encoders.py), how they are scored and written."""

from NLU.encoders import check_inputs, family, skeleton, token_shape
from NLU.encoders import reading_of as unanchored
from NLU.export import check_export, export
from NLU.scoring import calibration_task, labelled_task, metric, score, scorer
from NLU.tasks import TASKS

__all__ = [
    "NAME",
    "PARTS",
    "PERCENT",
    "SHARDED",
    "TASKS",
    "calibration_task",
    "check_export",
    "check_inputs",
    "export",
    "family",
    "labelled_task",
    "metric",
    "score",
    "scorer",
    "skeleton",
    "token_shape",
    "unanchored",
]
NAME = "nlu"
PARTS = ("layer",)  # what can be anchored of a layer
SHARDED = False
PERCENT = False  # tables print fractions
