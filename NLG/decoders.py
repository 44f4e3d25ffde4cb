"""Causal language models: where their blocks are, and how a config becomes a model without weights.

What is anchored is the MLP of each decoder layer, which sees one token at a time; all else is merged in weight space.
Or, not of the paper, the layer as a whole (anchors.part).
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from common.config import Model
from common.core.blocks import BlockFamily, Parts, Piece, Pieces, by_kind, either, key_biases, whole_layer
from common.core.errors import InputError
from common.io.cached import cached_by_files
from common.io.layer_calls import LayerCalls, require_second_derivative
from common.io.model_config import config_file, known_config, parse, read_text, require_family
from common.io.model_files import CONFIG_FILE
from common.io.skeleton import (
    absent_names,
    beginnings,
    canonical_names,
    decoder_of,
    layers_of,
    path_of,
    renamed_within,
    stored_name,
    stored_path,
    stored_shapes,
    token_axes,
    turned_weights,
    unread_names,
)
from NLG.mixtures import Layout, experts_of, keeps_width, layout_of, pieces_of
from NLG.openers import opener_of


def config_text(model: Model) -> tuple[str, str]:
    """The text of the base's config and where it is from: config.json beside the weights, or else model.arch.

    InputError if there is neither.
    """
    if file := config_file(model.path("base")):
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


@cached_by_files
def skeleton(model: Model) -> nn.Module:
    """The base without its weights, on the meta device.

    Attention is the plain formula: the fused kernels have no second derivative.
    """
    for name in ("text", "head"):
        if getattr(model, name):
            raise InputError(f"model.{name} is for vision; here the folders of base and experts tell everything")
    config = architecture(model)
    opener = opener_of(config, config_text(model)[1])
    try:
        with torch.device("meta"):
            how = {"attn_implementation": "eager", "trust_remote_code": False}
            root = opener.from_config(config, dtype=torch.float32, **how).eval()
    except Exception as error:  # sizes below zero, an activation that is none: whatever its layers raise
        said = " ".join(str(error).split())
        raise InputError(f"transformers cannot build the model of {config_text(model)[1]}: {said}") from error
    if root.get_output_embeddings() is None:
        raise InputError(f"{config_text(model)[1]}: a {type(root).__name__} is no language model")
    return root


def token_shape(model: Model, part: str = "mlp") -> tuple[int, int]:
    """Tokens of an anchor, and the width of the model: an MLP sees every token alone; for a layer as many as the paper
    has for the layers of encoders."""
    return 1 if part == "mlp" else 5, architecture(model).get_text_config().hidden_size


@cached_by_files
def family(model: Model, part: str = "mlp") -> BlockFamily:
    """The blocks of any decoder that transformers knows, found in its skeleton: the MLPs of its layers, or the layers.

    Raises: InputError if its layers have no MLP of their own, a module that takes a token of width D to one; or of
        whole layers, if one is not a twice differentiable function of its hidden states.
    """
    reading(model)
    other = next(one for one in ANCHORED if one != part)
    try:
        return anchored(model, part)
    except InputError as error:
        try:
            anchored(model, other)
        except InputError:
            raise InputError(
                f"{error}; nor can anchors.part be {other}, so the architecture is for scripts/merge.py alone, which "
                "anchors nothing"
            ) from error
        raise InputError(f"{error}; anchors.part {other} anchors {ANCHORED[other]}") from error


def anchored(model: Model, part: str) -> BlockFamily:
    """The family with one part of its layers anchored; InputError as `family`, whatever else could be."""
    found, root, where = reading(model), skeleton(model), config_text(model)[1]
    found = (with_mlps if part == "mlp" else with_layers)(found, root, where, token_shape(model)[1])
    if absent := next(absent_names(root, found), ""):
        raise InputError(
            f"{where}: checkpoints of a {type(root).__name__} have no tensor {absent}; how they keep it within others "
            "is not known here, so it cannot be anchored"
        )
    return found


@cached_by_files
def reading(model: Model) -> BlockFamily:
    """How checkpoints of the base's architecture are read and written, whatever is anchored; InputError if they have
    no list of layers, or keep experts in a way that is not known."""
    root, where = skeleton(model), config_text(model)[1]
    layers = layers_of(decoder_of(root))
    if not layers:
        raise InputError(f"{where}: a {type(root).__name__} has no list of layers to anchor; take a decoder that has")
    path = ".".join(filter(None, (path_of(root, decoder_of(root)), layers)))
    blocks = stored_path(root, path)
    mixture = mixture_of(root, path, blocks)
    embedding, head = (
        stored_name(root, f"{path_of(root, part)}.weight")
        for part in (root.get_input_embeddings(), root.get_output_embeddings())
    )
    return BlockFamily(
        blocks=blocks,
        path=path,
        names=canonical_names(root),
        stored=stored_shapes,
        vocabulary=(embedding, head),
        by_token=token_axes(root),
        unread=unread_names(root),
        turned=turned_weights(root),
        pieces=either(
            pieces_of(path, blocks, *mixture) if mixture else turned(root), renamed(root, path, blocks, mixture)
        ),
    )


def renamed(root: nn.Module, path: str, blocks: str, mixture: tuple[str, nn.Module, Layout] | None) -> Pieces:
    """What a checkpoint calls otherwise than the layer does: each is its one piece, by the layer's name. That of what
    holds experts is the checkpoint's, of a layer that has some."""
    names = renamed_within(root, path, blocks)
    if mixture:
        mlp, stored = f".{mixture[0]}.", f".{mixture[2].mlp}."
        layers = root.get_submodule(path).named_children()
        routed = (number for number, layer in layers if any(hasattr(part, "experts") for _, part in mlps(layer)))
        mixed = tuple(f"{blocks}.{number}." for number in routed)
        names = {name: own.replace(mlp, stored, 1) if own.startswith(mixed) else own for name, own in names.items()}
    return lambda name, shape: [Piece(names[name])] if names.get(name, name) != name else []


def mixture_of(root: nn.Module, path: str, blocks: str) -> tuple[str, nn.Module, Layout] | None:
    """Of the first layer with routed experts: the path of what holds them, they, how checkpoints keep them; or None.
    `path` and `blocks` are those of the list of layers in the model and in a checkpoint."""
    for index, layer in root.get_submodule(path).named_children():
        for name, mlp in mlps(layer):
            if hasattr(mlp, "experts"):
                places = f"{path}.{index}", f"{blocks}.{index}"
                return name, mlp.experts, layout_of(root, *places, mlp.experts, f"{name}.experts")
    return None


def with_mlps(found: BlockFamily, root: nn.Module, where: str, width: int) -> BlockFamily:
    """Anchored is the MLP of each layer, of a mixture every expert. Raises: InputError as `family` does."""
    kind = f"layer of {type(root).__name__}"
    for layer in root.get_submodule(found.path).children():
        if not list(mlps(layer)):
            children = ", ".join(name for name, _ in layer.named_children())
            raise InputError(
                f"{where}: a {kind} is made of {children}: there is no MLP among them ({', '.join(MLPS)}), which is "
                "what is anchored of a language model"
            )
        for name, mlp in mlps(layer):
            if not hasattr(mlp, "experts") and not keeps_width(mlp, width):
                raise InputError(
                    f"{where}: the {name} of a {kind} does not take a token of width {width} to one: it is none that "
                    "can be anchored"
                )
    mixture = mixture_of(root, found.path, found.blocks)

    def parts(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, mlp in mlps(layer):
            yield from experts_of(mlp, mixture[2], width) if hasattr(mlp, "experts") else [(name, mlp)]

    return replace(found, parts=straight(parts), published_axes="AD")


def with_layers(found: BlockFamily, root: nn.Module, where: str, width: int) -> BlockFamily:
    """Anchored is each layer as a whole, as the model calls it at its first positions. Raises: InputError as `family`
    does, and if it routes tokens to experts."""
    for name, part in root.get_submodule(found.path).named_modules():
        if is_routed(name, part):
            kind = f"{where}: a layer of {type(root).__name__}"
            if not name.endswith(".experts"):
                raise InputError(f"{kind} holds stacks of matrices ({name}), which are not anchored together")
            raise InputError(
                f"{kind} has experts ({name}); which of them answer a token is no function with a derivative, and one "
                "that no anchor comes to matches nothing"
            )
    calls = LayerCalls(decoder_of(root), layers_of(decoder_of(root)), where)
    found = replace(found, part="layer", parts=straight(whole_layer), call=calls)
    modules = found.modules(root)
    for (_, layer), *_ in by_kind(modules):
        require_second_derivative(found.pure(layer), layer, width, calls.name)
    first = root.get_submodule(f"{found.path}.0")
    return replace(found, null_gradients={} if calls.are_rotated else key_biases(first) | fused_key_biases(first))


def fused_key_biases(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """As key_biases, of attention that has queries, keys and values one after another in one tensor: GPT-2's, and
    GPT-BigCode's if its heads share keys and values."""
    found = {}
    for name, attention in layer.named_modules():
        fused = getattr(attention, "c_attn", None)
        if isinstance(fused, Conv1D):
            found[f"{name}.c_attn.bias"] = (1, 3)
        elif fused is not None and getattr(attention, "multi_query", False):
            found[f"{name}.c_attn.bias"] = (attention.num_heads, attention.num_heads + 2)
    return found


def is_routed(name: str, part: nn.Module) -> bool:
    """Whether a module holds the experts of a mixture: by its name, or as stacks of matrices."""
    stacks = (p for p in part.parameters(recurse=False) if p.ndim > 2 and 1 not in p.shape)
    return name.endswith(".experts") or (not isinstance(part, nn.Conv1d) and any(True for _ in stacks))


def turned(skeleton: nn.Module) -> Pieces:
    """GPT-2 stores its matrices as (inputs, outputs): each is its one piece, the other way round."""
    names = turned_weights(skeleton)
    return lambda name, shape: [Piece(name, turned=True)] if name in names else []


def straight(parts: Parts) -> Parts:
    """The same parts, their matrices (outputs, inputs)."""
    return lambda layer: [(name, as_linear(part)) for name, part in parts(layer)]


def as_linear(module: nn.Module) -> nn.Module:
    """A module on the meta device whose matrices are (outputs, inputs), a copy of one that has others."""
    if not any(isinstance(part, Conv1D) for part in module.modules()):
        return module
    module = deepcopy(module)
    for path, part in list(module.named_modules()):
        if isinstance(part, Conv1D):
            inputs, outputs = part.weight.shape
            module.set_submodule(path, nn.Linear(inputs, outputs, device="meta"))
    return module


@cached_by_files
def body(model: Model) -> tuple[str, ...]:
    """How the names of all tensors begin that lie in no head."""
    return beginnings(skeleton(model))


ANCHORED = {"mlp": "the MLP of each layer, or every expert by itself", "layer": "the layer as a whole"}
MLPS = ("mlp", "feed_forward", "ffn")


def mlps(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The MLP of a decoder layer, which sees every token alone."""
    yield from ((name, part) for name, part in layer.named_children() if name in MLPS)
