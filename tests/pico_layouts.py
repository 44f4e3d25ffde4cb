"""One pico CLIP in two layouts: that of transformers, and its weights tensor by tensor where open_clip has them."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from pico_hf_vision import WORDS, write_pico_hf
from pico_vision import PICO_TASKS

TOWER = {"layers": 2, "width": 16, "mlp_ratio": 1.5}
FIELDS = {
    "embed_dim": 8, "quick_gelu": True,
    "vision_cfg": TOWER | {"image_size": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": TOWER | {"context_length": 16, "vocab_size": len(WORDS), "heads": 2},
}  # fmt: skip
NORMS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2"}


def layers_put(state: dict[str, Tensor], theirs: str, ours: str, put: dict[str, Tensor]) -> None:
    """The two layers of a tower, from transformers' names to open_clip's."""
    for layer in range(2):
        old, new = f"{theirs}.{layer}", f"{ours}.{layer}"
        for kind in ("weight", "bias"):
            q, k, v = (state[f"{old}.self_attn.{x}_proj.{kind}"] for x in "qkv")
            put[f"{new}.attn.in_proj_{kind}"] = torch.cat([q, k, v])
            put[f"{new}.attn.out_proj.{kind}"] = state[f"{old}.self_attn.out_proj.{kind}"]
            put[f"{new}.mlp.c_fc.{kind}"] = state[f"{old}.mlp.fc1.{kind}"]
            put[f"{new}.mlp.c_proj.{kind}"] = state[f"{old}.mlp.fc2.{kind}"]
            for name, other in NORMS.items():
                put[f"{new}.{name}.{kind}"] = state[f"{old}.{other}.{kind}"]


def in_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a CLIPModel under the names, and in the shapes, of open_clip's CLIP."""
    put = {
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": state["logit_scale"],
    }
    for kind in ("weight", "bias"):
        put[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        put[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        put[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    layers_put(state, "vision_model.encoder.layers", "visual.transformer.resblocks", put)
    layers_put(state, "text_model.encoder.layers", "transformer.resblocks", put)
    return {name: tensor.contiguous() for name, tensor in put.items()}


def write_both(root: Path, alone: bool = True) -> dict:
    """root/hf and root/open_clip: base and experts of the same weights. The stock CLIPModels by name."""
    models = write_pico_hf(root / "hf", "clip", alone)
    for name in ("base", *PICO_TASKS):
        folder = root / "open_clip" / name
        folder.mkdir(parents=True)
        fields = {"model_cfg": FIELDS, "preprocess_cfg": {"interpolation": "bicubic"}}
        (folder / "open_clip_config.json").write_text(json.dumps(fields))
        save_file(in_open_clip(models[name].state_dict()), folder / "open_clip_model.safetensors")
    image = torch.randn(2, 3, 16, 16)
    for name in ("base", *PICO_TASKS):  # the two are one model
        clip = open_clip.create_model(f"local-dir:{root / 'open_clip' / name}").eval()
        theirs = models[name].get_image_features(pixel_values=image).pooler_output
        torch.testing.assert_close(clip.encode_image(image), theirs, atol=1e-5, rtol=1e-5)
    return models
