"""Pico CLIPs and SigLIPs as stock transformers saves them: a base with a text tower, experts that are image towers."""

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessor,
    CLIPVisionModel,
    MetaClip2VisionModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessor,
    Siglip2VisionModel,
    SiglipVisionModel,
)

from common.config import Config
from pico_vision import PICO_TASKS, pico_config

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "photo", "of", "the", "number", ":", '"', ".", *map(str, range(10))]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
EYE = SIZES | {"image_size": 16, "patch_size": 8}
TEXT = SIZES | {
    "vocab_size": len(WORDS), "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWERS = {
    "clip": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip2": Siglip2VisionModel,
    "metaclip_2": MetaClip2VisionModel,
}
EYES = {"siglip2": {"num_patches": 4}}  # what the config of an image tower says besides


def pico_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def fields_of(kind: str) -> dict:
    """All fields of a pico config of a model type."""
    eye = EYE | EYES.get(kind, {})
    return {"model_type": kind, "vision_config": eye, "text_config": TEXT, "projection_dim": 8}


def write_pico_hf(root: Path, kind: str, alone: bool = True) -> dict[str, PreTrainedModel]:
    """root/base and root/<task>: an expert is the image tower alone, or a whole model. The stock models, by name."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**fields_of(kind))
    made = {name: AutoModel.from_config(config).eval() for name in ("base", *PICO_TASKS)}
    base = {
        n: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t for n, t in made["base"].state_dict().items()
    }
    for name, model in made.items():
        moved = {n: t + 0.05 * torch.randn_like(t) for n, t in base.items() if n.startswith("vision_model.")}
        model.load_state_dict(base | (moved if name != "base" else {}))
        tower = TOWERS[kind]
        if name == "base" or not alone:
            model.save_pretrained(root / name)
        else:
            image = tower(config.vision_config)
            own = {n.removeprefix("vision_model."): t for n, t in model.state_dict().items()}
            image.load_state_dict({n: own[n] for n in image.state_dict()})
            image.save_pretrained(root / name)
    pico_tokenizer().save_pretrained(root / "base")
    size = {"height": 16, "width": 16}
    if kind == "siglip2":  # which cuts an image into patches and never crops it
        Siglip2ImageProcessor(patch_size=8, max_num_patches=6).save_pretrained(root / "base")
    else:
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(root / "base")
    return made


def pico_hf_config(root: Path, data: Path) -> Config:
    """A complete experiment that ends in seconds."""
    config = pico_config(root, root / "runs")
    model = replace(config.model, root=str(root), base="base", expert="{task}")
    return replace(config, model=model, eval=replace(config.eval, data=str(data)))
