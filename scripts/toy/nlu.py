"""The NLU toy: a small RoBERTa trained by masked language modelling, and one expert a task fine-tuned from it.

Made once by `--train` and packed beside this file with its tokenizer and the manual's prose; without `--train` the
packed file is read. What it holds was accepted by three rows: pretrained, individual, and task arithmetic.
"""

import json
import lzma
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import (
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from common.evaluation.metrics import METRICS

from . import nlu_data
from .nlu_base import MODEL, descend, encode, learn_words, new_tokenizer, optimiser, own, pretrain
from .nlu_data import TASKS
from .packed import Weights, make_from_packed

HERE = Path(__file__).parent
PACKED = HERE / "nlu.safetensors"
BASE = "roberta-toy"  # its folder
STEPS_TASK, BATCH_TASK, LR_TASK = 1000, 32, 5e-4  # fine-tuning, a task
COEFFICIENTS = np.arange(1, 21) / 20  # task arithmetic's, for the acceptance rows

Examples = tuple[list[tuple[str, ...]], list]  # texts, one or two for each example, and labels


# ---- training --------------------------------------------------------------------------------------------------------


def fine_tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, lr: float, steps: int, name: str
) -> Weights:
    """The whole encoder and its new head trained on the examples."""
    texts, labels = examples
    rows, y_N = encode(tokenizer, texts), torch.tensor(labels)
    adamw, schedule = optimiser(model.train(), lr, steps)
    bar = tqdm(range(steps), name, mininterval=5)
    for step in bar:
        if step % (len(y_N) // BATCH_TASK) == 0:
            order = torch.randperm(len(y_N)).split(BATCH_TASK)
        batch = order[step % (len(y_N) // BATCH_TASK)]
        logits = model(**tokenizer.pad([rows[i] for i in batch], return_tensors="pt")).logits.float()
        descend(model, loss_of(logits, y_N[batch]), adamw, schedule)
    return own(model)


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(logits[:, 0], y) if y.is_floating_point() else F.cross_entropy(logits, y)


def kind_of(task: str) -> dict:
    """What a config says of the head of a task."""
    labels = TASKS[task]["labels"]
    return {
        "num_labels": labels,
        "problem_type": "single_label_classification" if labels > 1 else "regression",
    }


def load_base(weights: Weights) -> RobertaForMaskedLM:
    model = RobertaForMaskedLM(RobertaConfig(**MODEL))
    model.load_state_dict(weights, strict=False)
    return model.eval()


def load_expert(task: str, *parts: Weights) -> RobertaForSequenceClassification:
    """A classifier with the weights of `parts`, of which the last that has a tensor counts."""
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**MODEL, **kind_of(task)))
    for part in parts:
        model.load_state_dict(part, strict=False)
    return model.eval()


def encoder(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if name.startswith("roberta.")}


# ---- the packed file -------------------------------------------------------------------------------------------------


def pack(base: Weights, experts: Mapping[str, Weights], texts: object) -> Weights:
    """Base and heads in half precision; the experts' difference from the base in 8 bits, one scale for each row."""
    rounded = {name: tensor.half() for name, tensor in base.items()}
    packed = {f"base/{name}": tensor for name, tensor in rounded.items()}
    for task, expert in experts.items():
        for name, tensor in expert.items():
            if name in base:
                delta = tensor - rounded[name].float()
                scale = delta.abs().amax(-1, keepdim=True) / 127
                packed[f"{task}/{name}"] = (delta / scale.clamp(min=1e-30)).round().to(torch.int8)
                packed[f"{task}/{name}/scale"] = scale
            else:
                packed[f"{task}/{name}"] = tensor.half()
    squeezed = lzma.compress(json.dumps(texts).encode(), preset=9)
    return packed | {"texts": torch.frombuffer(bytearray(squeezed), dtype=torch.uint8)}


def unpack(packed: Weights) -> tuple[Weights, dict[str, Weights], dict]:
    """Single precision again: base, experts by task, and the texts: words of the tokenizer, prose of the manual."""
    base = {name.removeprefix("base/"): t.float() for name, t in packed.items() if name.startswith("base/")}
    experts: dict[str, Weights] = {task: {} for task in TASKS}
    for key, tensor in packed.items():
        part, *name = key.split("/")
        if part in experts and len(name) == 1:
            scale = packed.get(f"{key}/scale")
            experts[part][name[0]] = tensor.float() if scale is None else base[name[0]] + scale * tensor
    return base, experts, json.loads(lzma.decompress(packed["texts"].numpy().tobytes()))


# ---- acceptance ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, examples: Examples) -> float:
    """The task's metric on the examples, as a fraction."""
    texts, labels = examples
    rows = encode(tokenizer, texts)
    cuts: list[BatchEncoding] = [
        tokenizer.pad(rows[i : i + 100], return_tensors="pt") for i in range(0, len(rows), 100)
    ]
    logits = torch.cat([model(**cut).logits for cut in cuts])
    return METRICS[TASKS[task]["metric"]](labels, logits.argmax(-1) if logits.shape[1] > 1 else logits[:, 0])


def acceptance(base: Weights, experts: Mapping[str, Weights], texts: Mapping) -> dict[str, list[float]]:
    """Rows over the tasks: Pretrained, Individual, and task arithmetic with the coefficient of the best mean."""
    tokenizer = new_tokenizer(texts["words"])
    tests = {task: nlu_data.task_split(texts["prose"], task, "validation") for task in TASKS}

    def row(merged: Weights) -> list[float]:
        return [score(load_expert(task, experts[task], merged), tokenizer, task, tests[task]) for task in TASKS]

    start = encoder(base)
    rows = {"Pretrained": row(start), "Individual": row({})}
    total = {name: sum(expert[name] - tensor for expert in experts.values()) for name, tensor in start.items()}
    merged = {f"TA ({c:.2f})": row({n: t + float(c) * total[n] for n, t in start.items()}) for c in COEFFICIENTS}
    best = max(merged, key=lambda name: np.mean(merged[name]))
    return rows | {best: merged[best]}


def print_rows(rows: Mapping[str, list[float]]) -> None:
    print(f"{'':12}" + "".join(f"{task:>14}" for task in [*TASKS, "mean"]))
    for name, values in rows.items():
        print(f"{name:12}" + "".join(f"{v:14.4f}" for v in [*values, float(np.mean(values))]))


# ---- the command -----------------------------------------------------------------------------------------------------


def train() -> Weights:
    """Tokenizer, base and experts from the prose of this Python; packed."""
    start = time.time()
    prose = nlu_data.manual()
    lines = [line for _, line in nlu_data.split_manual(prose, "train")] + nlu_data.docstrings()
    texts = {"words": learn_words(lines), "prose": prose}
    tokenizer = new_tokenizer(texts["words"])
    base = {name: tensor.half().float() for name, tensor in pretrain(lines, tokenizer).items()}
    experts = {}
    for task in TASKS:
        examples = nlu_data.task_split(prose, task, "train")
        experts[task] = fine_tune(load_expert(task, base), tokenizer, examples, LR_TASK, STEPS_TASK, task)
    packed = pack(base, experts, texts)
    print(f"trained in {time.time() - start:.0f} s")
    print_rows(acceptance(*unpack(packed)))
    return packed


def write(packed: Weights, out: Path) -> None:
    """The checkpoints and data of a finished toy, as stock transformers and datasets read them."""
    base, experts, texts = unpack(packed)
    tokenizer = new_tokenizer(texts["words"])
    models = {BASE: load_base(base)} | {task: load_expert(task, expert) for task, expert in experts.items()}
    for name, model in models.items():
        model.save_pretrained(out / "checkpoints" / name)
        tokenizer.save_pretrained(out / "checkpoints" / name)
    for task in TASKS:
        nlu_data.write_splits(out / "data" / task, texts["prose"], task)


def make(out: Path, retrain: bool) -> None:
    """The toy in `out`; with `retrain` the file beside this file is made anew first."""
    contents = f"a small RoBERTa, {len(TASKS)} experts, {len(TASKS)} data sets"
    settings, data = (MODEL, TASKS), [nlu_data]
    make_from_packed(
        out, PACKED, train if retrain else None, write, data=data, settings=settings, name="NLU", contents=contents
    )
