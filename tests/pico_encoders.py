"""A pico text encoder of every architecture that is tested: those of pico_encoders.yaml."""

from pathlib import Path
from typing import Any

import yaml

from pico_nlu import PICO

ENCODERS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())


def fields_of(kind: str) -> dict[str, Any]:
    """All fields of a pico config of a model type."""
    return {"model_type": kind} | PICO | ENCODERS[kind]
