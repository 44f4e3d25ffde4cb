"""The heads of text encoders, which are never merged: of which class each expert is, and what of it is its own."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto as classes

from common.config import Model
from common.core.errors import InputError
from common.core.task_vectors import Params
from common.io.adapters import is_adapter, open_adapter
from common.io.lora import open_checkpoint
from common.io.model_config import config_file, read_config
from common.io.model_files import CONFIG_FILE
from common.io.task_heads import read_task_head
from NLU.encoders import architecture, body_name, require_classifiers
from NLU.tasks import TASKS

KINDS = {  # what opens an expert, and the class of each model type that it opens; the first is the only one scored
    AutoModelForSequenceClassification: classes.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForTokenClassification: classes.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForQuestionAnswering: classes.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    AutoModelForMultipleChoice: classes.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
}

OF_ADAPTERS = {  # what opens the model of an adapter, by peft's word for its task
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
}


def open_classifier(model: Model, task: str) -> PreTrainedModel:
    """A sequence classifier with the head of the task's expert; its encoder has no weights yet."""
    config = expert_architecture(model, task)
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, trust_remote_code=False)
    classifier.load_state_dict(read_head(model, task), strict=False)
    return classifier


def outputs_of(model: Model, task: str) -> int:
    """How many outputs the head of a task's expert must have; one that tasks.yaml does not list may have any."""
    return TASKS[task].labels if task in TASKS else expert_architecture(model, task).num_labels


def expert_architecture(model: Model, task: str) -> PretrainedConfig:
    """The config.json of the task's expert; a LoRA adapter has the base's, and as many outputs as the task."""
    folder = model.path("expert", task)
    require_classifiers(model)
    if not is_adapter(folder) or (folder / CONFIG_FILE).is_file():
        return architecture(model, folder)
    config = architecture(model, model.path("base"))
    config.num_labels = TASKS[task].labels if task in TASKS else saved_outputs(model, task, config)
    return config


def saved_outputs(model: Model, task: str, config: PretrainedConfig) -> int:
    """How many outputs an adapter's head has that is saved whole in it: the rows of the tensors that would be others
    with another number. InputError if it has none of them."""
    folder, shapes = model.path("expert", task), []
    for number in (2, 3):
        config.num_labels = number
        with torch.device("meta"):
            classifier = adapted_kind(folder).from_config(config, trust_remote_code=False)
        shapes.append({name: tensor.shape for name, tensor in classifier.state_dict().items()})
    sized = [name for name, shape in shapes[0].items() if shape != shapes[1][name]]
    in_body = body_name(model)
    saved = open_checkpoint(folder, model.path("base"), lambda stored: stored if stored in sized else in_body(stored))
    rows = {saved.shapes[name][0] for name in sized if name in saved.shapes}
    if len(rows) != 1:
        raise InputError(
            f"{folder} has an adapter without {', '.join(sized)}, and no config.json, either of which would tell the "
            "outputs of its head; save its config.json beside it, or leave it out of model.heads"
        )
    return rows.pop()


def adapted_kind(folder: Path) -> Any:
    """What of `KINDS` opens the model that an adapter is of, as peft names its task; else a sequence classifier."""
    settings, _ = open_adapter(folder)
    return OF_ADAPTERS.get(str(settings.get("task_type")), AutoModelForSequenceClassification)


def read_head(model: Model, task: str) -> Params:
    """All tensors of the task's expert that are never merged: its classifier, and the pooler that a BERT has before it.

    InputError if the expert lacks one of them or has another number of outputs than the task.
    """
    folder, wanted = model.path("expert", task), outputs_of(model, task)
    config, opener = expert_architecture(model, task), opener_of(model, task)
    if config.num_labels != wanted:
        kind = "is a regression and has 1" if wanted == 1 else f"has {wanted} classes"
        raise InputError(f"the head in {folder} has num_labels {config.num_labels}, but the task {task} {kind}")
    with torch.device("meta"):
        classifier = opener.from_config(config, trust_remote_code=False)
    try:
        return read_task_head(classifier, body_name(model), folder, model.path("base"))
    except InputError as error:
        named = named_class(model, task)
        if not named or any(named in names.values() for names in KINDS.values()):
            raise
        raise InputError(
            f"{config_file(folder)} names {named}, which has no classifier; leave {task} out of model.heads ({error})"
        ) from error


def named_class(model: Model, task: str) -> str:
    """The class that the config.json of the task's expert names, "" if none."""
    file = config_file(model.path("expert", task))
    return (read_config(file).get("architectures") or [""])[0] if file else ""


def class_name(model: Model, task: str) -> str:
    """The class of the task's expert, as its config.json names it."""
    return KINDS[opener_of(model, task)][expert_architecture(model, task).model_type]


def opener_of(model: Model, task: str) -> Any:
    """What of `KINDS` opens the task's expert, by the class that its config.json names; else a sequence classifier.

    InputError if a task of tasks.yaml, which is scored, has another kind.
    """
    config, named = expert_architecture(model, task), named_class(model, task)
    folder, scored = model.path("expert", task), AutoModelForSequenceClassification
    file = config_file(folder)
    if not file and task not in TASKS and is_adapter(folder):
        return adapted_kind(folder)
    opener = next((o for o, names in KINDS.items() if named and names.get(config.model_type) == named), scored)
    if task in TASKS and opener is not scored:
        raise InputError(f"{file} names {named}; the task {task} is answered by a sequence classifier")
    return opener
