"""Checkpoints that keep many matrices in one tensor, or keep them turned, read one at a time; and the way back."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from common.core.blocks import Piece, Pieces
from common.core.errors import InputError
from common.core.task_vectors import LazyTensor, Params
from common.io.checkpoints import Checkpoint


class Unstacked(Checkpoint):
    """A checkpoint whose stacks are taken apart as they are read, so that no more than a piece is in memory."""

    def __init__(self, own: Checkpoint, pieces: Pieces):
        self.own, self.path, self.left_out = own, own.path, own.left_out
        self.stacks: dict[str, list[tuple[str, Piece]]] = {}
        self.shapes = {}
        for name, shape in own.shapes.items():
            of_name = list(pieces(name, shape))
            for piece in of_name:
                self.stacks.setdefault(piece.name, []).append((name, piece))
            if not of_name:
                self.shapes[name] = shape
        for name, sources in self.stacks.items():
            sources.sort(key=lambda source: source[1].part)
            first, *others = (part_of(own.shapes[stack], piece) for stack, piece in sources)
            self.shapes[name] = (first[0] + sum(shape[0] for shape in others), *first[1:]) if others else first

    def read(self, names: Iterable[str]) -> Params:
        """The named tensors in float32."""
        return {name: self.read_piece(name) if name in self.stacks else self.own.read([name])[name] for name in names}

    def read_piece(self, name: str) -> Tensor:
        """One piece of a stack, or the pieces that make one tensor."""
        first, *others = (self.read_part(stack, piece) for stack, piece in self.stacks[name])
        return torch.cat([first, *others]) if others else first

    def read_part(self, stack: str, piece: Piece) -> Tensor:
        """A part of a stored tensor."""
        tensor = self.own.read([stack])[stack] if piece.place is None else self.own.read_at(stack, piece.place)
        tensor = tensor if piece.rows is None else tensor[piece.rows].clone()
        return tensor.T.contiguous() if piece.turned else tensor

    def touches(self, prefix: str) -> bool:
        """Whether a tensor whose name begins so may differ from the base's."""
        begun = (sources for name, sources in self.stacks.items() if name.startswith(prefix))
        stacks = {stack for sources in begun for stack, _ in sources}
        return self.own.touches(prefix) or any(map(self.own.touches, stacks))

    def resize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """From now on the named tensors, which are no stacks, have these shapes."""
        self.own.resize(shapes)
        self.shapes |= {name: self.own.shapes[name] for name in shapes.keys() & self.own.shapes.keys()}

    def borrow(self, name: str, base: Checkpoint) -> None:
        """From now on a tensor is the base's."""
        self.own.borrow(name, base)
        self.shapes[name] = self.own.shapes[name]

    def fingerprint(self) -> str:
        """Identifies the checkpoint as it is stored."""
        return self.own.fingerprint()


def stored_type(checkpoint: Checkpoint, name: str) -> str:
    """The type in which a tensor of a checkpoint is stored, or the first stack that has a piece of it."""
    while isinstance(checkpoint, Unstacked):
        name, checkpoint = checkpoint.stacks[name][0][0] if name in checkpoint.stacks else name, checkpoint.own
    return checkpoint.rows[name].dtype


def part_of(shape: tuple[int, ...], piece: Piece) -> tuple[int, ...]:
    """The shape of a piece of a stored tensor."""
    shape = shape if piece.place is None else shape[1:]
    shape = shape if piece.rows is None else (piece.rows.stop - piece.rows.start, *shape[1:])
    return shape[::-1] if piece.turned else shape


def unstacked(checkpoint: Checkpoint, pieces: Pieces) -> Checkpoint:
    """The checkpoint with its stacks taken apart; itself if it has none."""
    has_any = any(True for name, shape in checkpoint.shapes.items() for _ in pieces(name, shape))
    return Unstacked(checkpoint, pieces) if has_any else checkpoint


def stacked(
    tensors: Mapping[str, LazyTensor], shapes: Mapping[str, tuple[int, ...]], pieces: Pieces
) -> dict[str, LazyTensor]:
    """The pieces of each stack put together again, in the place of its last; all else is as it is.

    A stack is made piece by piece, of which one is in memory.

    Args:
        tensors: Named tensors in any order.
        shapes: {name: shape} of the checkpoint that is written.
        pieces: What its stacks are made of.
    Raises: InputError if a stack lacks a piece.
    """
    places = {
        piece.name: (name, piece)
        for name, shape in shapes.items()
        for piece in pieces(name, shape)
        if not (piece.rows and piece.place is not None)
    }
    whole: dict[str, LazyTensor] = {}
    begun: dict[str, dict[int, tuple[Callable[[], Tensor], ...]]] = {}
    left: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name not in places:
            whole[name] = tensor
            continue
        stack, piece = places[name]
        if piece.turned:
            tensor = LazyTensor(tensor.shape[::-1], tuple(partial(turned, part) for part in tensor.parts))
        if piece.place is None and piece.rows is None:
            whole[stack] = tensor
            continue
        first = piece.rows.start if piece.rows else piece.place or 0
        begun.setdefault(stack, {})[first] = tensor.parts
        rows = 1 if piece.rows is None else piece.rows.stop - piece.rows.start
        left[stack] = left.get(stack, shapes[stack][0]) - rows
        if not left[stack]:
            parts = begun.pop(stack)
            whole[stack] = LazyTensor(tuple(shapes[stack]), tuple(chain(*(parts[at] for at in sorted(parts)))))
    if begun:
        raise InputError(f"the stack {next(iter(begun))} lacks {left[next(iter(begun))]} of its parts")
    return whole


def turned(make: Callable[[], Tensor]) -> Tensor:
    """A matrix that is made, the other way round."""
    return make().T.contiguous()
