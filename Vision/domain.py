"""What the project knows about image classifiers: which library a model is of, and how models are scored.

How a model is opened and written is known by that library: open_clip_models.py, or of transformers hf_models.py (CLIPs)
and hf_classifiers.py.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import Config, Model
from common.core.blocks import BlockFamily
from common.core.errors import InputError
from common.core.task_vectors import LazyTensor, Params
from common.domain import Scored
from common.evaluation.answers import scored
from common.io.adapters import is_adapter
from common.io.bytes_of import beside_model, whole_model
from common.io.checkpoints import Checkpoint
from common.io.examples import Sample, load_sample, load_scored
from common.io.lora import open_checkpoint
from common.io.model_config import config_file
from common.io.unstacked import unstacked
from common.io.written import head_files
from common.merging.calibration import Batch, CalibrationTask, LabelledTask, calibration_task_of
from common.run.progress import counted
from Vision import hf_classifiers, hf_models, open_clip_models
from Vision.clip_config import clip_file, refuse_other_layouts
from Vision.examples import Batches, Examples, batch_of
from Vision.hf_files import CLASSIFIERS, TWO_TOWERS, Pixels, kind_of
from Vision.tasks import TASKS, Headed

NAME = "vision"
SHARDED = False
PERCENT = True  # tables print percent
unanchored = None  # what cannot be anchored is not read either
PARTS = ("layer",)  # what can be anchored of a layer


class Library(Protocol):
    """A module that opens and writes the models of one library.

    classifier: the model under the head for a test set, without the weights that are merged.
    """

    def skeleton(self, model: Model) -> nn.Module: ...
    def family(self, model: Model) -> BlockFamily: ...
    def token_shape(self, model: Model) -> tuple[int, int]: ...
    def check_inputs(self, config: Config) -> None: ...
    def check_export(self, model: Model) -> None: ...
    def export(self, model: Model, tensors: Mapping[str, LazyTensor], folder: Path) -> None: ...
    def preprocessing(self, config: Config, task: str) -> Pixels: ...
    def classifier(self, config: Config, task: str) -> Headed: ...


def library(model: Model) -> Library:
    """That of the base: transformers' where the config.json beside its weights says so, else open_clip's.

    Raises: InputError if that config is of a model that is none of either's.
    """
    base = model.path("base")
    if not model.arch and not clip_file(base):
        kind = kind_of(base)
        for kinds, module in ((TWO_TOWERS, hf_models), (CLASSIFIERS, hf_classifiers)):
            if kind in kinds:
                return cast(Library, module)
        if kind and base.exists():
            refuse_other_layouts(base, config_file(base))
    return cast(Library, open_clip_models)


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


def export(model: Model, tensors: Mapping[str, LazyTensor], folder: Path) -> None:
    """Write a merged model as the library of the base opens it, the text tower included."""
    library(model).export(model, tensors, folder)


def metric(task: str) -> str:
    """Name of the number that a task reports."""
    return "accuracy"


def scorer(config: Config, task: str) -> dict[str, Any]:
    """What decides a score besides image tower and examples: class names and prompts, the head, and how an image is
    prepared. A CLIP's head is of the text tower, a classifier's of its expert; either can be in a file."""
    model, row = config.model, {k: v for k, v in asdict(TASKS[task]).items() if k != "test_size"}
    base, said = model.path("base"), {"task": row, "arch": model.arch}
    if library(model) is hf_classifiers:
        owner = config.tests[task]
        expert = model.path("expert", owner)
        of_base = whole_model(base) if is_adapter(expert) else beside_model(base)
        files = {"expert": whole_model(expert), "base": of_base}
    else:
        owner, text = task, model.path("text") if model.text else base
        files = {"base": whole_model(base)} | ({"text": whole_model(text)} if text != base and text.exists() else {})
    return said | files | {"head": list(head_files(model, [owner]).values())}


def labelled_images(config: Config, task: str) -> Examples:
    """The test images of a task with their labels, from the local folder or the hub."""
    return Examples(load_scored(config.eval, task, TASKS[task], ("image", "label")), task, labelled=True)


@torch.no_grad()
def score(
    config: Config, task: str, checkpoints: Mapping[str, Path], device: torch.device
) -> Iterator[tuple[str, Scored]]:
    """Top-1 accuracy in [0, 1] and number of test images, for several models in one pass over the images."""
    library_of = library(config.model)
    pixels = library_of.preprocessing(config, task)
    empty, prefix, _ = library_of.classifier(config, task)
    models = {name: filled(empty, prefix, config.model, path, device) for name, path in checkpoints.items()}
    right: dict[str, list[Tensor]] = {name: [] for name in models}
    batches = Batches(labelled_images(config, task), pixels, config.eval.batch_size, config.eval.workers)
    for batch in counted(batches, f"score {task}"):
        images = {name: x.to(device) for name, x in batch.items()}
        labels = images.pop("labels")
        for name, model in models.items():
            right[name].append((model(**images).argmax(-1) == labels).cpu())
    for name, hits in right.items():
        yield name, scored(torch.cat(hits).numpy())


def filled(empty: nn.Module, prefix: str, model: Model, path: Path, device: torch.device) -> nn.Module:
    """A classifier with the weights of one checkpoint; `prefix` precedes their names in it."""
    blocks, whole = family(model), deepcopy(empty)
    stored = open_checkpoint(path, model.path("base"), blocks.names)
    tower = unstacked(stored, blocks.pieces)
    for name in blocks.lent(stored.shapes):
        tower.borrow(name, Checkpoint(model.path("base"), blocks.names))
    weights = {prefix + name: tensor for name, tensor in tower.read(tower.names(blocks.scope)).items()}
    whole.load_state_dict(weights, strict=False, assign=True)
    missing = next((name for name, tensor in whole.state_dict().items() if tensor.is_meta), None)
    if missing:
        raise InputError(f"{path} lacks the tensor {missing.removeprefix(prefix)}, which its classifier needs")
    return whole.to(device)


def calibration_task(config: Config, task: str, sample: Sample, device: torch.device) -> CalibrationTask:
    """The images of a task and its classifier, for merge methods that use data."""
    examples = Examples(load_sample(config.eval, task, TASKS[task], ("image",), sample), task, labelled=False)
    batches = Batches(examples, library(config.model).preprocessing(config, task), sample.batch, config.eval.workers)
    return with_classifier(config, task, batches, len(examples), device)


def with_classifier(
    config: Config, task: str, batches: Iterable, examples: int, device: torch.device
) -> CalibrationTask:
    """Batches of images, and the classifier of their task."""
    module, prefix, head = library(config.model).classifier(config, task)
    for tensor in chain(module.parameters(), module.buffers()):
        tensor.data = tensor.data if tensor.is_meta else tensor.data.to(device)
    return calibration_task_of(module, family(config.model), batches, examples, device, head, prefix)


def labelled_task(config: Config, task: str, sample: Sample, device: torch.device) -> LabelledTask:
    """The images of a task with their labels, and the cross-entropy of its classifier."""
    examples = Examples(load_sample(config.eval, task, TASKS[task], ("image", "label"), sample), task, labelled=True)
    pixels = library(config.model).preprocessing(config, task)
    answer = with_classifier(config, task, (), 0, device).answer

    def batch(numbers: Sequence[int]) -> dict[str, Tensor]:
        return batch_of(examples, pixels, list(numbers))

    def loss(theta: Params, batch: Batch) -> Tensor:
        images = {name: x for name, x in batch.items() if name != "labels"}
        return F.cross_entropy(answer(theta, images), batch["labels"].to(device))

    return LabelledTask(loss, batch, len(examples))
