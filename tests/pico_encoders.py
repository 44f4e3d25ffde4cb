"""A pico text encoder of every architecture that is tested: those of pico_encoders.yaml."""

from pathlib import Path
from typing import Any

import yaml

from pico_nlu import PICO

_ALL: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
WITH_DECODER = _ALL.pop("_with_decoder")
ENCODERS = _ALL
ARCHITECTURES = ENCODERS | WITH_DECODER


def fields_of(kind: str) -> dict[str, Any]:
    """All fields of a pico config of a model type."""
    if kind in WITH_DECODER:  # no name of PICO's is one of theirs but for the words
        return {"model_type": kind, "vocab_size": PICO["vocab_size"], "pad_token_id": 1} | WITH_DECODER[kind]
    return {"model_type": kind} | PICO | ENCODERS[kind]
