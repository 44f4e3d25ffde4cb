"""Causal language models: where their blocks are, and how a config becomes a model without weights.

What is anchored is the MLP of each decoder layer, which sees one token at a time; all else is merged in weight space.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from common.config import Model
from common.core.blocks import BlockFamily
from common.core.errors import InputError
from common.io.model_config import CONFIG_FILE, config_file, known_config, parse, read_text, require_family
from common.io.skeleton import beginnings, canonical_names, layers_of, path_of, stored_name, stored_path, stored_shapes


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
    """The base's config; InputError if model.family names another architecture. No code that it names is ever run."""
    text, where = config_text(model)
    fields = parse(text, where)
    require_family(fields, where, model.family)
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
            root = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    except Exception as error:  # sizes below zero, an activation that is none: whatever its layers raise
        said = " ".join(str(error).split())
        raise InputError(f"transformers cannot build the model of {config_text(model)[1]}: {said}") from error
    if root.get_output_embeddings() is None:
        raise InputError(f"{config_text(model)[1]}: a {type(root).__name__} is no language model")
    return root


def token_shape(model: Model) -> tuple[int, int]:
    """One token and the width of the model: an MLP sees every token alone."""
    return 1, architecture(model).get_text_config().hidden_size


@cache
def family(model: Model) -> BlockFamily:
    """The blocks of any decoder that transformers knows, found in its skeleton.

    Raises: InputError if its layers have no MLP of their own, a module that takes a token of width D to one.
    """
    root = skeleton(model)
    decoder = root.get_decoder()
    path = ".".join(filter(None, (path_of(root, decoder), layers_of(decoder))))
    if not layers_of(decoder):
        raise InputError(f"{config_text(model)[1]}: a {type(root).__name__} has no list of layers to anchor")
    for layer in root.get_submodule(path):
        if not list(mlps(layer)):
            children = ", ".join(name for name, _ in layer.named_children())
            raise InputError(
                f"{config_text(model)[1]}: a layer of {type(root).__name__} is made of {children}: there is no MLP "
                f"among them ({', '.join(MLPS)}), which is what is anchored of a language model"
            )
    embedding, head = (
        stored_name(root, f"{path_of(root, part)}.weight")
        for part in (root.get_input_embeddings(), root.get_output_embeddings())
    )
    return BlockFamily(
        blocks=stored_path(root, path),
        path=path,
        parts=mlps,
        names=canonical_names(root),
        published_axes="AD",
        stored=stored_shapes,
        vocabulary=(embedding, head),
    )


@cache
def body(model: Model) -> tuple[str, ...]:
    """How the names of all tensors begin that lie in no head."""
    return beginnings(skeleton(model))


MLPS = ("mlp", "feed_forward", "ffn")


def mlps(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The MLP of a decoder layer, which sees every token alone."""
    yield from ((name, part) for name, part in layer.named_children() if name in MLPS)
