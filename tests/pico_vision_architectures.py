"""Every vision architecture that is tested, by the config beside its weights: open_clip's own ViTs, those that it takes
from timm, and those of transformers by their model types."""

import json
from pathlib import Path

import pico_hf_classifiers
import pico_hf_vision
from pico_vision import PICO_CLIP, TIMM

OPEN_CLIP = {"open_clip": PICO_CLIP, "timm": TIMM}
ARCHITECTURES = (*OPEN_CLIP, *pico_hf_vision.TOWERS, *pico_hf_classifiers.CLASSIFIERS)


def write_config(folder: Path, kind: str) -> None:
    """The config file of a pico model of an architecture."""
    if kind in OPEN_CLIP:
        fields = {"model_cfg": OPEN_CLIP[kind], "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(fields))
    else:
        of = pico_hf_vision if kind in pico_hf_vision.TOWERS else pico_hf_classifiers
        (folder / "config.json").write_text(json.dumps(of.fields_of(kind)))
