"""Pico encoders in Hugging Face folders as stock transformers writes them, a tokenizer, and GLUE-like tables.

And, for what depends on size, one real block of a RoBERTa-large.
"""

from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    ElectraConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from common.config import Adapt, Anchors, Compare, Config, Eval, Model, Run, Start
from common.core.places import for_task
from common.io.checkpoints import write_tensors
from NLU.tasks import TASKS, Task

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
PICO = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 140, "pad_token_id": 1,
}  # fmt: skip
CONFIGS = {"roberta": RobertaConfig, "bert": BertConfig, "electra": ElectraConfig}
PICO_TASKS = ["CoLA", "STS-B", "MNLI"]


def slug(task: str) -> str:
    return for_task("{slug}", task)


def pico_architecture(family: str, **changes) -> PretrainedConfig:
    narrow = {"embedding_size": 8} if family == "electra" else {}
    return CONFIGS[family](**PICO | narrow | changes)


def pico_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def write_pico_encoders(root: Path, family: str, tasks: list[str]) -> None:
    """A masked language model in root/base, an expert with its head in root/<task in lower case>/model."""
    torch.manual_seed(0)
    base = AutoModelForMaskedLM.from_config(pico_architecture(family))
    with torch.no_grad():
        for parameter in base.parameters():  # as initialised, all biases are 0 and all norms alike
            parameter.add_(0.2 * torch.randn_like(parameter))
    base.save_pretrained(root / "base")
    pico_tokenizer().save_pretrained(root / "base")
    for task in tasks:
        labels = TASKS[task].labels
        expert = AutoModelForSequenceClassification.from_config(pico_architecture(family, num_labels=labels))
        weights = base.base_model.state_dict()
        weights = {n: t + 0.1 * torch.randn_like(t) for n, t in weights.items()}
        expert.base_model.load_state_dict(weights, strict=False)  # BERT: the classifier alone has a pooler
        for name, parameter in expert.named_parameters():
            if not name.startswith(expert.base_model_prefix):  # the head: large enough to give unlike answers
                parameter.data += 2 * torch.randn_like(parameter)
        folder = root / slug(task) / "model"
        expert.save_pretrained(folder)
        pico_tokenizer().save_pretrained(folder)


def write_large_encoders(root: Path, tasks: list[str]) -> None:
    """A RoBERTa-large cut to its first block, random weights: root/base, and experts with heads in root/<slug>."""
    large = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 1}
    for task in ("base", *tasks):
        labels = TASKS[task].labels if task in TASKS else 2
        architecture = RobertaConfig(**large, vocab_size=50265, max_position_embeddings=514, num_labels=labels)
        with torch.device("meta"):
            shapes = AutoModelForSequenceClassification.from_config(architecture).state_dict()
        torch.manual_seed(0)
        weights = {n: 0.02 * torch.randn(t.shape) for n, t in shapes.items()}
        if task != "base":
            torch.manual_seed(len(task) + labels)
            weights = {n: t + 1e-3 * torch.randn(t.shape) for n, t in weights.items()}
        write_tensors(root / slug(task) / "model.safetensors", weights)
        architecture.save_pretrained(root / slug(task))


def write_pico_texts(root: Path, tasks: list[str]) -> None:
    """Thirty examples of random words for each task and split, as save_to_disk writes them."""
    generator = np.random.default_rng(0)
    for task in tasks:
        row = TASKS[task]
        splits = {split: pico_table(row, generator) for split in (row.split, row.train_split)}
        datasets.DatasetDict(splits).save_to_disk(str(root / task))


def pico_table(row: Task, generator: np.random.Generator) -> datasets.Dataset:
    texts = {key: [" ".join(generator.choice(WORDS, n)) for n in generator.integers(1, 9, 30)] for key in row.text}
    labels = generator.normal(size=30) if row.labels == 1 else np.arange(30) % row.labels
    return datasets.Dataset.from_dict({**texts, "label": labels.tolist()})


def pico_config(inputs: Path, out: Path, family: str = "roberta") -> Config:
    """A complete experiment that ends in a second or two, reading inputs/<family> and inputs/data."""
    return Config(
        domain="nlu",
        model=Model(family=family, root=str(inputs / family), base="base", expert="{slug}/model"),
        tasks=PICO_TASKS,
        anchors=Anchors(number=4, tokens=3, steps=5),
        start=Start(hyper={"wudi": {"steps": 3}}),
        adapt=Adapt(distance="mse", epochs=2, batch_size=4, by_start={"pretrained": {"lr": 5e-5}}),
        eval=Eval(data=str(inputs / "data")),
        compare=Compare(),
        run=Run(name="pico", root=str(out), device="cpu"),
    )
