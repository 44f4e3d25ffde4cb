"""The sections `start` and `adapt`: what adaptation begins from, and how it trains."""

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from common.core.annotations import require_kind
from common.core.errors import InputError
from common.core.places import path_of


@dataclass(frozen=True)
class Start:
    """The model that adaptation starts from.

    Args:
        method: pretrained, or a merge method.
        checkpoint: A merged checkpoint made elsewhere, to take instead; `method` then just names it.
        hyper: Hyperparameters of each method, as in {ta: {scale: 0.3}}.
    """

    method: str = "pretrained"
    checkpoint: str = ""
    hyper: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where the checkpoint is."""
        return path_of(self.checkpoint)

    @property
    def mixes_models(self) -> bool:
        """Whether whole models are mixed, Σ λᵢθᵢ with λᵢ given one by one that add up to 1, or along an arc: the base
        is one of them where it is listed, and drops out where it is not."""
        scale = self.hyper.get("ta", {}).get("scale") if self.method == "ta" else None
        return self.method == "slerp" or (isinstance(scale, list) and math.isclose(sum(scale), 1))


@dataclass(frozen=True)
class Adapt:
    """How the merged blocks are trained on the anchors (paper box 2).

    Args:
        rest: Where tensors outside the blocks come from: the pretrained model (paper) or the start.
        per_task: From ta: a coefficient for each weight of each task vector (paper Eq. 6). False: for each
            weight of their sum, as from any other start.
        distance: Between the merged block's outputs and the expert's.
        lr: Learning rate of Adam.
        epochs: Passes over the anchors of all tasks.
        speedup: Divides the epochs and multiplies the learning rate, with Adam's moments shorter to match. 1: the
            paper's.
        batch_size: Anchors per step, of all tasks; all of them at once where there are fewer.
        warm_start: regmean begins at the least-squares mean of the experts' linear maps on their anchors, a closed form
            that saves most epochs; with epochs 0 it is a merge of its own. none begins at the start as it is.
        ridge: Of the warm start: how much it is held to the start, λ of the penalty λ · g ‖W − W_start‖² with g the
            mean square of what the anchors bring to a linear map, in each of its directions. 0: not at all.
        blend: How far to go from the start to the adapted model, in every tensor: 0 is the start, 1 the paper's.
        label: Put behind the name of the result, to keep several side by side.
        by_start: What differs for one start, as in {wudi: {epochs: 25}}. The command line comes before it.
    """

    rest: Literal["pretrained", "start"] = "pretrained"
    per_task: bool = True
    distance: Literal["cos", "mse", "l1"] = "cos"
    lr: float = 1e-2
    epochs: int = 100
    speedup: float = 1
    batch_size: int = 128
    warm_start: Literal["none", "regmean"] = "none"
    ridge: float = 0
    blend: float = 1
    label: str = ""
    by_start: dict[str, dict[str, Any]] = field(default_factory=dict)

    def for_start(self, method: str) -> "Adapt":
        """These settings with what differs for one start put in."""
        return replace(self, by_start={}, **self.by_start.get(method, {}))


def prefer_typed(adapt: Adapt, typed: set[str]) -> Adapt:
    """Check `by_start` and drop from it the fields given on the command line, which come first."""
    known = {f.name: f.type for f in fields(Adapt) if f.name != "by_start"}
    for start, changes in adapt.by_start.items():
        for key, value in changes.items():
            if key not in known:
                raise InputError(f"adapt.by_start.{start} has no field {key!r}; choose from {', '.join(sorted(known))}")
            require_kind(value, known[key], f"adapt.by_start.{start}.{key}")
    return replace(
        adapt, by_start={s: {k: v for k, v in c.items() if k not in typed} for s, c in adapt.by_start.items()}
    )
