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
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from common.io.checkpoints import write_tensors
from common.io.examples import cut_order

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
TIDY, WILD = 25_000, 50_000  # pictures of the world
PRETRAIN_STEPS, BATCH, PRETRAIN_LR = 2400, 256, 1e-3
STEPS, FEW, LR = 300, 128, 7e-5  # fine-tuning, a task: steps, pictures of each, rate


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


def contrastive_loss(model: open_clip.CLIP, x_N: Tensor, captions: Tensor, of: Tensor) -> Tensor:
    """CLIP's loss where captions repeat: each picture among the captions of the batch, each caption among its pictures.

    captions: tokens of those that occur, each once. of: which of them each picture has.
    """
    image, text = model.encode_image(x_N, normalize=True), model.encode_text(captions, normalize=True)
    logits = model.logit_scale.exp() * image @ text.T
    to_picture = -F.log_softmax(logits, 0)[torch.arange(len(of)), of].mean()
    return (F.cross_entropy(logits, of) + to_picture) / 2


def pretrain() -> Weights:
    """Contrastive training on the tidy and the wild pictures of the world."""
    torch.manual_seed(0)
    worlds = [vision_data.world(TIDY), vision_data.wild_world(WILD)]
    pictures = np.concatenate([pictures for pictures, _ in worlds])
    tokens, caption_of = tokenize([c for _, captions in worlds for c in captions]).unique(dim=0, return_inverse=True)
    model = new_model()
    adamw, schedule = optimiser(dict(model.named_parameters()), PRETRAIN_LR, PRETRAIN_STEPS)
    generator, order = torch.Generator().manual_seed(1), torch.empty(0, dtype=torch.long)
    bar = tqdm(range(PRETRAIN_STEPS), "pretraining", mininterval=5)
    for _ in bar:
        if len(order) < BATCH:
            order = torch.randperm(len(pictures), generator=generator)
        batch, order = order[:BATCH], order[BATCH:]
        present, of = caption_of[batch].unique(return_inverse=True)
        loss = contrastive_loss(model, jitter(normalised(pictures[batch.numpy()])), tokens[present], of)
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    weights = {name: p.detach() for name, p in model.state_dict().items()}
    read = tokens.unique()
    weights[EMBEDDING] = torch.zeros_like(weights[EMBEDDING]).index_copy(0, read, weights[EMBEDDING][read])
    return weights


@torch.no_grad()
def zero_shot_head(model: open_clip.CLIP, task: str) -> Tensor:
    """Logits = normalised features @ this (D, C): the mean of the normalised templates, normalised, times the scale."""
    templates, classes = TASKS[task]["templates"], TASKS[task]["classes"]
    rows = [model.encode_text(tokenize([t.format(c=c) for t in templates]), normalize=True).mean(0) for c in classes]
    return model.logit_scale.exp() * F.normalize(torch.stack(rows), dim=-1).T


def fine_tune(base: Weights, task: str, lr: float = LR) -> Weights:
    """The image tower trained on the task's train split under its frozen zero-shot head."""
    model = load(base)
    head = zero_shot_head(model, task)
    pictures, labels = vision_data.task_split(task, "train")
    trained, _ = cut_order(len(labels))  # the others are the validation cut, on which coefficients are chosen
    x_N, y_N = normalised(pictures[trained]), torch.from_numpy(labels[trained])
    torch.manual_seed(0)
    adamw, schedule = optimiser(dict(model.visual.named_parameters()), lr, STEPS)
    for _ in tqdm(range(STEPS), task, mininterval=5):
        batch = torch.randint(len(y_N), (FEW,))
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


@torch.no_grad()
def accuracy(model: open_clip.CLIP, task: str, x_N: Tensor, y_N: Tensor) -> float:
    """Per cent of the pictures whose zero-shot head is largest at their label."""
    right = (model.encode_image(x_N, normalize=True) @ zero_shot_head(model, task)).argmax(1) == y_N
    return 100 * right.float().mean().item()


# ---- the command -----------------------------------------------------------------------------------------------------


def train() -> Weights:
    """Base and experts from nothing, packed; half an hour on one core. scripts/regime.py measures what comes out."""
    start = time.time()
    base = pretrain()
    base = {name: tensor.half().float() for name, tensor in base.items()}
    packed = pack(base, {task: fine_tune(base, task) for task in TASKS})
    print(f"trained in {time.time() - start:.0f} s")
    return packed


def write(packed: Weights, out: Path) -> None:
    """The checkpoints and data of a finished toy."""
    base, experts = unpack(packed)
    write_base(base, out)
    for task, expert in experts.items():
        write_tensors(expert_file(out, task), expert)
        for split in SPLITS:
            vision_data.write_split(out / "data" / task, task, split)


def write_base(base: Weights, out: Path) -> None:
    folder = out / "checkpoints" / "zeroshot"
    write_tensors(folder / "open_clip_model.safetensors", base)
    config = json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}, indent=2)
    (folder / "open_clip_config.json").write_text(config + "\n")


def expert_file(out: Path, task: str) -> Path:
    return out / "checkpoints" / task / "finetuned.safetensors"


def make_at_rate(out: Path, rate: float) -> None:
    """The toy's base, and experts fine-tuned anew at another rate; one that is there is kept."""
    base, _ = unpack(load_file(WEIGHTS))
    write_base(base, out)
    for task in TASKS:
        if not expert_file(out, task).exists():
            write_tensors(expert_file(out, task), fine_tune(base, task, rate))
    print(f"made    {out}: a tiny CLIP, {len(TASKS)} experts fine-tuned at {rate:g}")


def make(out: Path, retrain: bool) -> None:
    """The toy in `out`; with `retrain` the weights beside this file are made anew first."""
    contents = f"a tiny CLIP, {len(TASKS)} experts, {len(TASKS)} data sets"
    settings, data = (MODEL, TASKS), [vision_data, vision_drawing]
    make_from_packed(
        out, WEIGHTS, train if retrain else None, write, data=data, settings=settings, name="vision", contents=contents
    )
