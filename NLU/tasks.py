"""The tasks of text encoders, as tasks.yaml lists them."""

from dataclasses import dataclass
from pathlib import Path

from common.core.errors import InputError
from common.evaluation.metrics import METRICS, REGRESSION
from common.io.yaml_files import read_yaml_file


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
    tasks = {}
    for name, row in read_yaml_file(file).items():
        try:
            tasks[name] = Task(**row)
        except TypeError as error:
            raise InputError(f"{file}: task {name}: {error}") from error
        if tasks[name].metric not in METRICS:
            raise InputError(f"{file}: task {name}: unknown metric {row['metric']!r}; choose from {', '.join(METRICS)}")
        if (tasks[name].labels == 1) != (tasks[name].metric in REGRESSION):
            raise InputError(f"{file}: task {name}: {row['metric']} does not fit labels: {row['labels']}")
    return tasks


TASKS = read_tasks(Path(__file__).parent / "tasks.yaml")
