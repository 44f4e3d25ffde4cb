"""How a merged encoder is written: as stock transformers opens it, and under the head of each task asked for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.config import Model
from common.core.errors import InputError
from common.core.places import for_task
from common.core.task_vectors import LazyTensor, Params
from common.io.checkpoints import Checkpoint, copy_files
from common.io.model_config import config_file, dtype_field, parse, read_text
from common.io.model_files import CONFIG_FILE, GENERATION_FILE, MODEL_FILE, folder_of
from common.io.sentence_modules import classifier_modules, write_modules
from common.io.shards import write_stored
from common.io.stored_types import as_stored, output_type
from common.io.surroundings import copy_surroundings, copy_tokenizer, write_edited
from common.io.task_heads import head_in_type, with_pooler, write_task_head
from common.io.tokenizer_files import has_tokenizer
from NLU.encoders import POOLER, config_of, reading_of, skeleton
from NLU.heads import class_name, expert_architecture, read_head
from NLU.tasks import TASKS


def check_export(model: Model) -> None:
    """InputError if model.heads asks for the head of a task or expert that has none, or one that is too large for the
    type of the merged weights."""
    for task in model.heads:
        alike = [known for known in TASKS if for_task("{slug}", known) == for_task("{slug}", task)]
        if task not in TASKS and (alike or not model.path("expert", task).exists()):
            raise InputError(f"model.heads: unknown task {task!r}; choose from {', '.join(TASKS)}")
        classifier_modules(model.path("expert", task))
    stored_heads(model)


def stored_heads(model: Model) -> dict[str, Params]:
    """The heads of model.heads in the type of the merged weights; InputError if one is missing or too large for it."""
    if not model.heads:
        return {}
    base = Checkpoint(model.path("base"), reading_of(model).names)
    dtype = output_type(base, json.loads(read_text(config_of(model, model.path("base")))))
    return {task: head_in_type(read_head(model, task), dtype, task) for task in model.heads}


def export(model: Model, tensors: Mapping[str, LazyTensor], folder: Path) -> None:
    """Write a merged encoder that stock AutoModel opens, and for each task of model.heads a model of the expert's kind,
    which opens as the expert does, a sequence classifier by

        AutoModelForSequenceClassification.from_pretrained(folder / "heads" / task)

    Its folder holds the expert's config, tokenizer and head, and a relative link to the one encoder.
    """
    base = Checkpoint(model.path("base"), reading_of(model).names)
    text = read_text(config_of(model, model.path("base")))
    dtype = output_type(base, json.loads(text))
    merged = as_stored(with_pooler(tensors, base, POOLER), dtype, base)
    write_stored(folder / MODEL_FILE, merged)
    write_edited(text, folder / CONFIG_FILE, adjusted(text, dtype, type(skeleton(model)).__name__))
    copy_surroundings(base.folder, folder)
    copy_files(base.folder, folder, [GENERATION_FILE])
    prefix = f"{skeleton(model).base_model_prefix}."
    for task, own in stored_heads(model).items():
        write_task_head(folder / "heads" / task, own, folder / MODEL_FILE, merged, prefix)
        write_classifier_surroundings(model, task, dtype, folder / "heads" / task)


def adjusted(text: str, dtype: torch.dtype, name: str) -> dict[str, Any]:
    """What must change in a config for weights of another type and class: these two, where it names them."""
    fields = parse(text, CONFIG_FILE)
    named = {"architectures": [name]} if fields.get("architectures") else {}
    return named | dtype_field(fields, str(dtype).removeprefix("torch."))


def write_classifier_surroundings(model: Model, task: str, dtype: torch.dtype, place: Path) -> None:
    """The expert's config, tokenizer and, of a CrossEncoder, modules, which name the function on its outputs. An
    adapter has the base's config, with as many labels as its head."""
    expert, base = (folder_of(model.path(which, task)) for which in ("expert", "base"))
    name, config = class_name(model, task), expert_architecture(model, task)
    own = config_file(expert)
    text = read_text(own or config_of(model, base))
    labels = {} if own else {"id2label": {str(i): n for i, n in config.id2label.items()}, "label2id": config.label2id}
    write_edited(text, place / CONFIG_FILE, adjusted(text, dtype, name) | labels)
    copy_tokenizer(expert if has_tokenizer(expert) else base, place)
    write_modules(classifier_modules(expert), place)
