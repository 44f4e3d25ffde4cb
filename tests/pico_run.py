"""A finished run of pico models for its page: two starts, two initialisations, an analysis, scores, times."""

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from PIL import Image

from common.config import Config
from common.report.live import reported
from common.run.stages import command_stages
from helpers import change
from Vision import domain


def run_reported(config: Config, stage: Callable) -> None:
    """What the command line does around a stage."""
    with command_stages() as stages, reported(config, domain, stages):
        stage(config, domain)


def write_pico_run(config: Config, name: str) -> Path:
    """Run the grid with its page; the folder of the run."""
    from compare import compare

    grid = change(change(config, "compare", starts=["pretrained", "ta"]), "run", name=name)
    folder = grid.run.dir / "analysis"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    (folder / "red.json").write_text(json.dumps({"title": "A red field", "caption": "Nothing <b>but</b> red."}))
    with patch("common.evaluation.figures.plot_accuracy"), patch("common.evaluation.figures.plot_matching"):
        run_reported(grid, compare)
    return grid.run.dir
