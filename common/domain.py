"""What a domain module (Vision/domain.py, ...) offers."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.config import Config, Model
from common.core.blocks import BlockFamily
from common.io.examples import Sample
from common.merging.calibration import CalibrationTask


class Domain(Protocol):
    """What a domain module (Vision/domain.py, ...) offers."""

    NAME: str
    FAMILIES: Mapping[str, BlockFamily]
    TASKS: Mapping[str, Any]
    PERCENT: bool

    @property
    def calibration_task(self) -> Callable[[Config, str, Sample, torch.device], CalibrationTask] | None:
        """(config, test set, sample, device) -> inputs of that test set's task, and the model under the head that
        `score` puts on it, for merge methods that use data; None where a domain has no such inputs."""

    def skeleton(self, model: Model) -> nn.Module: ...
    def token_shape(self, model: Model) -> tuple[int, int]: ...
    def metric(self, task: str) -> str: ...
    def check_export(self, model: Model) -> None: ...
    def export(self, model: Model, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None: ...
    def score(
        self, config: Config, task: str, checkpoints: Mapping[str, Path], device: torch.device
    ) -> dict[str, tuple[float, int]]: ...
