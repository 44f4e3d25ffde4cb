"""Causal language models: where their blocks are, and how a config becomes a model without weights.

What is anchored is the MLP of each decoder layer, which sees one token at a time; all else is merged in weight space.
"""

import json
from functools import cache

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from common.config import Model
from common.core.blocks import BlockFamily
from common.core.errors import InputError


def architecture(model: Model) -> PretrainedConfig:
    """The config.json beside the base's weights, or what model.arch says where there is none; no code is ever run.

    InputError if there is neither, or if it is of another family.
    """
    file = model.path("base") / "config.json"
    if not file.is_file() and not model.arch:
        raise InputError(f"there is no {file}, and model.arch does not give its text")
    where = str(file) if file.is_file() else "model.arch"
    try:
        fields = json.loads(file.read_text() if file.is_file() else model.arch)
        config = AutoConfig.for_model(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{where} is no config of a model that transformers knows: {error}") from error
    if config.model_type != model.family_of(FAMILIES):
        raise InputError(f"{where} has model type {config.model_type!r}, model.family is {model.family_of(FAMILIES)!r}")
    return config


@cache
def skeleton(model: Model) -> nn.Module:
    """The base without its weights, on the meta device."""
    for name in ("text", "head"):
        if getattr(model, name):
            raise InputError(f"model.{name} is for vision; here the folders of base and experts tell everything")
    config = architecture(model)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()


def token_shape(model: Model) -> tuple[int, int]:
    """One token and the width of the model: an MLP sees every token alone."""
    return 1, architecture(model).hidden_size


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def name_of(stored: str) -> str | None:
    """Old checkpoints keep the rotary frequencies, which follow from the config and are no weights."""
    return None if stored.endswith("rotary_emb.inv_freq") else stored


# In every one the MLP is down(act(gate(x)) * up(x)); the activation, SiLU or GELU, comes with the config.
DECODER = BlockFamily(
    blocks="model.layers",
    part="mlp",
    names=name_of,
    published_axes="AD",
    vocabulary=(EMBEDDING, HEAD),
)
FAMILIES = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), DECODER)
