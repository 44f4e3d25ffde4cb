"""The texts of a task with their labels, and in which order a classifier has the classes that the data number."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.core.notices import warn
from common.io.task_heads import order_of

if TYPE_CHECKING:  # imports of seconds
    import datasets
    from transformers import PretrainedConfig


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
