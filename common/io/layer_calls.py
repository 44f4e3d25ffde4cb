"""What a transformers model calls its layers with besides their hidden states: masks, angles, biases of positions.

The model itself tells, whatever its architecture: it runs over a batch of tokens while its layers do nothing but note
their arguments. The weights outside of the layers are NaN meanwhile, and with them all hidden states, so an argument
that hangs on either shows.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from common.core.blocks import Block
from common.core.errors import InputError
from common.core.linear import usual_linear

KEPT = 8  # shapes of inputs whose arguments are kept: chunks of anchors, batches of adaptation
OUTPUTS = 4  # of a layer, at most
KIND = "called_as"  # attribute of a layer: those where it is equal are called alike

Arguments = dict[str, Any]


class LayerCalls:
    """Calls a layer as its model does at positions 0 to T - 1: (layer, x_ATD) -> y_ATD.

    Args:
        tower: The model on the meta device. Its layers get an attribute that says which of them are called alike, and
            the constants that they keep as buffers.
        path: Where the list of its layers is.
        where: Names its config in what is refused.
        supplied: Arguments that the caller gives of himself.
    Raises: InputError if the model cannot be run so, if a layer is given what is neither its own nor a constant, or if
        what lies at the path is a part of a layer alone.
    """

    def __init__(self, tower: PreTrainedModel, path: str, where: str, supplied: frozenset[str] = frozenset()):
        self.supplied = supplied
        self.name = f"{where}: a layer of {type(tower).__name__}"
        require_whole_layers(tower, path, self.name)
        layers = list(tower.get_submodule(path).children())
        kinds = getattr(tower.config, "layer_types", None) or []
        for index, layer in enumerate(layers):
            setattr(layer, KIND, str(kinds[index]) if len(kinds) == len(layers) else "")
        self.hollow = without_weights(tower, path)
        self.layers = list(self.hollow.get_submodule(path).children())
        for layer, twin in zip(layers, self.layers, strict=True):
            for part, with_values in zip(layer.modules(), twin.modules(), strict=True):
                part._buffers |= with_values._buffers
            if lost := [name for name, buffer in layer.named_buffers() if buffer.is_meta]:
                raise InputError(f"{self.name} keeps {lost[0]}, which its config does not tell; it cannot be anchored")
        self.noted: dict[tuple, dict[str, Arguments]] = {}
        self.arguments(1, 2, torch.device("cpu"), torch.float32)

    def __call__(self, layer: nn.Module, x_ATD: Tensor, **given: Any) -> Tensor:
        anchors, tokens, _ = x_ATD.shape
        named = self.arguments(anchors, tokens, x_ATD.device, x_ATD.dtype)[getattr(layer, KIND)] | given
        constants = {name: buffer.to(x_ATD.device) for name, buffer in layer.named_buffers()}
        y = torch.func.functional_call(layer, constants, (x_ATD,), named) if constants else layer(x_ATD, **named)
        return y[0] if isinstance(y, tuple) else y

    @property
    def are_rotated(self) -> bool:
        """Whether layers turn queries and keys by their positions."""
        given = {name for named in next(iter(self.noted.values())).values() for name, _ in tensors_of(named)}
        kept = any(buffer.is_floating_point() for layer in self.layers for buffer in layer.buffers())
        return kept or "position_embeddings" in given

    def arguments(self, anchors: int, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Arguments]:
        """{kind of layer: {name: argument}} for a batch of sequences. Raises: InputError as the class does."""
        key = anchors, tokens, device, dtype
        if key not in self.noted:
            if len(self.noted) == KEPT:
                self.noted.pop(next(iter(self.noted)))
            # a call can be traced, and its linear maps counted: what is kept must be tensors, and no map of the block
            with usual_linear(), _disable_current_modes(), torch.no_grad():
                self.noted[key] = tree_map(lambda value: moved(value, device, dtype), self.note(anchors, tokens))
        return self.noted[key]

    def note(self, anchors: int, tokens: int) -> dict[str, Arguments]:
        """The arguments, as the model makes them."""
        seen, failed = [], None
        for outputs in range(OUTPUTS):
            if len(seen) < len(self.layers):
                seen, failed = self.run(anchors, tokens, outputs)
        if len(seen) < len(self.layers):
            raise InputError(f"{self.name} cannot be called by itself: {one_line(failed)}")
        found: dict[str, Arguments] = {}
        for kind, named in seen:
            if foreign := [name for name, value in named.items() if not all(map(is_constant, tree_leaves(value)))]:
                others = f"is called with {', '.join(foreign)} besides its hidden states"
                raise InputError(f"{self.name} {others}, which are not the layer's own; it cannot be anchored")
            if not alike(found.setdefault(kind, named), named):
                raise InputError(f"{self.name} is called otherwise than the layers before it; it cannot be anchored")
        return found

    def run(self, anchors: int, tokens: int, outputs: int) -> tuple[list[tuple[str, Arguments]], Exception | None]:
        """(kind, arguments) of each layer that the model comes to, and what it fails with."""
        seen: list[tuple[str, Arguments]] = []
        for layer in self.layers:
            layer.forward = noting(layer, seen, outputs, self.supplied)
        try:
            self.hollow(input_ids=torch.zeros(anchors, tokens, dtype=torch.long), use_cache=False)
        except Exception as error:  # whatever the code around the layers raises; behind them it does not matter
            return seen, error
        return seen, None


def require_whole_layers(tower: nn.Module, path: str, name: str) -> None:
    """InputError, which begins with `name`, if beside the list of layers lie others of its length: a model such as XLM
    has its attentions in one and its feed-forward networks in another, and calls one of each in turn."""
    parent, depth = tower.get_submodule(path.rpartition(".")[0]), len(list(tower.get_submodule(path).children()))
    lists = [n for n, part in parent.named_children() if isinstance(part, nn.ModuleList) and len(part) == depth]
    if len(lists) > 1:
        raise InputError(f"{name} lies in pieces in the lists {', '.join(lists)}; it cannot be anchored")


def noting(
    layer: nn.Module, seen: list[tuple[str, Arguments]], outputs: int, supplied: frozenset[str]
) -> Callable[..., Any]:
    """In place of a layer's forward: notes what it is called with, by name, and gives back its hidden states, with so
    many outputs besides, if any in a tuple. They hang on weights, so they are NaN."""
    signature = inspect.signature(type(layer).forward)

    def forward(*args: Any, **named: Any) -> Any:
        bound = signature.bind(layer, *args, **named)
        _, (_, hidden), *others = bound.arguments.items()
        given: Arguments = {}
        for name, value in others:
            given |= value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        seen.append((getattr(layer, KIND), {name: value for name, value in given.items() if name not in supplied}))
        return (hidden, *[torch.full((), torch.nan)] * outputs) if outputs else hidden

    return forward


def without_weights(tower: PreTrainedModel, path: str) -> PreTrainedModel:
    """A copy with its constants on the CPU. Every weight around the layers is NaN and takes no memory; theirs stay on
    the meta device."""
    hollow = deepcopy(tower)
    compute_buffers(hollow)
    inside = set(hollow.get_submodule(path).modules())
    for part in set(hollow.modules()) - inside:
        for name, parameter in list(part.named_parameters(recurse=False)):
            nothing = torch.full((), torch.nan).expand(parameter.shape)
            setattr(part, name, nn.Parameter(nothing, requires_grad=False))
    return hollow


@torch.no_grad()
def compute_buffers(model: PreTrainedModel) -> None:
    """Give the buffers of a model on the meta device their values on the CPU, as from_pretrained does. One that its
    class does not compute stays where it is."""
    holders = [part for part in model.modules() if part._buffers]
    before = [dict(part._buffers) for part in holders]
    for part in holders:
        part._buffers |= {n: torch.empty_like(b, device="cpu") for n, b in part._buffers.items() if b is not None}
    for part in (*holders, model):
        # it computes with weights, of which there are none, or asks its config for what is not there
        with suppress(NotImplementedError, AttributeError):
            model._init_weights(part)
    for part, own in zip(holders, before, strict=True):
        part._buffers |= {name: own[name] for name, b in part._buffers.items() if b is not None and not b._version}


def tensors_of(named: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name of an argument, tensor in it)."""
    yield from ((n, leaf) for n, value in named.items() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def is_constant(value: Any) -> bool:
    """Whether something does not hang on weights or hidden states."""
    if isinstance(value, Tensor):
        return not value.is_meta and not value.isnan().any()
    return isinstance(value, bool | int | float | str | None)


def moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A tensor on a device, of a type if it is of real numbers; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def alike(one: Arguments, other: Arguments) -> bool:
    """Whether two layers are called with equal arguments."""
    mine, theirs = tree_leaves(one), tree_leaves(other)
    return one.keys() == other.keys() and len(mine) == len(theirs) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(mine, theirs, strict=True)
    )  # fmt: skip


@torch.enable_grad()
def require_second_derivative(block: Block, module: nn.Module, width: int, name: str) -> None:
    """InputError, which begins with `name`, if a block of the module keeps no width, or has no derivative by its input
    of its derivatives by its weights, which is what anchors are optimised by; or if its hidden states reach not all of
    its weights. It is tried without numbers."""
    x_ATD = torch.empty(2, 2, width, device="meta", requires_grad=True)
    theta = {n: torch.empty_like(p, device="meta").requires_grad_() for n, p in module.named_parameters()}
    try:
        y_ATD = block(theta, x_ATD)
        by_theta = torch.autograd.grad(y_ATD.square().sum(), list(theta.values()), create_graph=True, allow_unused=True)
        torch.autograd.grad([g.square().sum() for g in by_theta if g is not None], x_ATD)
    except Exception as error:  # whatever its kernels raise
        raise InputError(f"{name} has no second derivative; it cannot be anchored: {one_line(error)}") from error
    if idle := [own for own, g in zip(theta, by_theta, strict=True) if g is None]:
        raise InputError(f"{name} has weights that its hidden states do not reach, {idle[0]}; it cannot be anchored")
    if y_ATD.shape != x_ATD.shape:
        raise InputError(f"{name} takes a token of width {width} to one of width {y_ATD.shape[-1]}, not to one alike")


def one_line(error: Exception | None) -> str:
    """What an error says, without its breaks."""
    return " ".join(str(error).split())
