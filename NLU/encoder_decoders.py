"""Encoders with a decoder that answer in words: T5 and its kin, BART and its kin. Names are those of the whole model.

The layers of both are anchored. What a decoder's layer reads of the encoder (cross-attention) is its own anchor: all
its weights have a gradient, and anchors stay one tensor. Relative positions that a stack keeps in its first layer
alone (T5) are the base's for the layers behind it; in the first layer they are weights like others.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from common.config import Config
from common.core.blocks import BlockFamily, by_kind, key_biases
from common.core.errors import InputError
from common.domain import other_models
from common.io.adapters import is_adapter
from common.io.checkpoints import Checkpoint
from common.io.heads import are_equal
from common.io.layer_calls import LayerCalls, one_line, require_second_derivative
from common.io.lora import LoraCheckpoint
from common.io.model_config import config_file, read_config
from common.io.skeleton import canonical_names, layers_of, path_of, stored_shapes, token_axes, unread_names

TABLE = ".relative_attention_bias"
UNSERVED = "scores, heads and merge methods that use data are not served for it; set run.score false"
UNSCORED = f"answers in words: {UNSERVED}"


def encoder_decoder(root: PreTrainedModel, where: str, base: Path) -> BlockFamily:
    """The layers of encoder and decoder of a model on the meta device; `where` names its config in what is refused.

    Raises: InputError if a layer is given what is neither its own, nor a constant, nor made of a table of relative
        positions in the first; or if it has no second derivative.
    """
    embedding, head = vocabulary_of(root)
    encoder, decoder = (StackCalls(root, which, where, base) for which in ("encoder", "decoder"))
    in_decoder = set(root.get_submodule(decoder.path).children())
    found = BlockFamily(
        blocks=encoder.path,
        more=(decoder.path,),
        call=lambda layer, x_ATD: (decoder if layer in in_decoder else encoder)(layer, x_ATD),
        names=encoder.names,
        null_gradients={} if encoder.calls.are_rotated else key_biases(root.get_submodule(f"{decoder.path}.0")),
        stored=stored_shapes,
        vocabulary=(embedding, head),
        by_token=token_axes(root),
        unread=unread_names(root),
    )
    for (_, layer), *_ in by_kind(found.modules(root)):
        require_second_derivative(found.pure(layer), layer, root.config.hidden_size, encoder.calls.name)
    return found


class StackCalls:
    """Calls the layers of an encoder or a decoder at positions 0 to T - 1: (layer, x_ATD) -> y_ATD. What a decoder's
    reads of the encoder is x_ATD.

    Args:
        root: The whole model on the meta device.
        which: encoder or decoder.
        where: Names its config in what is refused.
        base: The base, whose table of relative positions is read when a layer without one is called.
    """

    def __init__(self, root: PreTrainedModel, which: str, where: str, base: Path):
        stack = root.get_encoder() if which == "encoder" else root.get_decoder()
        layers, self.crosses, self.base = layers_of(stack), which == "decoder", base
        self.names = names_of(root)
        self.path = f"{path_of(root, stack)}.{layers}"
        first, *others = stack.get_submodule(layers).children()
        tables = [name for name, _ in first.named_modules() if name.endswith(TABLE)]
        self.table = tables[0] if len(tables) == 1 and not any(map(has_table, others)) else ""
        self.calls = LayerCalls(stack, layers, where, frozenset({"position_bias"} if tables else ()))
        self.biases: dict[int, Tensor] = {}
        if tables and not self.table and not all(map(has_table, others)):
            raise InputError(f"{self.calls.name} has relative positions of an unknown kind: {', '.join(tables)}")
        if self.table:
            self.attention = deepcopy(first.get_submodule(self.table.removesuffix(TABLE)))
            require_bias(self.attention, self.calls.name)

    def __call__(self, layer: nn.Module, x_ATD: Tensor) -> Tensor:
        given = {"encoder_hidden_states": x_ATD} if self.crosses else {}
        if self.table and not has_table(layer):
            given["position_bias"] = self.bias(x_ATD.shape[1], x_ATD.is_meta).to(x_ATD.device, x_ATD.dtype)
        return self.calls(layer, x_ATD, **given)

    @torch.no_grad()
    def bias(self, tokens: int, on_meta: bool) -> Tensor:
        """What the base's table adds to the scores of T tokens, (1, heads, T, T)."""
        if on_meta:
            return self.attention.compute_bias(tokens, tokens)
        if tokens not in self.biases:
            with _disable_current_modes():
                name = f"{self.path}.0.{self.table}.weight"
                attention = deepcopy(self.attention)
                table = Checkpoint(self.base, self.names).read([name])[name]
                attention.relative_attention_bias = nn.Embedding.from_pretrained(table)
                self.biases[tokens] = attention.compute_bias(tokens, tokens, device=torch.device("cpu"))
        return self.biases[tokens]


def require_bias(attention: nn.Module, name: str) -> None:
    """InputError, which begins with `name`, if attention makes no scores (1, heads, T, T) of its table."""
    try:
        shape = attention.compute_bias(3, 3).shape
    except Exception as error:  # it has another signature, or none such
        raise InputError(f"{name} has relative positions of an unknown kind: {one_line(error)}") from error
    if len(shape) != 4 or (shape[0], *shape[2:]) != (1, 3, 3):
        raise InputError(f"{name} has relative positions of an unknown kind, of shape {tuple(shape)}")


def has_table(layer: nn.Module) -> bool:
    """Whether a layer has relative positions of its own."""
    return any(name.endswith(TABLE) for name, _ in layer.named_modules())


def words_of(root: PreTrainedModel) -> str:
    """Name of the embedding of words that a head over them is tied to, the first of its names, which is that in a file:
    what Marian's stacks share is shared.weight there, and of two the decoder's is the one."""
    words = embedding_of(root).weight
    return next(name for name, parameter in root.named_parameters() if parameter is words)


def embedding_of(root: PreTrainedModel) -> nn.Module:
    """The embedding of words: the decoder's, where there is a head over words."""
    return (root if root.get_output_embeddings() is None else root.get_decoder()).get_input_embeddings()


def vocabulary_of(root: PreTrainedModel) -> tuple[str, str]:
    """Names of the embedding of words and of the head over them."""
    return words_of(root), f"{path_of(root, root.get_output_embeddings())}.weight"


def copies_of(root: PreTrainedModel) -> frozenset[str]:
    """Names under which a file may have the embedding of words again, as where encoder and decoder share it."""
    words, head = getattr(embedding_of(root), "weight", None), root.get_output_embeddings()
    tied = {name for name, parameter in root.named_parameters(remove_duplicate=False) if parameter is words}
    if not tied:  # what embeds no words by one matrix, as CANINE
        return frozenset()
    return frozenset(tied - {words_of(root), *([f"{path_of(root, head)}.weight"] if head is not None else [])})


def without(copies: frozenset[str], names: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """From a stored name to what `names` makes of it; None for a copy of the embedding."""

    def name_of(stored: str) -> str | None:
        name = names(stored)
        return None if name in copies else name

    return name_of


def names_of(root: PreTrainedModel) -> Callable[[str], str | None]:
    """From a stored name to that in the whole model; None for a copy of the embedding."""
    return without(copies_of(root), canonical_names(root))


def require_equal_copies(model: Checkpoint, root: PreTrainedModel) -> None:
    """InputError if a file has the embedding of words several times, and not alike."""
    embedding = words_of(root)
    for copy in sorted(copies_of(root) & model.shapes.keys()):
        if embedding in model.shapes and not are_equal(model, embedding, copy):
            raise InputError(
                f"{model.path}: {copy} and {embedding} differ, which are one; save the model with save_pretrained"
            )


def require_whole(model: Checkpoint, root: PreTrainedModel) -> None:
    """InputError if a file lacks the embedding of words or a first layer, as one of an encoder alone does, or of a
    class that has all of it under other names."""
    stacks = {path_of(root, stack): stack for stack in (root.get_encoder(), root.get_decoder())}
    first = tuple(f"{path}.{layers_of(stack)}.0." for path, stack in stacks.items())
    needed = [vocabulary_of(root)[0], *(name for name in stored_shapes(root) if name.startswith(first))]
    missing = next((name for name in needed if name not in model.shapes), None)
    if not missing:
        return
    kind, file = type(root).__name__, config_file(model.path)
    named = (read_config(file).get("architectures") or [kind])[0] if file else kind
    if named == kind or not file:
        raise InputError(f"{model.path} has no tensor {missing}; save the whole model with save_pretrained")
    raise InputError(
        f"{file} names {named}, whose file has no tensor {missing} as the {kind} has that is merged here; give all as "
        f"{kind}, of a classifier its base_model saved with save_pretrained, or all as encoders alone"
    )


def check_encoder_decoder(config: Config, root: PreTrainedModel, where: str) -> None:
    """InputError if answers are to be scored, if a model's encoder and decoder embed words each in its own way, or if
    an adapter trains the shared embedding: both stacks embed words by copies, which peft adapts not.
    """
    if config.run.score:
        raise InputError(f"{where}: a {type(root).__name__} {UNSCORED}")
    embedding, _ = names = vocabulary_of(root)
    base = config.model.path("base")
    for path in (base, *other_models(config).values()):
        if is_adapter(path):
            adapter = LoraCheckpoint(path, base, names_of(root), names)
            if copies_of(root) and embedding in adapter.factors.keys() | adapter.saved.keys():
                raise InputError(
                    f"{path} trains {embedding}, of which encoder and decoder have copies that it leaves alone: what "
                    "it was trained to be cannot be told; merge it into its model with peft, and give that"
                )
            continue
        model = Checkpoint(path, canonical_names(root))
        require_equal_copies(model, root)
        require_whole(model, root)
