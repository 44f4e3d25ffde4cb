"""The vision toy: a tiny CLIP trained on a captioned world, and one expert a task fine-tuned from it.

Made once by `--train` and packed in half precision beside this file; without `--train` the packed file is read.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN as MEAN
from open_clip.constants import OPENAI_DATASET_STD as STD
from torch import Tensor
from tqdm import tqdm

from common.io.checkpoints import write_tensors

from . import vision_data, vision_drawing
from .packed import Weights, make_from_packed
from .vision_data import SIZE, SPLITS, TASKS

HERE = Path(__file__).parent
WEIGHTS = HERE / "vision.safetensors"
MODEL = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "layers": 4, "width": 128, "head_width": 32},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "layers": 2, "width": 64, "heads": 2},
}
PREPROCESS = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
EMBEDDING = "token_embedding.weight"
WORLD, EPOCHS, BATCH, PRETRAIN_LR = 72_000, 5, 256, 1e-3
STEPS, LR = 1000, 3e-4  # fine-tuning, a task
COEFFICIENTS = np.arange(1, 21) / 20  # task arithmetic's, for the acceptance rows


def new_model() -> open_clip.CLIP:
    return open_clip.CLIP(**MODEL)


def tokenize(texts: list[str]) -> Tensor:
    return open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])(texts)


def normalised(pictures: np.ndarray) -> Tensor:
    """Bytes (N, H, W, 3) to the model's input (N, 3, H, W)."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def jitter(x: Tensor) -> Tensor:
    """The whole batch moved by at most two pixels each way, edges repeated."""
    dx, dy = torch.randint(0, 5, (2,)).tolist()
    return F.pad(x, (2, 2, 2, 2), mode="replicate")[..., dy : dy + SIZE, dx : dx + SIZE]


# ---- training --------------------------------------------------------------------------------------------------------


def optimiser(parameters: Mapping[str, Tensor], lr: float, steps: int) -> tuple[torch.optim.Optimizer, object]:
    """AdamW, weight decay 0.1 on matrices, with 5 % warm-up and then a cosine to zero."""
    decayed = [p for name, p in parameters.items() if p.ndim > 1 and "embedding" not in name]
    others = [p for name, p in parameters.items() if p.ndim <= 1 or "embedding" in name]
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}], lr)
    rise_and_fall = torch.optim.lr_scheduler.OneCycleLR
    return adamw, rise_and_fall(adamw, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False)


def pretrain() -> Weights:
    """Contrastive training on the world; pictures with the same caption count as each other's match."""
    torch.manual_seed(0)
    pictures, captions = vision_data.world(WORLD)
    x_N, tokens_N = normalised(pictures), tokenize(captions)
    model = new_model()
    steps = EPOCHS * (WORLD // BATCH)
    adamw, schedule = optimiser(dict(model.named_parameters()), PRETRAIN_LR, steps)
    bar = tqdm(range(steps), "pretraining", mininterval=5)
    for step in bar:
        if step % (WORLD // BATCH) == 0:
            order = torch.randperm(WORLD).split(BATCH)
        batch = order[step % (WORLD // BATCH)]
        tokens = tokens_N[batch]
        same = (tokens[:, None] == tokens[None]).all(-1).float()
        image = model.encode_image(jitter(x_N[batch]), normalize=True)
        logits = model.logit_scale.exp() * image @ model.encode_text(tokens, normalize=True).T
        target = same / same.sum(1)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    weights = {name: p.detach() for name, p in model.state_dict().items()}
    read = tokenize(captions).unique()
    weights[EMBEDDING] = torch.zeros_like(weights[EMBEDDING]).index_copy(0, read, weights[EMBEDDING][read])
    return weights


@torch.no_grad()
def zero_shot_head(model: open_clip.CLIP, task: str) -> Tensor:
    """Logits = normalised features @ this (D, C): the mean of the normalised templates, normalised, times the scale."""
    templates, classes = TASKS[task]["templates"], TASKS[task]["classes"]
    rows = [model.encode_text(tokenize([t.format(c=c) for t in templates]), normalize=True).mean(0) for c in classes]
    return model.logit_scale.exp() * F.normalize(torch.stack(rows), dim=-1).T


def fine_tune(base: Weights, task: str) -> Weights:
    """The image tower trained on the task's train split under its frozen zero-shot head."""
    model = load(base)
    head = zero_shot_head(model, task)
    pictures, labels = vision_data.task_split(task, "train")
    x_N, y_N = normalised(pictures), torch.from_numpy(labels)
    torch.manual_seed(0)
    adamw, schedule = optimiser(dict(model.visual.named_parameters()), LR, STEPS)
    for _ in tqdm(range(STEPS), task, mininterval=5):
        batch = torch.randint(len(y_N), (128,))
        logits = model.encode_image(jitter(x_N[batch]), normalize=True) @ head
        adamw.zero_grad()
        F.cross_entropy(logits, y_N[batch]).backward()
        torch.nn.utils.clip_grad_norm_(model.visual.parameters(), 1.0)
        adamw.step()
        schedule.step()
    return visual(model.state_dict())


def visual(weights: Weights) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in weights.items() if name.startswith("visual.")}


def load(*parts: Weights) -> open_clip.CLIP:
    model = new_model()
    model.load_state_dict({name: tensor for part in parts for name, tensor in part.items()})
    return model


# ---- the packed file -------------------------------------------------------------------------------------------------


def pack(base: Weights, experts: Mapping[str, Weights]) -> Weights:
    """Half precision: the base without the embedding rows it never read, each expert as its difference from it."""
    rounded = {name: tensor.half() for name, tensor in base.items()}
    read = base[EMBEDDING].any(1).nonzero()[:, 0]
    packed = {f"base/{name}": tensor for name, tensor in rounded.items() if name != EMBEDDING}
    packed |= {"rows": read.int(), "embedding": rounded[EMBEDDING][read]}
    for task, expert in experts.items():
        packed |= {f"{task}/{name}": (tensor - rounded[name].float()).half() for name, tensor in expert.items()}
    return packed


def unpack(packed: Weights) -> tuple[Weights, dict[str, Weights]]:
    """Single precision again: base, and experts by task."""
    parts: dict[str, Weights] = {part: {} for part in ("base", *TASKS)}
    for key, tensor in packed.items():
        if "/" in key:
            part, name = key.split("/")
            parts[part][name] = tensor.float()
    base = parts.pop("base")
    shape = (MODEL["text_cfg"]["vocab_size"], MODEL["text_cfg"]["width"])
    base[EMBEDDING] = torch.zeros(shape).index_copy(0, packed["rows"].long(), packed["embedding"].float())
    return base, {task: {name: base[name] + d for name, d in deltas.items()} for task, deltas in parts.items()}


# ---- acceptance ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: open_clip.CLIP, task: str, x_N: Tensor, y_N: Tensor) -> float:
    """Per cent of the pictures whose zero-shot head is largest at their label."""
    right = (model.encode_image(x_N, normalize=True) @ zero_shot_head(model, task)).argmax(1) == y_N
    return 100 * right.float().mean().item()


def acceptance(base: Weights, experts: Mapping[str, Weights]) -> dict[str, list[float]]:
    """Rows over the tasks: Pretrained, Individual, and task arithmetic with the coefficient of the best mean."""
    tests = {task: vision_data.task_split(task, "test") for task in TASKS}
    tests = {task: (normalised(x), torch.from_numpy(y)) for task, (x, y) in tests.items()}

    def row(weights_of: Mapping[str, Weights]) -> list[float]:
        return [accuracy(load(base, weights_of[task]), task, *tests[task]) for task in TASKS]

    rows = {"Pretrained": row({task: {} for task in TASKS}), "Individual": row(experts)}
    total = {name: sum(expert[name] - base[name] for expert in experts.values()) for name in visual(base)}
    merged = {}
    for c in COEFFICIENTS:
        weights = {name: base[name] + float(c) * delta for name, delta in total.items()}
        merged[f"TA ({c:.2f})"] = row(dict.fromkeys(TASKS, weights))
    best = max(merged, key=lambda name: np.mean(merged[name]))
    return rows | {best: merged[best]}


def print_rows(rows: Mapping[str, list[float]]) -> None:
    print(f"{'':12}" + "".join(f"{task:>13}" for task in [*TASKS, "mean"]))
    for name, values in rows.items():
        print(f"{name:12}" + "".join(f"{v:13.2f}" for v in [*values, float(np.mean(values))]))


# ---- the command -----------------------------------------------------------------------------------------------------


def train() -> Weights:
    """Base and experts from nothing, packed; about 15 minutes on two idle cores."""
    start = time.time()
    base = pretrain()
    base = {name: tensor.half().float() for name, tensor in base.items()}
    packed = pack(base, {task: fine_tune(base, task) for task in TASKS})
    print(f"trained in {time.time() - start:.0f} s")
    print_rows(acceptance(*unpack(packed)))
    return packed


def write(packed: Weights, out: Path) -> None:
    """The checkpoints and data of a finished toy."""
    base, experts = unpack(packed)
    folder = out / "checkpoints"
    write_tensors(folder / "zeroshot" / "open_clip_model.safetensors", base)
    config = json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}, indent=2)
    (folder / "zeroshot" / "open_clip_config.json").write_text(config + "\n")
    for task, expert in experts.items():
        write_tensors(folder / task / "finetuned.safetensors", expert)
        for split in SPLITS:
            vision_data.write_split(out / "data" / task, task, split)


def make(out: Path, retrain: bool) -> None:
    """The toy in `out`; with `retrain` the weights beside this file are made anew first."""
    contents = f"a tiny CLIP, {len(TASKS)} experts, {len(TASKS)} data sets"
    settings, data = (MODEL, TASKS), [vision_data, vision_drawing]
    make_from_packed(
        out, WEIGHTS, train if retrain else None, write, data=data, settings=settings, name="vision", contents=contents
    )
