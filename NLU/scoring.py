"""How a merged encoder is scored: under the classifier that a task's expert has."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.config import Config, Model
from common.core.errors import InputError
from common.core.notices import warn
from common.core.task_vectors import Params
from common.domain import Scored
from common.evaluation.answers import scored_by
from common.evaluation.metrics import CORRELATIONS, are_alike
from common.io.adapters import is_adapter
from common.io.bytes_of import beside_model, whole_model
from common.io.examples import Sample, load_sample, load_scored
from common.io.lora import open_checkpoint
from common.io.tokenizer_files import VOCABULARIES
from common.io.unstacked import unstacked
from common.io.vocabulary import tokenizer_folder
from common.merging.calibration import Batch, CalibrationTask, LabelledTask, calibration_task_of
from common.run.progress import counted
from NLU.encoders import body_name, family, positions_of, reading_of, skeleton
from NLU.examples import checked, class_order, labels_of
from NLU.heads import open_classifier, outputs_of
from NLU.tasks import TASKS

if TYPE_CHECKING:  # an import of a second, which commands that score nothing go without
    from datasets import Dataset

MAX_LENGTH = 128  # tokens of an example; longer ones are cut


def metric(task: str) -> str:
    """Name of the number that a task reports."""
    return TASKS[task].metric


def scorer(config: Config, test: str) -> dict[str, Any]:
    """What decides a score besides encoder and examples: the row of tasks.yaml, the files of the expert whose head and
    tokenizer it is scored with, and what lies beside the base, whose tokenizer or weights an expert can be without."""
    expert, base = config.model.path("expert", config.tests[test]), config.model.path("base")
    of_base = whole_model(base) if is_adapter(expert) else beside_model(base)
    return {"task": asdict(TASKS[test]), "expert": whole_model(expert), "base": of_base}


@torch.no_grad()
def score(
    config: Config, task: str, checkpoints: Mapping[str, Path], device: torch.device
) -> Iterator[tuple[str, Scored]]:
    """A test set's metric and number of examples for several encoders, each under the head of the task's expert."""
    owner = config.tests[task]
    outputs = outputs_of(config.model, owner)
    if outputs != TASKS[task].labels:
        labels = f"{outputs} against {TASKS[task].labels}"
        raise InputError(f"eval.tests: {owner} and {task} have unlike numbers of labels, {labels}")
    classifier = open_classifier(config.model, owner).to(device).eval()
    vocabulary = classifier.get_input_embeddings().num_embeddings
    records = scored_records(config, task)
    order = class_order(classifier.config, str(config.model.path("expert", owner)), task, records)
    batches = tokenised(records, task, config.eval.batch_size, open_tokenizer(config.model, owner, vocabulary))
    labels = torch.cat([labels for _, labels in batches])
    if metric(task) in CORRELATIONS and are_alike(labels):
        warn(f"all {len(labels)} labels of task {task} are alike: its {metric(task)} is undefined and stands as 0")
    of, names = reading_of(config.model), body_name(config.model)
    for name, path in checkpoints.items():
        stored = open_checkpoint(path, config.model.path("base"), names, turned=of.turned)
        encoder = unstacked(stored, of.pieces)
        classifier.base_model.load_state_dict(encoder.read(encoder.shapes), strict=False)
        bar = counted(batches, f"score {task}")
        logits = torch.cat([classifier(**tokens.to(device)).logits.cpu() for tokens, _ in bar])
        if not logits.isfinite().all():
            raise InputError(f"{path} answers task {task} with NaN or Inf")
        logits = logits if order is None else logits[:, order]
        predictions = logits.argmax(-1) if TASKS[task].labels > 1 else logits.squeeze(-1)
        yield name, scored_by(metric(task), labels.numpy(), predictions.numpy())


def open_tokenizer(model: Model, task: str, vocabulary: int) -> PreTrainedTokenizerBase:
    """The tokenizer beside the expert, or beside the base, which cuts texts where the encoder's positions end;
    InputError if it knows more tokens than are embedded."""
    folder = tokenizer_folder(model.path("expert", task), model.path("base"), VOCABULARIES)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if len(tokenizer) > vocabulary:
        raise InputError(f"the tokenizer in {folder} knows {len(tokenizer)} tokens, the encoder embeds {vocabulary}")
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions_of(skeleton(model)))
    return tokenizer


def scored_records(config: Config, task: str) -> "Dataset":
    """The examples that a task is scored on."""
    row = TASKS[task]
    return checked(task, row, load_scored(config.eval, task, row, (*row.text, "label")))


def tokenised(
    records: "Dataset", task: str, size: int, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[BatchEncoding, Tensor]]:
    """The examples of a task in batches (tokens, labels) of a size, short ones first, so that little is padded."""
    row = TASKS[task]
    *texts, labels = (list(records[column]) for column in (*row.text, "label"))

    def collate(examples: list[tuple]) -> tuple[BatchEncoding, Tensor]:
        *texts, labels = zip(*examples, strict=True)
        return encoded(tokenizer, texts), labels_of(row, labels)

    examples = sorted(zip(*texts, labels, strict=True), key=lambda example: sum(map(len, example[:-1])))
    return list(torch.utils.data.DataLoader(examples, size, collate_fn=collate))


def encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]]) -> BatchEncoding:
    """The tokens of a batch, padded to its longest: texts has all first sentences, and all second ones of pairs."""
    length = min(MAX_LENGTH, tokenizer.model_max_length)
    return tokenizer(*map(list, texts), truncation=True, max_length=length, padding=True, return_tensors="pt")


def calibration_task(config: Config, task: str, sample: Sample, device: torch.device) -> CalibrationTask:
    """The texts of a test set's task and the classifier of its expert, for merge methods that use data."""
    classifier, tokenizer = classifier_and_tokenizer(config, task, device)
    row = TASKS[task]
    records = checked(task, row, load_sample(config.eval, task, row, row.text, sample), labelled=False)
    examples = list(zip(*(records[column] for column in row.text), strict=True))
    if sample.split == "train":  # all of which are used, so their order is free: short ones first, little is padded
        examples.sort(key=lambda texts: sum(map(len, texts)))
    batches = torch.utils.data.DataLoader(
        examples, sample.batch, collate_fn=lambda texts: encoded(tokenizer, list(zip(*texts, strict=True)))
    )
    return with_classifier(config, classifier, batches, len(examples), device)


def classifier_and_tokenizer(
    config: Config, task: str, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What a test set's task is answered with: the classifier of its expert, whose encoder has no weights yet."""
    classifier = open_classifier(config.model, config.tests[task]).to(device)
    vocabulary = classifier.get_input_embeddings().num_embeddings
    return classifier, open_tokenizer(config.model, config.tests[task], vocabulary)


def with_classifier(
    config: Config, classifier: PreTrainedModel, batches: Iterable, examples: int, device: torch.device
) -> CalibrationTask:
    """Batches of tokens, and the classifier of their task."""
    head = [module for name, module in classifier.named_children() if name != classifier.base_model_prefix]
    prefix, of = f"{classifier.base_model_prefix}.", lambda output: output.logits
    return calibration_task_of(classifier, family(config.model), batches, examples, device, head, prefix, of)


def labelled_task(config: Config, task: str, sample: Sample, device: torch.device) -> LabelledTask:
    """The texts of a task with their labels, and the loss of its classifier: cross-entropy, of a regression the squared
    error.
    """
    row = TASKS[task]
    classifier, tokenizer = classifier_and_tokenizer(config, task, device)
    answer = with_classifier(config, classifier, (), 0, device).answer
    records = checked(task, row, load_sample(config.eval, task, row, (*row.text, "label"), sample))
    order = class_order(classifier.config, str(config.model.path("expert", config.tests[task])), task, records)

    def batch(numbers: Sequence[int]) -> dict[str, Tensor]:
        chosen = records.select(numbers)
        return {
            **encoded(tokenizer, [chosen[column] for column in row.text]),
            "labels": labels_of(row, list(chosen["label"])),
        }

    def loss(theta: Params, batch: Batch) -> Tensor:
        logits, labels = answer(theta, {k: x for k, x in batch.items() if k != "labels"}), batch["labels"].to(device)
        logits = logits if order is None else logits[:, order]
        return F.cross_entropy(logits, labels) if row.labels > 1 else F.mse_loss(logits.squeeze(-1), labels)

    return LabelledTask(loss, batch, len(records))
