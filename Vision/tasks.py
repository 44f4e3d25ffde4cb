"""The tasks of vision: image classification data sets, a row of tasks.yaml each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import nn

from common.io.yaml_files import read_rows


@dataclass(frozen=True)
class Task:
    """An image classification data set and the words for its zero-shot head.

    hub, hub_config, split: as datasets.load_dataset takes them. templates: prompts, {c} is the class name.
    classes: names in label order. test_size: examples that published numbers were counted on.
    """

    templates: list[str]
    classes: list[str]
    hub: str = ""
    hub_config: str | None = None
    split: str = "test"
    train_split: str = "train"
    test_size: int | None = None


class Headed(NamedTuple):
    """A model under the head of a task: what it is called with -> logits.

    module: without the weights that are merged. prefix: what precedes their names in it. head: its modules behind what
    is merged.
    """

    module: nn.Module
    prefix: str
    head: Sequence[nn.Module]


TASKS = read_rows(Path(__file__).parent / "tasks.yaml", Task)
