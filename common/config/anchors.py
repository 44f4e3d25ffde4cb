"""The section `anchors`: how anchors are made."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.core.places import for_task, path_of


@dataclass(frozen=True)
class Anchors:
    """How anchors are made (paper section 3, box 1).

    Args:
        part: What is anchored of a layer: its mlp (each expert of a mixture), as in the paper for nlg, or the whole
            layer with its attention, as in the paper for vision and nlu. Unset: as in the paper.
        init: Where the anchors start: rows of the expert's weights, or scaled Gaussian noise.
        number: Anchors per task and block.
        chunk: Anchors in memory at once. Unset: all; the result is the same to rounding.
        tokens: Tokens per anchor. Unset: what the architecture sees; one for an MLP, 5 for the layers of text models.
        scale: Factor on the initial anchors. Unset: the paper's, 1 for weight and 0.01 for gauss.
        distance: Between the outputs of the base block and the expert's.
        weights: What a tensor counts by in the matching loss: equal, as in the paper, its size, the number of its
            entries, or the norm of its task vector. They are 1 on average, so that losses stay on one scale.
        optimizer: Of the anchors. muon reaches the same loss in a sixth of the steps, with lr 0.3 to 0.6, linear.
        lr: Its learning rate.
        schedule: Of the learning rate over the steps: constant, or linear down to zero.
        steps: Its steps.
        stop_loss: End a unit when its mean matching loss is this or less; looked at every 20 steps. Unset: never.
        patience: End a unit after so many steps without getting 1 % better. Unset: never.
        together: Optimise the tasks of a block in one go, all in memory, which small blocks on a GPU gain from: eager,
            or compiled by that backend of torch.compile. The result is the same to rounding.
        skip_null_gradients: Leave out of the loss what no input can move (the key bias).
        position_embeddings: Add the first rows of the expert's position embeddings to what a block sees of an anchor.
        snapshots: Steps of which the anchors are kept besides, as they are before that step, in a file beside the
            unit's: for scripts/analyse.py, without effect on the anchors. A unit that ends early has those until then.
        source: Folder of anchors made elsewhere, in the released layout <task>/dual_anchors_layer_<n>.npy; with {task}
            or {slug} in it, the folder of one task.
    """

    part: Literal["mlp", "layer"] | None = None
    init: Literal["weight", "gauss"] = "weight"
    number: int = 64
    chunk: int | None = None
    tokens: int | None = None
    scale: float | None = None
    distance: Literal["cos", "mse", "l1"] = "cos"
    weights: Literal["equal", "size", "norm"] = "equal"
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-2
    schedule: Literal["constant", "linear"] = "constant"
    steps: int = 1200
    stop_loss: float | None = None
    patience: int | None = None
    together: Literal["no", "eager", "inductor", "cudagraphs"] = "no"
    skip_null_gradients: bool = True
    position_embeddings: bool = False
    snapshots: list[int] = field(default_factory=list)
    source: str = ""

    def shape(self, tokens: int, width: int) -> tuple[int, int, int]:
        """(A, T, D) of the anchors of a unit whose block sees so many tokens of that width."""
        return self.number, self.tokens or tokens, width

    def path(self, task: str) -> Path:
        """Folder of the anchors of one task under `source`."""
        return path_of(for_task(self.source if "{" in self.source else f"{self.source}/{{task}}", task))
