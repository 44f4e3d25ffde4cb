"""Mixtures of experts: every routed expert is an MLP of its own, whether a checkpoint keeps it apart or in a stack.

transformers stacks the experts of a layer in three-dimensional tensors, gate and up in one. Most checkpoints keep them
apart, some keep the stacks: a Layout says which, and what each tensor of one expert is called.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from common.core.blocks import Piece, Pieces
from common.core.errors import InputError


@dataclass(frozen=True)
class Layout:
    """How a checkpoint keeps the experts of a layer.

    mlp: path within the layer of what holds them, as it is stored. stacked: whether all are in one tensor. into: names
    of the matrices of one expert that its input meets, gate before up; out: the name of that behind.
    """

    mlp: str
    stacked: bool
    into: tuple[str, ...] = ()
    out: str = ""


def layout_of(skeleton: PreTrainedModel, layer: str, place: str, experts: nn.Module, path: str) -> Layout:
    """The layout of a class's checkpoints, by the conversions with which transformers reads them.

    Args:
        skeleton: The model without weights.
        layer, place: The path of a layer in the model, and what its checkpoints call it.
        experts: That layer's stacked experts.
        path: Their path within it.
    Raises: InputError if the module is none that transformers computes by its common kernels.
    """
    if not hasattr(experts, "has_gate") or getattr(experts, "has_post_expert_norm", False):
        raise InputError(
            f"{layer}.{path} is a {type(experts).__name__}, whose experts cannot be taken apart: such models are not "
            "merged here"
        )
    first = f"{layer}.{path}.{into_name(experts)}"
    meta = torch.empty(experts.get_parameter(into_name(experts)).shape, device="meta")
    stored = [name.removeprefix(f"{place}.") for name in revert_weight_conversion(skeleton, {first: meta})]
    if all(".experts.0." not in name for name in stored):
        return Layout(stored[0].rpartition(".experts.")[0], True)
    mlp = stored[0].partition(".experts.")[0]
    sources = {
        target.rpartition("experts.")[2]: tuple(source.rpartition("experts.*.")[2] for source in each.source_patterns)
        for each in get_model_conversion_mapping(skeleton, add_legacy=False)
        for target in each.target_patterns
        if "experts.*." in each.source_patterns[0]
    }
    return Layout(mlp, False, sources[into_name(experts)], sources["down_proj"][0])


def into_name(experts: nn.Module) -> str:
    """The stack of what an expert's input meets."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


class Expert(nn.Module):
    """One routed expert, its tensors named as a checkpoint keeps them: (A, T, D) to (A, T, D)."""

    def __init__(self, experts: nn.Module, layout: Layout):
        super().__init__()
        self.layout, self.gated = layout, experts.has_gate
        self.gate = experts._apply_gate  # a method, whose module stays outside
        self.act_fn = getattr(experts, "act_fn", None)
        stacks = {name: p[0] for name, p in experts.named_parameters()}
        if layout.stacked:
            for name, tensor in stacks.items():
                turned = experts.is_transposed and tensor.ndim == 2
                self.register_parameter(name, nn.Parameter(tensor.T if turned else tensor))
        else:
            rows = stacks[into_name(experts)].chunk(len(layout.into))
            for name, matrix in zip((*layout.into, layout.out), (*rows, stacks["down_proj"]), strict=True):
                part, _, last = name.rpartition(".")
                self.add_module(part, nn.Module())
                self.get_submodule(part).register_parameter(last, nn.Parameter(matrix))

    def forward(self, x_ATD: Tensor) -> Tensor:
        if self.layout.stacked:
            into = "gate_up_proj" if self.gated else "up_proj"
            return self.through("down_proj", self.between(self.through(into, x_ATD)))
        both = [nn.functional.linear(x_ATD, attrgetter(name)(self)) for name in self.layout.into]
        return nn.functional.linear(self.between(torch.cat(both, -1)), attrgetter(self.layout.out)(self))

    def between(self, hidden: Tensor) -> Tensor:
        """What lies between the matrices: the gate, or the activation alone."""
        return self.gate(hidden) if self.gated else self.act_fn(hidden)

    def through(self, name: str, x: Tensor) -> Tensor:
        """A matrix of a stack, and its bias if there is one."""
        return nn.functional.linear(x, getattr(self, name), getattr(self, f"{name}_bias", None))


def experts_of(mlp: nn.Module, layout: Layout, width: int) -> Iterator[tuple[str, nn.Module]]:
    """(path in a checkpoint's layer, module) of every routed expert of a layer, and of those that all tokens meet."""
    experts = mlp.get_submodule("experts")
    one = Expert(experts, layout)
    for index in range(len(experts.get_parameter("down_proj"))):
        yield f"{layout.mlp}.experts.{index}", one
    for name, part in mlp.named_children():
        if name != "experts" and sum(p.ndim == 2 for p in part.parameters()) > 1 and keeps_width(part, width):
            yield f"{layout.mlp}.{name}", part


def keeps_width(module: nn.Module, width: int) -> bool:
    """Whether a module on the meta device takes a token of some width to one of the same width."""
    try:
        y = module(torch.empty(1, 1, width, device="meta"))
    except Exception:  # a router that wants something else
        return False
    return isinstance(y, Tensor) and y.shape[-1] == width


def pieces_of(path: str, blocks: str, mlp: str, experts: nn.Module, layout: Layout) -> Pieces:
    """From the name of a stacked tensor to its pieces, under the names that they have apart.

    Args:
        path, blocks: The list of layers in the model, and how the names of its tensors begin in a checkpoint.
        mlp: What holds the experts of a layer, in the model.
        experts: The stacked experts of a layer.
        layout: How checkpoints keep them.
    """
    places = "|".join({rf"{re.escape(path)}\.\d+\.{mlp}", rf"{re.escape(blocks)}\.\d+\.{layout.mlp}"})
    names = "|".join(name for name, _ in experts.named_parameters())
    stack = re.compile(rf"({places})\.experts\.({names})")

    def pieces(name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
        found = stack.fullmatch(name)
        if not found:
            return
        number = re.search(r"\.(\d+)\.", found[1][min(len(path), len(blocks)) :])
        assert number
        where = f"{blocks}.{number[1]}.{layout.mlp}.experts"
        for index in range(shape[0]):
            if layout.stacked:
                turned = experts.is_transposed and len(shape) == 3
                yield Piece(f"{where}.{index}.{found[2]}", index, turned=turned)
            elif found[2] == "down_proj":
                yield Piece(f"{where}.{index}.{layout.out}", index)
            else:
                rows = shape[1] // len(layout.into)
                for part, into in enumerate(layout.into):
                    yield Piece(f"{where}.{index}.{into}", index, slice(part * rows, (part + 1) * rows))

    return pieces
