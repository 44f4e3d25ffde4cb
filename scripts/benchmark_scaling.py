"""How the time of construction grows with the number of blocks, tasks and anchors of a toy."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmark_blocks import TOYS
from benchmark_clock import Clock
from common.command import parse
from common.domain import module_of
from common.pipeline import construct

LEAST = {"blocks": 1, "tasks": 2, "anchors": 32}  # what the two counts are while the third is doubled


def scaling(name: str, folder: Path, device: torch.device) -> dict[str, Any]:
    """Seconds of the processor that construction takes on a toy, 40 steps a unit, as one count doubles twice."""
    config = parse("", [f"--config=configs/{TOYS[name]}.yaml", "--preset=fast", "--anchors.steps=40"])
    domain = module_of(config.domain)
    config = replace(config, model=replace(config.model, root=f"toy/{name}/checkpoints"), tasks=config.tasks[:4])
    taken: dict[str, dict[int, float]] = {"blocks": {}, "tasks": {}, "anchors": {}}
    for what, counts in {"blocks": (1, 1, 2, 4), "tasks": (1, 2, 4), "anchors": (16, 32, 64)}.items():
        for count in counts:  # the first of all is for the caches
            blocks, tasks, number = (count if what == each else least for each, least in LEAST.items())
            run = replace(
                config.run, root=str(folder / f"{what}{count}"), blocks=list(range(blocks)), device=device.type
            )
            anchors = replace(config.anchors, number=number)
            clock = Clock(device)
            clock(construct, replace(config, run=run, anchors=anchors, tasks=config.tasks[:tasks]), domain)
            taken[what][count] = round(clock.cpu_seconds if device.type == "cpu" else clock.seconds, 2)
            shutil.rmtree(folder / f"{what}{count}")
    return taken
