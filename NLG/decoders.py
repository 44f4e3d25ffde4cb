"""Causal language models: where their blocks are, and how a config becomes a model without weights.

What is anchored is the MLP of each decoder layer, which sees one token at a time; all else is merged in weight space.
"""

from functools import cache

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from common.config import Model
from common.core.blocks import BlockFamily
from common.core.errors import InputError
from common.io.model_config import CONFIG_FILE, config_file, known_config, parse, read_text, require_family


def config_text(model: Model) -> tuple[str, str]:
    """The text of the base's config and where it is from: config.json beside the weights, or else model.arch.

    InputError if there is neither.
    """
    file = config_file(model.path("base"))
    if file:
        return read_text(file), str(file)
    if not model.arch:
        raise InputError(f"there is no {model.path('base') / CONFIG_FILE}, and model.arch does not give its text")
    return model.arch, "model.arch"


def architecture(model: Model) -> PretrainedConfig:
    """The base's config; InputError if it is of another family. No code that it names is ever run."""
    text, where = config_text(model)
    fields = parse(text, where)
    require_family(fields, where, model.family_of(FAMILIES), FAMILIES)
    return known_config(fields, where)


@cache
def skeleton(model: Model) -> nn.Module:
    """The base without its weights, on the meta device."""
    for name in ("text", "head"):
        if getattr(model, name):
            raise InputError(f"model.{name} is for vision; here the folders of base and experts tell everything")
    config = architecture(model)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    except Exception as error:  # sizes below zero, an activation that is none: whatever its layers raise
        said = " ".join(str(error).split())
        raise InputError(f"transformers cannot build the model of {config_text(model)[1]}: {said}") from error


def token_shape(model: Model) -> tuple[int, int]:
    """One token and the width of the model: an MLP sees every token alone."""
    return 1, architecture(model).hidden_size


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


BODY = "model."
BARE = ("layers.", "embed_tokens.", "norm.")


def name_of(stored: str) -> str | None:
    """The name that a tensor has in a model with a head: one saved without any lacks the prefix of its body.

    Old checkpoints keep the rotary frequencies, which follow from the config and are no weights.
    """
    if stored.endswith("rotary_emb.inv_freq"):
        return None
    return BODY + stored if stored.startswith(BARE) else stored


# In every one the MLP is down(act(gate(x)) * up(x)); the activation, SiLU or GELU, comes with the config.
DECODER = BlockFamily(
    blocks="model.layers",
    part="mlp",
    names=name_of,
    published_axes="AD",
    vocabulary=(EMBEDDING, HEAD),
)
FAMILIES = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), DECODER)
