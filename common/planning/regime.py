"""How far experts are from their base: what says whether they lie where the method was made for.

The gradient of a block stands for its task vector as long as the task vector is small against the block. The paper's
models have ‖τ‖/‖θ₀‖ of about 1 %.
"""

from collections.abc import Iterable, Mapping

import torch

from common.core.task_vectors import squared
from common.experiment import Experiment

# Of ‖θ₀‖. On the toy CLIP with experts tuned at five rates, FDA's gain over task arithmetic is +5.6 points at 2.6 %,
# +2.3 at 4.8 % and −2.0 at 8.4 % (Vision/results/studies/rates.json).
REGIME = 0.05


@torch.no_grad()
def relative_norms(experiment: Experiment, blocks: Iterable[int]) -> dict[str, float]:
    """‖τ‖/‖θ₀‖ of each task over these blocks; a tensor of one expert is in memory at a time, or some of its rows."""
    sums = {task: 0.0 for task in experiment.experts}
    size = 0.0
    for name in (name for index in blocks for name in experiment.base.names(experiment.prefixes[index])):
        for rows in experiment.rows_of(name):
            theta_0 = experiment.read_rows(experiment.base, name, rows)
            size += squared(theta_0)
            for task, expert in experiment.experts.items():
                sums[task] += squared(experiment.read_rows(expert, name, rows) - theta_0)
    return {task: (tau / size) ** 0.5 for task, tau in sums.items()}


def said_of(norms: Mapping[str, float]) -> str:
    """One line: the norm of each task vector, and which lie outside the regime."""
    outside = [task for task, value in norms.items() if value > REGIME]
    said = ", ".join(f"{task} {100 * value:.1f} %" for task, value in norms.items())
    beyond = f"; beyond {100 * REGIME:.0f} %, where FDA can lose to task arithmetic: {', '.join(outside)}"
    return said + (beyond if outside else "")
