"""Checkpoints with the rows of the merged model: an expert's put where their tokens are, a base's with more of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.core.task_vectors import Params
from common.io.checkpoints import Checkpoint, tensor_digest
from common.io.tensors import with_size

PIECE = 4096  # rows that are copied at a time


@dataclass(frozen=True)
class Matching:
    """Which row of each expert is which row of the merged model.

    rows: of the merged model. sources: for each expert its row for every merged one, -1 where
    it lacks the token. more: {token: (row, description)} that the merged tokenizer has beyond the base's. moved: for an
    expert some token of its tokenizer that has another row in the merged model: (token, row there, row in the merged).
    """

    rows: int
    sources: Mapping[str, Tensor] = field(default_factory=dict)
    more: Mapping[str, tuple[int, Mapping[str, Any]]] = field(default_factory=dict)
    moved: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)

    def provenance(self) -> dict[str, str]:
        """What identifies the matching, if any expert's rows are not simply the merged ones; {} otherwise."""
        plain = torch.arange(self.rows)
        unlike = {task: source for task, source in self.sources.items() if not torch.equal(source, plain)}
        return {"rows": tensor_digest(unlike)} if unlike else {}


class MatchedExpert(Checkpoint):
    """An expert whose rows are put where the merged model has their tokens, over the base's rows.

    axes: {tensor: its axis of tokens}, as a BlockFamily has them, here and below.
    """

    def __init__(self, own: Checkpoint, base: Checkpoint, axes: Mapping[str, int], source: Tensor):
        self.own, self.base, self.source, self.path = own, base, source, own.path
        self.matched = {name: axis for name, axis in axes.items() if name in own.shapes}
        sizes = {name: base.shapes[name][axis] for name, axis in self.matched.items()}
        self.shapes = own.shapes | {n: with_size(own.shapes[n], axis, sizes[n]) for n, axis in self.matched.items()}

    def read(self, names: Iterable[str]) -> Params:
        """The named tensors in float32, matched where they have a row for every token."""
        return {name: self.placed(name) if name in self.matched else self.own.read([name])[name] for name in names}

    def read_at(self, name: str, index: int) -> Tensor:
        """One of many things that are stacked in a tensor; none of them has a row for every token."""
        return self.own.read_at(name, index)

    def placed(self, name: str) -> Tensor:
        """The base's tensor with the expert's rows in their places."""
        theta, own = self.base.read([name])[name], self.own.read([name])[name]
        to, rows = (tensor.movedim(self.matched[name], 0) for tensor in (theta, own))
        for begin in range(0, len(to), PIECE):
            source = self.source[begin : min(begin + PIECE, len(to))]
            there = (source >= 0) & (source < len(rows))
            to[begin : begin + PIECE][there] = rows[source[there]]
        return theta

    def touches(self, prefix: str) -> bool:
        """Whether a tensor whose name begins so may differ from the base's."""
        return self.own.touches(prefix)

    def fingerprint(self) -> str:
        """Identifies the expert, whatever its rows are matched with."""
        return self.own.fingerprint()


class JoinedBase(Checkpoint):
    """A base with rows for tokens that only experts have: the mean over those that have them."""

    def __init__(self, own: Checkpoint, experts: Mapping[str, Checkpoint], axes: Mapping[str, int], matching: Matching):
        self.own, self.experts, self.matching, self.path = own, experts, matching, own.path
        self.rows, self.found = own.rows, own.found
        self.joined = {name: axis for name, axis in axes.items() if name in own.shapes}
        more = {name: with_size(own.shapes[name], axis, matching.rows) for name, axis in self.joined.items()}
        self.shapes = own.shapes | more
        self.kept: dict[str, Tensor] = {}

    def read(self, names: Iterable[str]) -> Params:
        """The named tensors in float32, with the rows of all tokens where they have one for each."""
        return {name: self.filled(name) if name in self.joined else self.own.read([name])[name] for name in names}

    def read_at(self, name: str, index: int) -> Tensor:
        """One of many things that are stacked in a tensor; none of them has a row for every token."""
        return self.own.read_at(name, index)

    def filled(self, name: str) -> Tensor:
        """The base's tensor and the rows of the tokens that it lacks."""
        own = self.own.read([name])[name].movedim(self.joined[name], 0)
        new = torch.tensor([row for row, _ in self.matching.more.values()])
        if name not in self.kept:
            self.kept[name] = self.mean_of_experts(name, new, own.mean(0))
        theta = own.new_empty(self.matching.rows, *own.shape[1:]).copy_(own.mean(0))
        theta[: len(own)] = own
        theta[new] = self.kept[name]
        return theta.movedim(0, self.joined[name])

    def mean_of_experts(self, name: str, rows: Tensor, otherwise: Tensor) -> Tensor:
        """For each of the merged rows the mean over the experts that have it, `otherwise` where none has."""
        total, count = torch.zeros(len(rows), *otherwise.shape), torch.zeros(len(rows), *(1 for _ in otherwise.shape))
        for task, expert in self.experts.items():
            own = expert.read([name])[name].movedim(self.joined[name], 0)
            source = self.matching.sources[task][rows]
            there = (source >= 0) & (source < len(own))
            total[there] += own[source[there]]
            count[there] += 1
        return torch.where(count > 0, total / count.clamp(min=1), otherwise)

    def fingerprint(self) -> str:
        """Identifies the base alone."""
        return self.own.fingerprint()
