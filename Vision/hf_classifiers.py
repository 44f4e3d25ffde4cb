"""Classifiers on a ViT of transformers: the head of each task's expert, and how a merged backbone is written."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PretrainedConfig, PreTrainedModel

from common.config import Config, Model
from common.core.errors import InputError
from common.core.task_vectors import LazyTensor, Params, require_same_shapes
from common.io.adapters import is_adapter
from common.io.checkpoints import Checkpoint
from common.io.model_config import config_file, dtype_field, parse, read_config, read_text
from common.io.model_files import CONFIG_FILE, MODEL_FILE
from common.io.shards import write_stored
from common.io.skeleton import stored_shapes
from common.io.stored_types import as_stored, output_type
from common.io.surroundings import copy_settings, copy_surroundings, write_edited
from common.io.task_heads import head_in_type, read_task_head, with_pooler, write_task_head
from common.io.unstacked import stacked
from Vision.class_names import places_of
from Vision.hf_backbones import POOLER, architecture, family, names_within, skeleton
from Vision.hf_backbones import check_inputs as check_inputs  # a part of the library
from Vision.hf_backbones import token_shape as token_shape
from Vision.hf_files import PROCESSORS, Pixels, processor_folder
from Vision.hf_files import preprocessing as preprocessing_of
from Vision.tasks import TASKS, Headed


def expert_architecture(model: Model, task: str) -> PretrainedConfig:
    """The config of the task's expert. A LoRA adapter without one has the base's, with as many outputs as the task; so
    has an expert whose head is in a file of its own.

    Raises: InputError if the head has another number of outputs than the task has classes.
    """
    folder = model.path("expert", task)
    alone = is_adapter(folder) and not config_file(folder)
    config = architecture(model, model.path("base") if alone else folder)
    if task not in TASKS:
        if alone:
            raise InputError(f"{folder} has an adapter and no {CONFIG_FILE}, which would tell the outputs of its head")
        return config
    classes = len(TASKS[task].classes)
    if alone or head_file(model, task):
        config.num_labels = classes
    if config.num_labels != classes:
        raise InputError(f"the head in {folder} has {config.num_labels} outputs, but the task {task} {classes} classes")
    return config


def head_file(model: Model, task: str) -> Path | None:
    """The file of a task's head, if model.head names one that is there."""
    return model.path("head", task) if model.head and model.path("head", task).is_file() else None


def empty_classifier(model: Model, task: str) -> PreTrainedModel:
    """The class of the task's expert without weights."""
    with torch.device("meta"):
        config = expert_architecture(model, task)
        return AutoModelForImageClassification.from_config(config, attn_implementation="eager").eval()


def read_head(model: Model, task: str) -> Params:
    """The tensors of a task's head: its expert's, or those of model.head, a file with weight and bias."""
    whole, file, folder = empty_classifier(model, task), head_file(model, task), model.path("expert", task)
    in_body = names_within(whole.base_model)
    if not file:
        try:
            return read_task_head(whole, in_body, folder, model.path("base"))
        except InputError as error:
            raise InputError(f"{error}; model.head can name a file of a head that is apart") from error
    shapes = {name: tensor.shape for name, tensor in whole.state_dict().items() if in_body(name) is None}
    head = Checkpoint(file, lambda stored: stored if stored in shapes else f"classifier.{stored}")
    require_same_shapes(head.shapes, shapes, f"the head in {file}")
    return head.read(shapes)


class Classifier(nn.Module):
    """A classifier of transformers as a function of images alone: (images, classes)."""

    def __init__(self, whole: PreTrainedModel, order: list[int]):
        super().__init__()
        self.whole, self.order = whole, order

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.whole(pixel_values=pixel_values).logits[:, self.order]


def classifier(config: Config, task: str) -> Headed:
    """The classifier of the expert that a test set asks, without the weights of its backbone. InputError if it has not
    as many outputs as the test set has classes."""
    owner, classes = config.tests[task], TASKS[task].classes
    whole = empty_classifier(config.model, owner)
    if whole.config.num_labels != len(classes):
        unlike = f"{whole.config.num_labels} outputs against {len(classes)}"
        raise InputError(f"eval.tests: {owner} and {task} have unlike numbers of classes, {unlike}")
    whole.load_state_dict(read_head(config.model, owner), strict=False, assign=True)
    labels = [str(whole.config.id2label[number]) for number in range(len(classes))]
    places = places_of(labels, classes, f"the classifier in {config.model.path('expert', owner)}")
    order = [places.index(number) for number in range(len(classes))]
    head = [module for name, module in whole.named_children() if name != whole.base_model_prefix]
    return Headed(Classifier(whole, order), f"whole.{whole.base_model_prefix}.", head)


def preprocessing(config: Config, task: str) -> Pixels:
    """From records with an image each to what the expert that a test set asks sees of them: as the files beside it say,
    or those beside the base."""
    return preprocessing_of(config.model.path("expert", config.tests[task]), config.model.path("base"))


def check_export(model: Model) -> None:
    """InputError if model.heads asks for the head of an expert that is not there, has none, or one too large for the
    type of the merged weights."""
    for task in model.heads:
        if not model.path("expert", task).exists():
            raise InputError(f"model.heads names {task!r}, and there is no expert at {model.path('expert', task)}")
    stored_heads(model)


def stored_heads(model: Model) -> dict[str, Params]:
    """The heads of model.heads in the type of the merged weights; InputError if one is missing or too large for it."""
    if not model.heads:
        return {}
    base = Checkpoint(model.path("base"), family(model).names)
    dtype = output_type(base, read_config(base.folder / CONFIG_FILE))
    return {task: head_in_type(read_head(model, task), dtype, task) for task in model.heads}


def export(model: Model, tensors: Mapping[str, LazyTensor], folder: Path) -> None:
    """Write a merged backbone that stock AutoModel opens, and for each task of model.heads a classifier that has

        AutoModelForImageClassification.from_pretrained(folder / "heads" / task)

    A classifier's folder holds the expert's config, processor and head, and a relative link to the one backbone, which
    has the base's pooler.
    """
    root, base = skeleton(model), Checkpoint(model.path("base"), family(model).names)
    text = read_text(base.folder / CONFIG_FILE)
    dtype = output_type(base, parse(text, CONFIG_FILE))
    kept = with_pooler(tensors, base, POOLER)
    merged = as_stored(stacked(kept, stored_shapes(root), family(model).pieces), dtype, base)
    write_stored(folder / MODEL_FILE, merged)
    write_surroundings(text, type(root).__name__, dtype, base.folder, folder)
    copy_surroundings(base.folder, folder)
    for task, own in stored_heads(model).items():
        expert, place, empty = model.path("expert", task), folder / "heads" / task, empty_classifier(model, task)
        write_task_head(place, own, folder / MODEL_FILE, merged, f"{empty.base_model_prefix}.")
        text = read_text(config_file(expert) or base.folder / CONFIG_FILE)
        source = processor_folder(expert, base.folder) or base.folder
        write_surroundings(text, type(empty).__name__, dtype, source, place, empty.config)


def write_surroundings(
    text: str, name: str, dtype: torch.dtype, source: Path, folder: Path, labelled: PretrainedConfig | None = None
) -> None:
    """The processor files of a folder, and a config.json of a text with what must change: class and type of the
    weights, and the outputs where they are `labelled`."""
    changes = {"architectures": [name]} | dtype_field(parse(text, CONFIG_FILE), str(dtype).removeprefix("torch."))
    if labelled:
        changes |= {"id2label": {str(i): n for i, n in labelled.id2label.items()}, "label2id": labelled.label2id}
    write_edited(text, folder / CONFIG_FILE, changes)
    copy_settings(source, folder, PROCESSORS)
