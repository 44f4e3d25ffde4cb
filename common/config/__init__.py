"""What an experiment can choose. One YAML serves both stages; the command line overrides it field by field."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from common.config.adapt import Adapt, Start
from common.config.anchors import Anchors
from common.config.model import Model
from common.config.run import Compare, Eval, Run

__all__ = ["Adapt", "Anchors", "Compare", "Config", "Eval", "Model", "Run", "Start", "as_dict"]

ROOT = Path(__file__).resolve().parent.parent.parent
PRESETS = ROOT / "configs" / "presets"
PRETRAINED = "pretrained"  # the start that is no merge


@dataclass(frozen=True)
class Config:
    """An experiment: which checkpoints, which anchors, which start, which adaptation."""

    domain: Literal["vision", "nlu", "nlg"]
    model: Model
    tasks: list[str]
    anchors: Anchors
    start: Start
    adapt: Adapt
    eval: Eval
    compare: Compare
    run: Run
    dry_run: bool = False

    @property
    def tests(self) -> dict[str, str]:
        """Every test set, and the task whose expert it asks."""
        return {test: task for task in self.tasks for test in self.eval.tests.get(task, [task])}

    @property
    def has_coefficients_per_task(self) -> bool:
        """Whether adaptation trains a coefficient for each task: from task arithmetic merged here, unless switched off.

        From any other start that is a merge there is one for each weight of its one merged task vector.
        """
        return self.start.method == "ta" and self.adapt.for_start("ta").per_task and not self.start.checkpoint

    def at_start(self, method: str) -> "Config":
        """The config of one of compare.starts alone; start.checkpoint is that of start.method only."""
        checkpoint = self.start.checkpoint if method == self.start.method else ""
        others = {start for start in self.compare.starts if start != method}
        search = {what: lists for what, lists in self.compare.search.items() if what not in others}
        return replace(
            self,
            start=replace(self.start, method=method, checkpoint=checkpoint),
            adapt=replace(self.adapt, by_start={s: c for s, c in self.adapt.by_start.items() if s == method}),
            compare=replace(self.compare, starts=[method], search=search),
        )


def as_dict(config: Any) -> dict[str, Any]:
    """The resolved config as plain data."""
    return asdict(config)
