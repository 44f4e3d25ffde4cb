"""What the project knows about image classifiers made of CLIPs: their tasks, and how models are scored.

How a model is opened and written is known by the library that it is of: open_clip_models.py or hf_models.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common.config import Config, Model
from common.core.blocks import BlockFamily
from common.core.errors import InputError
from common.core.task_vectors import Params
from common.domain import Scored
from common.evaluation.answers import scored
from common.io.checkpoints import Checkpoint
from common.io.examples import Sample, load_sample, load_scored
from common.merging.calibration import Batch, CalibrationTask, LabelledTask, calibration_task_of
from Vision import hf_models, open_clip_models
from Vision.clip_config import clip_file

if TYPE_CHECKING:  # an import of a second, which commands that read no examples go without
    import datasets

NAME = "vision"
PERCENT = True  # tables print percent
PARTS = ("layer",)  # what can be anchored of a layer


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


class Library(Protocol):
    """A module that opens and writes the models of one library."""

    def skeleton(self, model: Model) -> nn.Module: ...
    def family(self, model: Model) -> BlockFamily: ...
    def token_shape(self, model: Model) -> tuple[int, int]: ...
    def check_inputs(self, config: Config) -> None: ...
    def check_export(self, model: Model) -> None: ...
    def export(self, model: Model, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None: ...
    def preprocessing(self, model: Model) -> Callable[[list[dict]], Tensor]: ...
    def text_directions(self, model: Model, classes: Sequence[str], templates: Sequence[str]) -> Tensor: ...
    def image_tower(self, model: Model, path: Path) -> nn.Module: ...
    def Tower(self, model: Model) -> nn.Module: ...


def library(model: Model) -> Library:
    """That of the base: transformers' where the config.json beside its weights says so, else open_clip's."""
    base = model.path("base")
    hugging_face = not model.arch and not clip_file(base) and hf_models.is_served(base)
    return cast(Library, hf_models if hugging_face else open_clip_models)


def skeleton(model: Model) -> nn.Module:
    """The model without its weights, on the meta device."""
    return library(model).skeleton(model)


def family(model: Model, part: str = PARTS[0]) -> BlockFamily:
    """The blocks of the image tower; nothing but its layers can be anchored."""
    return library(model).family(model)


def token_shape(model: Model, part: str = PARTS[0]) -> tuple[int, int]:
    """Tokens and width that a block of the image tower sees."""
    return library(model).token_shape(model)


def check_inputs(config: Config) -> None:
    """Compare the base's config with that of every other model; InputError if one makes another function of weights."""
    library(config.model).check_inputs(config)


def check_export(model: Model) -> None:
    """InputError if a merged model could not be written."""
    library(model).check_export(model)


def export(model: Model, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write a merged model as the library of the base opens it, the text tower included."""
    library(model).export(model, tensors, folder)


def zero_shot_head(model: Model, task: str) -> Tensor:
    """The classifier of a task, (classes, embedding): the head file if there is one, else made from the text tower."""
    classes = TASKS[task].classes
    if model.head and model.path("head", task).is_file():
        head = Checkpoint(model.path("head", task)).read(["weight"])["weight"]
        if len(head) != len(classes):
            raise InputError(f"{model.path('head', task)} has {len(head)} classes, the task {task} has {len(classes)}")
        return head
    return library(model).text_directions(model, classes, TASKS[task].templates)


def metric(task: str) -> str:
    """Name of the number that a task reports."""
    return "accuracy"


def labelled_images(config: Config, task: str) -> "datasets.Dataset":
    """The test images of a task with columns image and label, from the local folder or the hub."""
    row = TASKS[task]
    records = load_scored(config.eval, task, row, ("image", "label"))
    names = getattr(records.features["label"], "names", None)
    if names is not None and len(names) != len(row.classes):
        raise InputError(
            f"the data of task {task} has {len(names)} classes; TASKS in Vision/domain.py has {len(row.classes)}"
        )
    return records


@torch.no_grad()
def score(config: Config, task: str, checkpoints: Mapping[str, Path], device: torch.device) -> dict[str, Scored]:
    """Top-1 accuracy in [0, 1] and number of test images, for several models in one pass over the images."""
    library_of = library(config.model)
    pixels = library_of.preprocessing(config.model)
    head = zero_shot_head(config.model, task).to(device)
    towers = {name: library_of.image_tower(config.model, path).to(device) for name, path in checkpoints.items()}
    right: dict[str, list[Tensor]] = {name: [] for name in towers}
    records = labelled_images(config, task)

    def collate(rows: list[dict]) -> tuple[Tensor, Tensor]:
        return pixels(rows), torch.tensor([row["label"] for row in rows])

    loader = torch.utils.data.DataLoader(
        records, config.eval.batch_size, collate_fn=collate, num_workers=config.eval.workers
    )
    for images, labels in tqdm(loader, desc=f"score {task}", leave=False):
        images, labels = images.to(device), labels.to(device)
        for name, tower in towers.items():
            logits = classified(tower(images), head)
            right[name].append((logits.argmax(-1) == labels).cpu())
    return {name: scored(torch.cat(hits).numpy()) for name, hits in right.items()}


class Head(nn.Module):
    """The zero-shot head of a task, a module so that it can be seen what it is given."""

    def __init__(self, directions: Tensor):
        super().__init__()
        self.directions = directions

    def forward(self, features: Tensor) -> Tensor:
        return classified(features, self.directions)


def classified(features: Tensor, head: Tensor) -> Tensor:
    """The logits of image features under a zero-shot head."""
    return F.normalize(features, dim=-1) @ head.T


class Classifier(nn.Module):
    """An image tower without weights under a task's head; its tensors have the names of the checkpoint."""

    def __init__(self, tower: nn.Module, head: Tensor):
        super().__init__()
        self.head = Head(head)
        for name, part in tower.named_children():
            self.add_module(name, part)
        self.encode = type(tower).forward

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encode(self, images))


def calibration_task(config: Config, task: str, sample: Sample, device: torch.device) -> CalibrationTask:
    """The images of a task and its classifier, for merge methods that use data."""
    records = load_sample(config.eval, task, TASKS[task], ("image",), sample)
    pixels = library(config.model).preprocessing(config.model)
    batches = torch.utils.data.DataLoader(
        records, sample.batch, collate_fn=lambda rows: {"images": pixels(rows)}, num_workers=config.eval.workers
    )
    return with_classifier(config, task, batches, len(records), device)


def with_classifier(
    config: Config, task: str, batches: Iterable, examples: int, device: torch.device
) -> CalibrationTask:
    """Batches of images under "images", and the classifier of their task."""
    tower, family = library(config.model).Tower(config.model), library(config.model).family(config.model)
    classifier = Classifier(tower, zero_shot_head(config.model, task).to(device))
    return calibration_task_of(classifier, family, batches, examples, device, [classifier.head])


def labelled_task(config: Config, task: str, sample: Sample, device: torch.device) -> LabelledTask:
    """The images of a task with their labels, and the cross-entropy of its classifier."""
    records = load_sample(config.eval, task, TASKS[task], ("image", "label"), sample)
    pixels = library(config.model).preprocessing(config.model)
    answer = with_classifier(config, task, (), 0, device).answer

    def batch(numbers: Sequence[int]) -> dict[str, Tensor]:
        rows = list(records.select(numbers))
        return {"images": pixels(rows), "labels": torch.tensor([row["label"] for row in rows])}

    def loss(theta: Params, batch: Batch) -> Tensor:
        return F.cross_entropy(answer(theta, {"images": batch["images"]}), batch["labels"].to(device))

    return LabelledTask(loss, batch, len(records))


TASKS = {name: Task(**row) for name, row in yaml.safe_load((Path(__file__).parent / "tasks.yaml").read_text()).items()}
