"""The tasks of text encoders, as tasks.yaml lists them."""

from dataclasses import dataclass
from pathlib import Path

from common.core.errors import InputError
from common.evaluation.metrics import METRICS, REGRESSION
from common.io.yaml_files import read_rows


@dataclass(frozen=True)
class Task:
    """A data set of sentences or sentence pairs; see the head of tasks.yaml."""

    text: list[str]
    labels: int
    metric: str
    hub: str = ""
    hub_config: str | None = None
    split: str = "validation"
    train_split: str = "train"


def read_tasks(file: Path) -> dict[str, Task]:
    """The rows of a tasks.yaml; InputError naming the task that lacks a field, or whose metric does not fit."""
    tasks = read_rows(file, Task)
    for name, task in tasks.items():
        if task.metric not in METRICS:
            raise InputError(f"{file}: task {name}: unknown metric {task.metric!r}; choose from {', '.join(METRICS)}")
        if (task.labels == 1) != (task.metric in REGRESSION):
            raise InputError(f"{file}: task {name}: {task.metric} does not fit labels: {task.labels}")
    return tasks


TASKS = read_tasks(Path(__file__).parent / "tasks.yaml")
