"""Causal language models: where their blocks are, and how a config becomes a model without weights.

What is anchored is the MLP of each decoder layer, which sees one token at a time; all else is merged in weight space.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from common.config import Model
from common.core.blocks import BlockFamily, Piece, Pieces
from common.core.errors import InputError
from common.io.model_config import CONFIG_FILE, config_file, known_config, parse, read_text, require_family
from common.io.skeleton import beginnings, canonical_names, layers_of, path_of, stored_name, stored_path, stored_shapes
from NLG.mixtures import experts_of, keeps_width, layout_of, pieces_of


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


def opener_of(config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """What opens a model of this config: that of a language model, or of one that sees images besides."""
    seeing = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    named = (config.architectures or [""])[0]
    causal = config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and named not in seeing.values()
    return AutoModelForCausalLM if causal or config.model_type not in seeing else AutoModelForImageTextToText


@cache
def skeleton(model: Model) -> nn.Module:
    """The base without its weights, on the meta device."""
    for name in ("text", "head"):
        if getattr(model, name):
            raise InputError(f"model.{name} is for vision; here the folders of base and experts tell everything")
    config = architecture(model)
    try:
        with torch.device("meta"):
            opener = opener_of(config)
            root = opener.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
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
    layers = dict(root.get_submodule(path).named_children())
    for layer in layers.values():
        if not list(mlps(layer)):
            children = ", ".join(name for name, _ in layer.named_children())
            raise InputError(
                f"{config_text(model)[1]}: a layer of {type(root).__name__} is made of {children}: there is no MLP "
                f"among them ({', '.join(MLPS)}), which is what is anchored of a language model"
            )
    width = token_shape(model)[1]
    for name, mlp in (each for layer in layers.values() for each in mlps(layer)):
        if not hasattr(mlp, "experts") and not keeps_width(mlp, width):
            raise InputError(
                f"{config_text(model)[1]}: the {name} of a layer of {type(root).__name__} does not take a token of "
                f"width {width} to one: it is none that can be anchored"
            )
    mixtures = ((i, name, mlp) for i, layer in layers.items() for name, mlp in mlps(layer) if hasattr(mlp, "experts"))
    mixture = next(mixtures, None)
    embedding, head = (
        stored_name(root, f"{path_of(root, part)}.weight")
        for part in (root.get_input_embeddings(), root.get_output_embeddings())
    )
    found = BlockFamily(
        blocks=stored_path(root, path),
        path=path,
        parts=mlps,
        names=canonical_names(root),
        published_axes="AD",
        stored=stored_shapes,
        vocabulary=(embedding, head),
    )
    if any(isinstance(part, Conv1D) for part in root.modules()):
        return replace(
            found, parts=lambda layer: [(n, as_linear(part)) for n, part in mlps(layer)], pieces=turned(root)
        )
    if mixture is None:
        return found
    index, name, mlp = mixture
    layout = layout_of(root, f"{path}.{index}", mlp.experts, f"{name}.experts")

    def parts(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, mlp in mlps(layer):
            yield from experts_of(mlp, layout, width) if hasattr(mlp, "experts") else [(name, mlp)]

    return replace(found, parts=parts, pieces=pieces_of(path, found.blocks, name, mlp.experts, layout))


def turned(skeleton: nn.Module) -> Pieces:
    """GPT-2 stores its matrices as (inputs, outputs): each is its one piece, the other way round."""
    names = {f"{path}.weight" for path, part in skeleton.named_modules() if isinstance(part, Conv1D)}
    return lambda name, shape: [Piece(name, turned=True)] if name in names else []


def as_linear(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device whose matrices are (outputs, inputs)."""
    module = deepcopy(module)
    for path, part in list(module.named_modules()):
        if isinstance(part, Conv1D):
            inputs, outputs = part.weight.shape
            module.set_submodule(path, nn.Linear(inputs, outputs, device="meta"))
    return module


@cache
def body(model: Model) -> tuple[str, ...]:
    """How the names of all tensors begin that lie in no head."""
    return beginnings(skeleton(model))


MLPS = ("mlp", "feed_forward", "ffn")


def mlps(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The MLP of a decoder layer, which sees every token alone."""
    yield from ((name, part) for name, part in layer.named_children() if name in MLPS)
