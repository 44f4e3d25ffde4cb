"""Scores for tests of the grid: counted, or with a peak that is known."""

import json
from collections import Counter
from types import SimpleNamespace

from common.domain import Scored
from common.io.checkpoints import Checkpoint
from Vision import domain


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def counting(scored: Counter, score=domain.score):
    """Vision with a `score` that counts what it is asked for."""

    def counted(config, task, checkpoints, device):
        scored.update((task, name) for name in checkpoints)
        return score(config, task, checkpoints, device)

    return SimpleNamespace(**vars(domain) | {"score": counted})


def by_split(config, task, checkpoints, device):
    """A score with its peak at scale 0.2 on held-out examples and at 0.5 on the test set."""
    name = "visual.conv1.weight"
    base = Checkpoint(config.model.path("base")).read([name])[name]
    delta = sum(Checkpoint(config.model.path("expert", t)).read([name])[name] - base for t in config.tasks)
    peak = {"validation_cut": 0.2, "test": 0.5}[config.eval.split]
    moved = {n: Checkpoint(path).read([name])[name] - base for n, path in checkpoints.items()}
    for n, m in moved.items():
        yield n, Scored(1 - abs((m.norm() / delta.norm()).item() - peak), 7, "")
