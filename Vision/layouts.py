"""OpenAI's CLIP in the layout of the other library: an expert of transformers for a base of open_clip, and the reverse.

    visual.transformer.resblocks.N.attn.in_proj_weight    rows of vision_model.encoder.layers.N.self_attn.{q,k,v}_proj
    visual.proj                                           visual_projection.weight, turned
    all else of the image tower                           the same tensor under another name

Tensors are read under the names of the base, one at a time; a merged model is written as the base is.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn

from common.core.blocks import Piece
from common.core.errors import InputError
from Vision.hf_files import processor_fields

OPEN_CLIP, HUGGING_FACE = "visual.", "vision_model."
PROJ, PROJECTION = "visual.proj", "visual_projection.weight"
LAYER = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.(.+)")
HF_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
QKV = re.compile(r"(.+\.attn\.)([qkv])_proj\.(weight|bias)")
FUSED = re.compile(r"(.+\.self_attn\.)in_proj_(weight|bias)")
OUTSIDE = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
} | {f"attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkv"}
TO_HF = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in INSIDE.items() for kind in ("weight", "bias")}
TO_HF |= {f"attn.in_proj_{kind}": f"self_attn.in_proj_{kind}" for kind in ("weight", "bias")}
FROM_HF = {theirs: ours for ours, theirs in TO_HF.items()}
OUTSIDE_HF = {theirs: ours for ours, theirs in OUTSIDE.items()}
CHILDREN = {theirs.split(".")[0] for theirs in OUTSIDE_HF} | {"encoder"}  # of a tower saved alone, without its prefix


def in_transformers(name: str) -> str:
    """The name that a tensor of open_clip's image tower has in a CLIPModel, q, k and v still in one; of all others
    their own. One that has no counterpart is put where it is refused by its name."""
    if not name.startswith(OPEN_CLIP) or name == PROJ:
        return name
    layer = LAYER.fullmatch(name)
    if layer and layer[2] in TO_HF:
        return f"{HUGGING_FACE}encoder.layers.{layer[1]}.{TO_HF[layer[2]]}"
    return HUGGING_FACE + OUTSIDE.get(name.removeprefix(OPEN_CLIP), name)


def in_open_clip(name: str) -> str:
    """The name that a tensor of the image tower of a CLIPModel has in open_clip, q, k and v still apart; of all others
    their own. One that has no counterpart is put where it is refused by its name."""
    own = name.removeprefix(HUGGING_FACE)
    if (own == name and name.split(".")[0] not in CHILDREN) or name.endswith("position_ids"):
        return name
    layer = HF_LAYER.fullmatch(own)
    if layer and layer[2] in FROM_HF:
        return f"{OPEN_CLIP}transformer.resblocks.{layer[1]}.{FROM_HF[layer[2]]}"
    return OPEN_CLIP + OUTSIDE_HF.get(own, name)


def pieces_in_transformers(name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """What a CLIPModel has of a tensor of open_clip that is not one of its own: q, k and v; the projection, turned."""
    fused = FUSED.fullmatch(name)
    if fused and shape:
        rows = shape[0] // 3
        for number, x in enumerate("qkv"):
            yield Piece(f"{fused[1]}{x}_proj.{fused[2]}", rows=slice(number * rows, (number + 1) * rows))
    elif name == PROJ:
        yield Piece(PROJECTION, turned=True)


def pieces_in_open_clip(name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """What open_clip's CLIP has of a tensor of a CLIPModel that is not one of its own: a third of the fused one."""
    apart = QKV.fullmatch(name)
    if apart:
        yield Piece(f"{apart[1]}in_proj_{apart[3]}", part="qkv".index(apart[2]))
    elif name == PROJECTION:
        yield Piece(PROJ, turned=True)


def lent(names: Collection[str]) -> tuple[str, ...]:
    """What open_clip's image tower has and that of a CLIPModel, saved alone, has not: the projection."""
    alone = PROJECTION not in names and any(map(QKV.fullmatch, names))
    return (PROJ,) if alone else ()


# ---- what no tensor shows --------------------------------------------------------------------------------------------

COLOURS = {"image_mean": "mean", "image_std": "std"}  # what is taken off each colour, and by what it is divided


def facts_of_config(tower: Mapping[str, Any], processor: Path | None) -> dict[str, Any]:
    """What decides a CLIPModel's image tower besides its tensors, from the resolved fields of its config, and from the
    files of its processor in a folder, where there are any."""
    fields = processor_fields(processor) if processor else {}
    shifted = fields.get("do_normalize", True) is not False
    colours = {key: rounded(fields[key]) for key in COLOURS if shifted and isinstance(fields.get(key), list | tuple)}
    return colours | {
        "heads": tower["num_attention_heads"],
        "activation": tower["hidden_act"],
        "layer_norm_eps": tower["layer_norm_eps"],
        "pooling": "tok",
    }


def facts_of_module(visual: nn.Module, where: str) -> dict[str, Any]:
    """The same of open_clip's image tower without weights; InputError, beginning with `where`, if it is no ViT."""
    if not isinstance(visual, VisionTransformer):
        raise InputError(f"{where} is open_clip's {type(visual).__name__}, which is no CLIPModel of transformers")
    block = visual.transformer.resblocks[0]
    gelu = block.mlp.gelu
    approximate = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
    known = approximate[gelu.approximate] if isinstance(gelu, nn.GELU) else type(gelu).__name__
    colours = {key: rounded(visual.preprocess_cfg[name]) for key, name in COLOURS.items()}
    return colours | {
        "heads": block.attn.num_heads,
        "activation": "quick_gelu" if isinstance(gelu, QuickGELU) else known,
        "layer_norm_eps": block.ln_1.eps,
        "pooling": visual.pool_type,
    }


def rounded(numbers: Iterable[float]) -> tuple[float, ...]:
    """Numbers that are told from others by three digits, however many were written."""
    return tuple(round(float(number), 3) for number in numbers)


def require_same_facts(base: Mapping[str, Any], other: Mapping[str, Any], path: Path) -> None:
    """InputError naming what makes another model another function of equal weights; of what only one of them says,
    nobody can tell."""
    unlike = [name for name in base if name in other and other[name] != base[name]]
    if unlike:
        said = [f"{name} is {other[name]!r}, the base's is {base[name]!r}" for name in unlike]
        raise InputError(
            f"{path}: {'; '.join(said)}: the merged model computes with the base's, for which these weights are not "
            "made; merge models of one base"
        )
