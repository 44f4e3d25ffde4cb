"""Pico ViTs of transformers: a backbone, and classifiers near it, each with a head of its own number of classes."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel, ViTImageProcessor

from common.config import Config
from pico_vision import PICO_TASKS, pico_config

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
CLASSIFIERS = {  # what a pico config says besides
    "vit": {"intermediate_size": 24},
    "deit": {"intermediate_size": 24},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"num_register_tokens": 2, "mlp_ratio": 2},
}
GATED = {"use_swiglu_ffn": True}  # DINOv2 giant, whose files keep two matrices of an MLP in one


def fields_of(kind: str, **more) -> dict:
    """All fields of a pico config of a model type."""
    return {"model_type": kind} | SIZES | CLASSIFIERS[kind] | more


def write_pico_classifiers(root: Path, kind: str, classes: int = 10, **more) -> dict[str, PreTrainedModel]:
    """root/base, a backbone; root/<task>, classifiers with a processor of their own each. The stock models by name."""
    torch.manual_seed(0)
    made = {"base": AutoModel.from_config(AutoConfig.for_model(**fields_of(kind, **more))).eval()}
    with torch.no_grad():
        for parameter in made["base"].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    body = made["base"].state_dict()
    for task in PICO_TASKS:
        config = AutoConfig.for_model(**fields_of(kind, num_labels=classes, architectures=[], **more))
        made[task] = AutoModelForImageClassification.from_config(config).eval()
        own = made[task].base_model.state_dict()
        made[task].base_model.load_state_dict({n: body[n] + 0.05 * torch.randn_like(body[n]) for n in own})
        for name, parameter in made[task].named_parameters():
            if not name.startswith(made[task].base_model_prefix):  # large enough to give unlike answers
                parameter.data += torch.randn_like(parameter)
    for number, (name, model) in enumerate(made.items()):
        model.save_pretrained(root / name)
        mean = [0.5 - 0.1 * number] * 3
        ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=mean).save_pretrained(root / name)
    return made


def pico_classifier_config(root: Path, data: Path) -> Config:
    """A complete experiment that ends in seconds."""
    config = pico_config(root, root / "runs")
    model = replace(config.model, root=str(root), base="base", expert="{task}")
    return replace(config, model=model, eval=replace(config.eval, data=str(data)))
