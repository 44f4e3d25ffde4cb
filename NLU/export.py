"""How a merged encoder is written: as stock transformers opens it, and under the head of each task asked for."""

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig

from common.config import Model, for_task
from common.core.errors import InputError
from common.io.checkpoints import copy_files, write_tensors, write_text
from common.io.model_files import INDEX_FILE
from common.io.shards import write_stream
from NLU.encoders import architecture, skeleton
from NLU.scoring import TASKS, VOCABULARIES, expert_architecture, read_head

TOKENIZER_FILES = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")


def check_export(model: Model) -> None:
    """InputError if model.heads asks for the head of a task or expert that has none."""
    for task in model.heads:
        alike = [known for known in TASKS if for_task("{slug}", known) == for_task("{slug}", task)]
        if task not in TASKS and (alike or not model.path("expert", task).exists()):
            raise InputError(f"model.heads: unknown task {task!r}; choose from {', '.join(TASKS)}")
        read_head(model, task)


def export(model: Model, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write a merged encoder that stock AutoModel opens, and for each task of model.heads a classifier that has

        AutoModelForSequenceClassification.from_pretrained(folder / "heads" / task)

    A classifier's folder holds the expert's config, tokenizer and head, and a relative link to the one encoder.
    """
    base = architecture(model, model.path("base"))
    base.architectures = [type(skeleton(model)).__name__]
    merged = write_stream(folder / "model.safetensors", tensors)
    write_surroundings(base, model.path("base"), folder)
    for task in model.heads:
        own, encoder = read_head(model, task), folder / "heads" / task / "encoder.safetensors"
        write_tensors(encoder.with_name("head.safetensors"), own)
        encoder.unlink(missing_ok=True)
        encoder.symlink_to("../../model.safetensors")
        files = dict.fromkeys(merged, encoder.name) | dict.fromkeys(own, "head.safetensors")
        write_text(encoder.with_name(INDEX_FILE), json.dumps({"metadata": {}, "weight_map": files}, indent=1) + "\n")
        expert = model.path("expert", task)
        write_surroundings(expert_architecture(model, task), expert, encoder.parent)


def write_surroundings(architecture: PretrainedConfig, source: Path, folder: Path) -> None:
    """The config of a float32 checkpoint, and the tokenizer that lies in `source`."""
    architecture.dtype = "float32"
    write_text(folder / "config.json", architecture.to_json_string())
    copy_files(source, folder, TOKENIZER_FILES)
