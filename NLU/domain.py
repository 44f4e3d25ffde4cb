"""What the project knows about text encoders: their blocks (encoders.py), how they are scored and written."""

from NLU.encoders import FAMILIES, skeleton, token_shape
from NLU.export import check_export, export
from NLU.scoring import TASKS, metric, probe, score

__all__ = [
    "FAMILIES",
    "NAME",
    "PERCENT",
    "TASKS",
    "check_export",
    "export",
    "metric",
    "probe",
    "score",
    "skeleton",
    "token_shape",
]
NAME = "nlu"
PERCENT = False  # tables print fractions
