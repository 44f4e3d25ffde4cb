"""Fixed task vectors of three tasks, of which tests/fusion_bench.json holds what FusionBench 0.2.33 merges them into.

The numbers were made in float64 by its own functions, called on these tensors; none of its code is here.
"""

import json

import numpy as np
import torch

from common.config import ROOT

GOLDEN = json.loads((ROOT / "tests" / "fusion_bench.json").read_text())
GOLDEN_SHAPES = {"layers.0.weight": (6, 5), "layers.0.bias": (6,), "layers.1.weight": (4, 6)}


def golden_tensors(i):
    """Sines of irregular arguments, another phase for each i and tensor."""
    made = {}
    for k, (name, shape) in enumerate(GOLDEN_SHAPES.items()):
        place = np.arange(1, np.prod(shape) + 1) ** 1.5
        made[name] = torch.tensor(np.sin(1.7 * i + 0.9 * k + place) * (1 + 0.5 * k)).reshape(shape)
    return made


def golden_task_vectors():
    """(base, three task vectors)."""
    return golden_tensors(9), [golden_tensors(i) for i in range(3)]
