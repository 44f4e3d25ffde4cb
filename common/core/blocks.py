"""Where the blocks of an architecture live, and how one becomes a pure function of its parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from common.core.task_vectors import Params

Block = Callable[[Params, Tensor], Tensor]
"""A transformer block as a pure function: block(params, x_ATD) -> y_ATD."""


def call_module(module: nn.Module, x_ATD: Tensor) -> Tensor:
    """The ordinary call: one batch-first tensor in, one out."""
    return module(x_ATD)


@dataclass(frozen=True)
class BlockFamily:
    """All that the project knows about one architecture. Adding an architecture is adding one of these.

    blocks: path of the list of blocks, the same in the module and in the names of its checkpoint.
    names: name of a stored tensor -> its name in the module, or None for one that is never merged, such as a task's
        classifier. Published files of one architecture differ in a prefix, which is removed here and nowhere else.
    call: (module, x_ATD) -> y_ATD; hides argument lists, masks and tuples.
    part: the sub-module of a block that is anchored ("mlp"); "" for the whole block.
    before_head: beginning of the names of what lies between the last block and a head, "" if nothing does. It is
        merged where base and experts all have it and none has a head; else it belongs to the heads.
    scope: only tensors whose name begins with this are merged; the rest is the base's.
    null_gradients: tensors, or one of several equal row groups of a fused tensor, whose gradient is exactly zero
        whatever the input: {name: (group, of how many)}. Softmax does not see a shift of all keys, hence the key bias.
    published_axes: axis order of the paper's released anchor files, "ATD", "TAD" or, of one token, "AD".
    positions: name of the position embedding, of which anchors.position_embeddings adds the first rows; "" if none.
    vocabulary: tensors with a row for every token, the embedding first; base and experts may differ in their number.
    """

    blocks: str
    call: Callable[[nn.Module, Tensor], Tensor] = call_module
    part: str = ""
    names: Callable[[str], str | None] = str
    before_head: str = ""
    scope: str = ""
    null_gradients: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    published_axes: str = "ATD"
    positions: str = ""
    vocabulary: tuple[str, ...] = ()

    def prefix(self, index: int) -> str:
        """Beginning of the names of block `index` in a checkpoint."""
        return f"{self.blocks}.{index}." + (f"{self.part}." if self.part else "")

    def modules(self, skeleton: nn.Module) -> list[nn.Module]:
        """The anchored modules of a model, in order."""
        blocks = skeleton.get_submodule(self.blocks)
        return [b.get_submodule(self.part) if self.part else b for b in blocks.children()]

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


def nonzero_tensors(tau: Params) -> Params:
    """The tensors of a task vector that differ from zero; the others have no direction to match."""
    return {name: t for name, t in tau.items() if t.any()}
