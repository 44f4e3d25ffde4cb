"""The texts of a task with their labels, and in which order a classifier has the classes that the data number."""

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.notices import warn
from common.io.task_heads import order_of
from NLU.tasks import Task

if TYPE_CHECKING:  # imports of seconds
    import datasets
    from transformers import PretrainedConfig


EMPTY = "nothing (an empty cell of a CSV, or the word NA, is read as nothing)"


def checked(task: str, row: Task, records: "datasets.Dataset", labelled: bool = True) -> "datasets.Dataset":
    """Examples of a task as they are; InputError naming the column and the first of them that has no text there, or a
    label that is none of the task's."""
    for column in row.text:
        require(task, column, list(records[column]), lambda value: isinstance(value, str), "a text")
    if labelled:
        labels = list(records["label"])
        require(task, "label", labels, is_number, "a number" if row.labels == 1 else "the number of a class")
        if row.labels > 1 and not set(labels) <= set(range(row.labels)):
            raise InputError(
                f"the data of task {task} has labels {min(labels)} to {max(labels)}; the task has 0 to {row.labels - 1}"
            )
    return records


def require(task: str, column: str, values: Sequence[Any], fits: Callable[[Any], bool], wanted: str) -> None:
    """InputError naming the first value of a column that does not fit what is wanted."""
    for number, value in enumerate(values, 1):
        if not fits(value):
            found = EMPTY if value is None else f"{value!r}"
            which = f"example {number} of the {len(values)} that are read"
            said = f"the data of task {task}, column {column}: {which} has {found}"
            raise InputError(f"{said}, where {wanted} is needed; correct it or leave it out")


def is_number(value: Any) -> bool:
    """Whether a label is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def labels_of(row: Task, labels: Sequence[float]) -> Tensor:
    """The labels of a task: whole numbers for classes, of a regression real ones."""
    return torch.tensor(labels, dtype=torch.long if row.labels > 1 else torch.float32)


def class_order(expert: "PretrainedConfig", where: str, task: str, records: "datasets.Dataset") -> list[int] | None:
    """Which output of an expert's head is each class of a test set: logits[:, order] are in the data's order.

    None where they are taken as they are: where the data have no names of classes or the expert none of its own, and,
    with a warning, where the two are not the same names.

    Args:
        expert: Its config, whose id2label names its outputs.
        where: Names the expert in what is said.
        task: The test set.
        records: Its examples, whose label may be a ClassLabel, which has names.
    """
    named = words(getattr(records.features["label"], "names", None) or ())
    own = words([str(expert.id2label[number]) for number in sorted(expert.id2label)])
    if not named or not own:
        return None
    said = f"the classifier of {where} has the classes {', '.join(own)}, the data of task {task} {', '.join(named)}"
    order = order_of(own, named)
    if order is None:
        warn(f"{said}: these are not the same names, so its outputs are taken to be in the data's order")
        return None
    if order == sorted(order):
        return None
    warn(f"{said}: its outputs are scored in the data's order")
    return order


def words(names: Sequence[str]) -> Sequence[str]:
    """Names of classes; none if they are numbers, such as the LABEL_0 that stands where no name was given."""
    return () if all(re.fullmatch(r"(label_?)?\d+", name.casefold()) for name in names) else names
