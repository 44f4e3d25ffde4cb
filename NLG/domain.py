"""What the project knows about causal language models: their blocks (decoders.py), how they are written and scored."""

from NLG.decoders import family, skeleton, token_shape
from NLG.decoders import reading as unanchored
from NLG.export import check_export, export
from NLG.inputs import check_inputs
from NLG.scoring import TASKS, metric, score, scorer

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
NAME = "nlg"
PARTS = ("mlp", "layer")  # what can be anchored of a layer
SHARDED = True  # a merged model is written shard by shard
PERCENT = False  # tables print fractions
calibration_task = labelled_task = None  # there are no inputs for merge methods and analyses that use data
