"""A pico language model of every architecture that is tested: those of pico_decoders.yaml."""

from pathlib import Path
from typing import Any

import yaml

from pico_nlg import PICO

_ALL: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
_ALONE, MERGED_ALONE = _ALL["_layers_alone"], _ALL["_merged_alone"]
DECODERS = {kind: fields for kind, fields in _ALL.items() if not kind.startswith("_")}
MIXTURES = [kind for kind, fields in DECODERS.items() if any("experts" in n for n in fields | fields.get("nested", {}))]
LAYERS = [kind for kind in (*DECODERS, *_ALONE) if kind not in MIXTURES]  # of which whole layers can be anchored


def fields_of(kind: str) -> dict[str, Any]:
    """All fields of a pico config of a model type; that of a model with more than text has those of its text within."""
    own = dict((DECODERS | _ALONE | MERGED_ALONE)[kind])
    nested = own.pop("nested", None)
    text = PICO | {"tie_word_embeddings": False, "attn_implementation": "eager"} | (own if nested is None else nested)
    taken = {name for name, value in text.items() if value is None and name != "pad_token_id"}
    text = {name: value for name, value in text.items() if name not in taken}
    return {"model_type": kind} | (text if nested is None else own | {"text_config": text})
