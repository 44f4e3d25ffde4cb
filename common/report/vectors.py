"""Task vectors of a run measured once: how long they are and what angles they have, block by block.

runs/<name>/task_vectors.json: {"made_of": the checkpoints, "tasks", "blocks": their prefixes, "theta": ‖θ₀‖ of each
block, "tau": {task: ‖τ‖ of each block}, "gram": for each block the products of the tasks' τ}; numbers of six digits.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from common.core.notices import warn
from common.core.task_vectors import squared
from common.experiment import Experiment
from common.io.checkpoints import write_text
from common.io.hashes import digest
from common.io.json_files import read_object
from common.provenance import inputs_of

VECTORS_FILE = "task_vectors.json"
MOST = 4 * 10**9  # weights read: a minute or so; of more only run.report full asks


def measure(experiment: Experiment, everything: bool) -> str:
    """Measure the task vectors over the anchored blocks, unless it was done of these checkpoints.

    Args:
        everything: However many weights there are to read; else more than MOST are left.
    Returns: a sentence on why nothing was measured; "" if all is there.
    """
    file = experiment.config.run.dir / VECTORS_FILE
    weights = weights_of(experiment) * (1 + len(experiment.experts))
    if weights > MOST and not everything:
        return f"not measured: {weights / 1e9:.0f} billion weights would be read; --run.report full does it"
    made_of = {"made_of": digest(inputs_of(experiment)), "blocks": list(experiment.prefixes)}
    if file.is_file() and made_of.items() <= read_object(file, "record of task vectors").items():
        return ""
    blocks = [measured(experiment, index) for index in range(experiment.depth)]
    found = {
        **made_of,
        "tasks": list(experiment.experts),
        "theta": [block["theta"] for block in blocks],
        "tau": {task: [block["tau"][i] for block in blocks] for i, task in enumerate(experiment.experts)},
        "gram": [block["gram"] for block in blocks],
    }
    for task, lengths in found["tau"].items():
        if not any(lengths):
            warn(f"the expert of {task} equals the base in every block: its task vector is zero; is that meant?")
    write_text(file, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return ""


def weights_of(experiment: Experiment) -> int:
    """The weights of the anchored blocks of one model."""
    shapes = (experiment.base.shapes_under(prefix).values() for prefix in experiment.prefixes)
    return sum(math.prod(shape) for of_block in shapes for shape in of_block)


@torch.no_grad()
def measured(experiment: Experiment, index: int) -> dict[str, Any]:
    """‖θ₀‖, ‖τ‖ of each task and the products of all pairs of τ in one block, summed in float64 over its tensors.

    A tensor of each model is in memory at once, or some of its rows.
    """
    experts, theta = experiment.experts.values(), 0.0
    gram_NN = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for name in experiment.base.names(experiment.prefixes[index]):
        for rows in experiment.rows_of(name):
            theta_0 = experiment.read_rows(experiment.base, name, rows)
            theta += squared(theta_0)
            tau_NP = torch.stack([(experiment.read_rows(e, name, rows) - theta_0).flatten() for e in experts]).double()
            gram_NN += (tau_NP @ tau_NP.T).cpu()
    return {
        "theta": short(theta**0.5),
        "tau": [short(float(x) ** 0.5) for x in gram_NN.diagonal()],
        "gram": [[short(float(x)) for x in row] for row in gram_NN],
    }


def short(x: float) -> float:
    """Ten digits of a number: the rest hangs on the order of a sum, and fewer would show in the cosine of two τ that
    are nearly at right angles."""
    return float(f"{x:.10g}")


def relative(found: Mapping[str, Any]) -> dict[str, list[float]]:
    """{task: ‖τ‖/‖θ₀‖ of each block}"""
    return {
        task: [tau / theta if theta else 0.0 for tau, theta in zip(taus, found["theta"], strict=True)]
        for task, taus in found["tau"].items()
    }


def cosines(found: Mapping[str, Any]) -> list[list[float]]:
    """The cosine of each pair of τ over all blocks together; 0 beside a τ of zeros."""
    gram = torch.tensor(found["gram"], dtype=torch.float64).sum(0)
    norm = gram.diagonal().sqrt()
    return torch.where(gram == 0, 0.0, gram / norm.outer(norm)).clamp(-1, 1).tolist()
