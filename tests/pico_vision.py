"""A pico CLIP as stock open_clip writes it, experts near it, and noise images."""

import json
from pathlib import Path

import datasets
import numpy as np
import open_clip
import torch
from PIL import Image

from common.config import Adapt, Anchors, Compare, Config, Eval, Model, Run, Start
from common.io.checkpoints import write_tensors

PICO_CLIP = {
    "embed_dim": 8,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
TIMM = {
    "embed_dim": 32, "init_logit_bias": -10, "custom_text": True,
    "vision_cfg": {"image_size": 16, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"},
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "no_causal_mask": True,
        "pool_type": "last",
    },
}  # fmt: skip
COCA = {
    "embed_dim": 8, "custom_text": True,
    "vision_cfg": PICO_CLIP["vision_cfg"] | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": PICO_CLIP["text_cfg"] | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}  # fmt: skip
PICO_TASKS = ["MNIST", "SVHN"]


def write_pico_clip(root: Path, tasks: list[str] = PICO_TASKS, fields: dict = PICO_CLIP) -> None:
    """A base with text tower in root/base, experts (image towers) in root/<task>/finetuned.safetensors."""
    config = {"model_cfg": fields, "preprocess_cfg": {"interpolation": "bicubic"}}
    (root / "base").mkdir(parents=True)
    (root / "base" / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    clip = open_clip.create_model(f"local-dir:{root / 'base'}", load_weights=False).state_dict()
    if "text_decoder.text_projection" in clip:  # open_clip leaves it as memory was
        torch.nn.init.normal_(clip["text_decoder.text_projection"])
    write_tensors(root / "base" / "open_clip_model.safetensors", clip)
    for task in tasks:
        tower = {n: t + 0.05 * torch.randn_like(t) for n, t in clip.items() if n.startswith("visual.")}
        write_tensors(root / task / "finetuned.safetensors", tower)


def write_pico_images(root: Path, tasks: list[str] = PICO_TASKS) -> None:
    """Twenty noise images a task, labelled 0..9, as parquet with ClassLabel names."""
    generator = np.random.default_rng(0)
    for task in tasks:
        images = [Image.fromarray(generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)) for _ in range(20)]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
        )
        records = datasets.Dataset.from_dict({"image": images, "label": [i % 10 for i in range(20)]}, features=features)
        (root / task).mkdir(parents=True)
        records.to_parquet(root / task / "test-00000-of-00001.parquet")


def pico_config(inputs: Path, out: Path) -> Config:
    """A complete experiment that ends in seconds, reading inputs/clip and inputs/data."""
    return Config(
        domain="vision",
        model=Model(root=str(inputs / "clip"), base="base", expert="{task}/finetuned.safetensors"),
        tasks=PICO_TASKS,
        anchors=Anchors(number=4, steps=5),
        start=Start(hyper={"wudi": {"steps": 3}}),
        adapt=Adapt(epochs=2, batch_size=4, by_start={"pretrained": {"lr": 1e-5}}),
        eval=Eval(data=str(inputs / "data")),
        compare=Compare(),
        run=Run(name="pico", root=str(out), device="cpu"),
    )
