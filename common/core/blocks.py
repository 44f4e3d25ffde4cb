"""Where the blocks of an architecture live, and how one becomes a pure function of its parameters."""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.core.task_vectors import Params

NOTHING = ""  # the part of a layer that is anchored where none can be
NUMBERS = ("layer_idx", "layer_number", "training")  # attributes that change nothing of a block by itself
Parts = Callable[[nn.Module], Iterable[tuple[str, nn.Module]]]
"""From a layer to (path within it, module) of what is anchored of it."""
Block = Callable[[Params, Tensor], Tensor]
"""A transformer block as a pure function: block(params, x_ATD) -> y_ATD."""


def call_module(module: nn.Module, x_ATD: Tensor) -> Tensor:
    """The ordinary call: one batch-first tensor in, one out."""
    return module(x_ATD)


def call_alone(module: nn.Module, x_ATD: Tensor, **given: Any) -> Tensor:
    """A layer with its hidden states and what is `given`: no mask, nothing else that it may be given; the first of its
    outputs, in releases of transformers that return several."""
    y = module(x_ATD, **dict.fromkeys(needed_by(type(module))), **given)
    return y[0] if isinstance(y, tuple) else y


@cache
def needed_by(kind: type[nn.Module]) -> tuple[str, ...]:
    """What a class of layers must be given besides its hidden states, though it may be None: a mask."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[2:]
    return tuple(p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)


KEY_BIASES = ("k_proj.bias", "key.bias", "k_lin.bias")


def key_biases(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """The tensors of a layer that are the bias of its keys alone, as null_gradients has them."""
    return {name: (0, 1) for name, _ in layer.named_parameters() if name.endswith(KEY_BIASES)}


def whole_layer(layer: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The layer itself is anchored."""
    return [("", layer)]


def own_shapes(skeleton: nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the model's own parameters."""
    return {name: tuple(p.shape) for name, p in skeleton.named_parameters()}


class Piece(NamedTuple):
    """A part of a stored tensor: the name that it has by itself, its place in a stack, its rows if not all, and whether
    it is stored as (inputs, outputs), where a linear map is (outputs, inputs). Of several stored tensors that make one,
    its rows behind each other, `part` says the order."""

    name: str
    place: int | None = None
    rows: slice | None = None
    turned: bool = False
    part: int = 0


Pieces = Callable[[str, tuple[int, ...]], Iterable[Piece]]
"""From the name and shape of a stored tensor to its pieces; none of one that is taken as it is stored."""


def no_pieces(name: str, shape: tuple[int, ...]) -> Iterable[Piece]:
    """Of architectures that stack and turn nothing."""
    return ()


def either(first: Pieces, second: Pieces) -> Pieces:
    """The pieces that the first knows of a tensor, or else the second."""
    return lambda name, shape: list(first(name, shape)) or second(name, shape)


def nothing_lent(names: Collection[str]) -> Iterable[str]:
    """Of experts that have all tensors that are merged."""
    return ()


def nothing_unread(name: str) -> bool:
    """Of architectures whose class loads all weights."""
    return False


class BlockModule(NamedTuple):
    """An anchored module, and how the names of its tensors begin in a checkpoint."""

    prefix: str
    module: nn.Module


@dataclass(frozen=True)
class BlockFamily:
    """All that the project knows about one architecture.

    blocks: how the names of the list of layers begin in a checkpoint; path: where that list is in the module, if
        elsewhere. more: how the names of further lists begin, a decoder's behind an encoder's.
    names: name of a stored tensor -> its name in the module, or None for one that is never merged, such as a task's
        classifier. Published files of one architecture differ in a prefix, which is removed here and nowhere else.
    call: (module, x_ATD) -> y_ATD; hides argument lists, masks and tuples.
    parts: a layer -> (path within it, module) of each of its modules that is anchored, a block of its own: the layer
        itself, its MLP, or every expert of a mixture.
    before_head: beginning of the names of what lies between the last block and a head, "" if nothing does. It is
        merged where base and experts all have it and none has a head; else it belongs to the heads.
    scope: only tensors whose name begins with this are merged; the rest is the base's.
    null_gradients: tensors, or one of several equal row groups of a fused tensor, whose gradient is exactly zero
        whatever the input: {name: (group, of how many)}. Softmax does not see a shift of all keys, hence the key bias.
    published_axes: axis order of the paper's released anchor files, "ATD", "TAD" or, of one token, "AD".
    positions: name of the position embedding, of which anchors.position_embeddings adds the first rows; "" if none.
    stored: from a model without weights to {name: shape} of the tensors in its checkpoint.
    pieces: of what tensors a checkpoint keeps stacked in one, or turned: each is read, merged and anchored by itself.
    turned: names of the matrices that a checkpoint has as (inputs, outputs); None where that is not known.
    vocabulary: the embedding and the head over its tokens, which a model may have as one tensor; () without a head.
    by_token: {name: axis} of all tensors with a row for every token, the embedding first, and along which axis they
        have them; base and experts may differ in their number.
    unread: whether a tensor is a weight that the class of the model leaves aside when it opens one. It is merged all
        the same, and a model without it has the base's.
    part: what is anchored of a layer, as anchors.part has it; None where it is what its domain anchors by default,
        NOTHING where nothing can be.
    lent: from the names of an expert's tensors to those of the base's that it has not, and is given.
    """

    blocks: str
    path: str = ""
    more: tuple[str, ...] = ()
    call: Callable[[nn.Module, Tensor], Tensor] = call_module
    parts: Parts = whole_layer
    names: Callable[[str], str | None] = str
    before_head: str = ""
    scope: str = ""
    null_gradients: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    published_axes: str = "ATD"
    positions: str = ""
    stored: Callable[[nn.Module], Mapping[str, tuple[int, ...]]] = own_shapes
    pieces: Pieces = no_pieces
    turned: Collection[str] | None = None
    vocabulary: tuple[str, ...] = ()
    by_token: Mapping[str, int] = field(default_factory=dict)
    unread: Callable[[str], bool] = nothing_unread
    part: str | None = None
    lent: Callable[[Collection[str]], Iterable[str]] = nothing_lent

    @property
    def prefixes(self) -> tuple[str, ...]:
        """How the names of all tensors begin that lie in layers."""
        return tuple(f"{blocks}." for blocks in (self.blocks, *self.more))

    def modules(self, skeleton: nn.Module) -> list[BlockModule]:
        """The anchored modules of a model, in order."""
        return [
            BlockModule(".".join(filter(None, (blocks, index, path))) + ".", module)
            for blocks, place in ((self.blocks, self.path or self.blocks), *((each, each) for each in self.more))
            for index, layer in skeleton.get_submodule(place).named_children()
            for path, module in self.parts(layer)
        ]

    def functions(self, modules: Iterable[BlockModule]) -> tuple[Block, ...]:
        """Each as a pure function; those that compute alike are one, which is compiled once."""
        found: dict[str, Block] = {}
        return tuple(found.setdefault(kind_of(module), self.pure(module)) for _, module in modules)

    def pure(self, module: nn.Module) -> Block:
        """The module, which may live on the meta device, as block(params, x_ATD) -> y_ATD. Dropout is off."""
        module = _FamilyCall(module.eval(), self.call)

        def block(params: Params, x_ATD: Tensor) -> Tensor:
            named = {f"module.{n}": p for n, p in params.items()}
            return torch.func.functional_call(module, named, (x_ATD,), tie_weights=False)  # no block ties any

        return block

    def without_null_gradients(self, tau: Params) -> Params:
        """τ with the parts that no input can move set to zero: nothing can be matched there."""
        cleaned = dict(tau)
        for name, (group, groups) in self.null_gradients.items():
            if name in cleaned:
                rows = cleaned[name].clone().chunk(groups)
                rows[group].zero_()
                cleaned[name] = torch.cat(rows)
        return cleaned


class _FamilyCall(nn.Module):
    """Lets functional_call reach a module through the family's own way of calling it."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x_ATD: Tensor) -> Tensor:
        return self.call(self.module, x_ATD)


def by_kind(modules: Iterable[BlockModule]) -> list[list[BlockModule]]:
    """Modules that compute the same function of their tensors, together."""
    kinds: dict[str, list[BlockModule]] = {}
    for each in modules:
        kinds.setdefault(kind_of(each.module), []).append(each)
    return list(kinds.values())


def kind_of(module: nn.Module) -> str:
    """Equal for modules that compute the same function of their tensors: classes, sizes and plain attributes agree.

    A layer's number, by which it would find its keys in a cache, is none of them: no block has a cache.
    """
    plain = (bool, int, float, str, type(None))
    said = [
        (
            path,
            type(part).__qualname__,
            [(n, v) for n, v in vars(part).items() if isinstance(v, plain) and n not in NUMBERS],
        )
        for path, part in module.named_modules()
    ]
    return repr((said, [(name, tuple(p.shape)) for name, p in module.named_parameters()]))


def nonzero_tensors(tau: Params) -> Params:
    """The tensors of a task vector that differ from zero; the others have no direction to match."""
    return {name: t for name, t in tau.items() if t.any()}
