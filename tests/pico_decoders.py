"""A pico language model of every architecture that is tested: those of pico_decoders.yaml."""

from pathlib import Path
from typing import Any

import yaml

from pico_nlg import PICO

DECODERS: dict[str, dict[str, Any]] = {
    kind: fields
    for kind, fields in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text()).items()
    if not kind.startswith("_")
}


def fields_of(kind: str) -> dict[str, Any]:
    """All fields of a pico config of a model type; that of a model with more than text has those of its text within."""
    own = dict(DECODERS[kind])
    nested = own.pop("nested", None)
    text = PICO | {"tie_word_embeddings": False, "attn_implementation": "eager"} | (own if nested is None else nested)
    taken = {name for name, value in text.items() if value is None and name != "pad_token_id"}
    text = {name: value for name, value in text.items() if name not in taken}
    return {"model_type": kind} | (text if nested is None else own | {"text_config": text})
