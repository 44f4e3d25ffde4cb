"""The zero-shot head of a task: directions that a text tower gives the names of its classes."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from common.config import Model
from common.core.errors import InputError
from common.io.checkpoints import Checkpoint
from Vision.tasks import TASKS

Directions = Callable[[Model, Sequence[str], Sequence[str]], Tensor]
"""directions(model, names of classes, templates) -> (classes, embedding)."""


def head_of(model: Model, task: str, directions: Directions) -> Tensor:
    """The classifier of a task, (classes, embedding): the head file if there is one, else made from the text tower."""
    classes = TASKS[task].classes
    if model.head and model.path("head", task).is_file():
        head = Checkpoint(model.path("head", task)).read(["weight"])["weight"]
        if len(head) != len(classes):
            raise InputError(f"{model.path('head', task)} has {len(head)} classes, the task {task} has {len(classes)}")
        return head
    return directions(model, classes, TASKS[task].templates)


class Head(nn.Module):
    """The zero-shot head of a task, a module so that it can be seen what it is given."""

    directions: Tensor

    def __init__(self, directions: Tensor):
        super().__init__()
        self.register_buffer("directions", directions)

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1) @ self.directions.T


class Classifier(nn.Module):
    """An image tower without weights under a task's head; its tensors have the names of the checkpoint."""

    def __init__(self, tower: nn.Module, directions: Tensor):
        super().__init__()
        self.head = Head(directions)
        for name, part in tower.named_children():
            self.add_module(name, part)
        self.encode = type(tower).forward

    def forward(self, **images: Tensor) -> Tensor:
        return self.head(self.encode(self, **images))


def refuse_heads(model: Model) -> None:
    """InputError if heads of tasks are to be written, which a text tower makes anew wherever they are needed."""
    if model.heads:
        raise InputError(
            "model.heads is for classifiers; the zero-shot heads of a CLIP come from its text tower, which is written "
            "with the merged model"
        )
