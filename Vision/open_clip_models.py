"""CLIPs of open_clip: how one is opened, what is anchored of it, and how a merged one is written."""

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from common.config import Config, Model
from common.core.blocks import BlockFamily
from common.core.errors import InputError
from common.core.task_vectors import LazyTensor
from common.domain import other_models
from common.io.cached import cached_by_files
from common.io.checkpoints import Checkpoint, write_text
from common.io.shards import require_names, write_stored
from common.io.skeleton import first_input
from common.io.stored_types import as_stored, output_type
from common.io.surroundings import copy_surroundings
from Vision.clip_config import check_inputs as check_configs
from Vision.clip_config import clip_file, config_text, of_transformers, preprocess_of
from Vision.hf_files import Pixels, image_config, processor_folder
from Vision.layouts import (
    facts_of_config,
    facts_of_module,
    in_open_clip,
    lent,
    pieces_in_open_clip,
    require_same_facts,
)
from Vision.tasks import Headed
from Vision.unmerged import warn_of_unmerged
from Vision.zero_shot import Classifier, head_of

IMAGE_TOWER = "visual."
# null_gradients: the key part of the fused projection's bias (q, k, v).
# published_axes: open_clip 2.0.2, which made the released anchors, was sequence-first.
OPEN_CLIP = BlockFamily(
    blocks="visual.transformer.resblocks",
    scope=IMAGE_TOWER,
    null_gradients={"attn.in_proj_bias": (1, 3)},
    published_axes="TAD",
    names=in_open_clip,
    pieces=pieces_in_open_clip,
    lent=lent,
)


# timm's ViTs as image towers, those of SigLIP among them: their blocks are called with one batch-first tensor as well.
TIMM = BlockFamily(blocks="visual.trunk.blocks", scope=IMAGE_TOWER, null_gradients={"attn.qkv.bias": (1, 3)})


def family(model: Model) -> BlockFamily:
    """The blocks of the image tower."""
    if model.family not in ("auto", "open_clip"):
        raise InputError(f"unknown model.family {model.family!r}; {model.path('base')} is of open_clip")
    return OPEN_CLIP if isinstance(skeleton(model).visual, VisionTransformer) else TIMM


def check_inputs(config: Config) -> None:
    """Compare the base's config with that of every other model, one of transformers among them.

    Raises: InputError if a file is of another layout, or says that its weights are another function than is built.
    """
    check_configs(config)
    for path in filter(of_transformers, other_models(config).values()):
        ours = facts_of_module(skeleton(config.model).visual, str(config.model.path("base")))
        theirs = facts_of_config(image_config(path).resolved, processor_folder(path))
        require_same_facts(ours, theirs, path)
    if config.model.arch or clip_file(config.model.path("base")):
        known = skeleton(config.model).state_dict()
        warn_of_unmerged(config.model, family(config.model), known, other_models(config))


def architecture(model: Model) -> str:
    """The name by which open_clip knows the architecture; InputError if neither the config nor the base tells it."""
    if model.arch:
        return model.arch
    file = clip_file(model.path("base"))
    if file:
        return f"local-dir:{file.parent}"
    raise InputError(
        f"{model.path('base')} holds no open_clip_config.json; model.arch can name it, as in ViT-B-32-quickgelu"
    )


@cached_by_files
def skeleton(model: Model, device: str = "meta") -> nn.Module:
    """The CLIP model without its weights; on the meta device it takes no memory."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # open_clip warns that the weights are random
    try:
        with torch.device(device):
            named = {"force_preprocess_cfg": preprocess_of(model)} if model.arch else {}
            clip = open_clip.create_model(architecture(model), load_weights=False, device=device, **named).eval()
    except InputError:
        raise
    except Exception as error:  # whatever open_clip makes of a config
        file = clip_file(model.path("base"))
        where = f"model.arch {model.arch!r}" if model.arch or not file else str(file)
        raise InputError(f"open_clip cannot build {where}: {' '.join(str(error).split())}") from error
    finally:
        logging.root.setLevel(level)
    trunk = getattr(clip.visual, "trunk", None)
    if not isinstance(clip.visual, VisionTransformer) and not isinstance(getattr(trunk, "blocks", None), nn.Sequential):
        whose, tower = ("timm", trunk) if trunk else ("open_clip", clip.visual)
        raise InputError(
            f"the image tower of {architecture(model)} is {whose}'s {type(tower).__name__}; vision anchors the blocks "
            "of open_clip's VisionTransformer, visual.transformer.resblocks, and of a ViT of timm whose blocks, "
            "visual.trunk.blocks, are called with the tokens alone"
        )
    return clip


@cached_by_files
def token_shape(model: Model) -> tuple[int, int]:
    """Tokens and width that a block of the image tower sees."""
    visual, blocks = skeleton(model).visual, family(model).blocks
    size = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
    try:
        return first_input(skeleton(model).get_submodule(f"{blocks}.0"), visual, size)
    except Exception as error:  # timm's towers have a size of their own, which an assertion tells
        said = f"{architecture(model)}: its image tower cannot see images of {size[0]} x {size[1]} pixels"
        raise InputError(f"{said}, the image_size of its config: {' '.join(str(error).split())}") from error


def text_checkpoint(model: Model) -> Checkpoint:
    """The checkpoint that has the text tower: the base, or what model.text names."""
    wanted = [name for name in skeleton(model).state_dict() if not name.startswith(IMAGE_TOWER)]
    tried = []
    for which in ("base", "text"):
        if getattr(model, which):
            checkpoint = Checkpoint(model.path(which))
            missing = [name for name in wanted if name not in checkpoint.shapes]
            if not missing:
                return checkpoint
            tried.append(f"{checkpoint.path} lacks {missing[0]}")
    raise InputError(f"no text tower: {'; '.join(tried)}; model.text can name a checkpoint of the whole CLIP model")


def text_directions(model: Model, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The mean direction of the prompts of each class, normalised and scaled by the logit scale: (classes, embedding).

    Every class name fills all templates; the normalised text embeddings are averaged and normalised again (Radford et
    al. 2021).
    """
    text = text_checkpoint(model)
    clip = skeleton(model, "cpu")
    clip.load_state_dict(text.read(n for n in text.shapes if not n.startswith(IMAGE_TOWER)), strict=False)
    filled = [lambda c, t=t: t.replace("{c}", c) for t in templates]
    tokenizer = open_clip.get_tokenizer(architecture(model))
    with torch.no_grad():
        directions = open_clip.build_zero_shot_classifier(clip, tokenizer, classes, filled)
        return directions.T * clip.logit_scale.exp()


def preprocessing(config: Config, task: str) -> Pixels:
    """From records with an image each to what the image tower sees of them."""
    preprocess = image_transform_v2(PreprocessCfg(**skeleton(config.model).visual.preprocess_cfg), is_train=False)
    return lambda rows: {"pixel_values": torch.stack([preprocess(row["image"]) for row in rows])}


class Tower(nn.Module):
    """An image tower without weights; its tensors have the names of the checkpoint."""

    def __init__(self, model: Model):
        super().__init__()
        self.visual = deepcopy(skeleton(model).visual)

    def forward(self, pixel_values: Tensor) -> Tensor:
        seen = self.visual(pixel_values)
        return seen[0] if isinstance(seen, tuple) else seen  # CoCa's gives the tokens besides, for its decoder


def classifier(config: Config, task: str) -> Headed:
    """The image tower without weights under the head of a task."""
    found = Classifier(Tower(config.model), head_of(config.model, task, text_directions))
    return Headed(found, "", [found.head])


def check_export(model: Model) -> None:
    """InputError if a merged model could not be written because no text tower is at hand."""
    text_checkpoint(model)


def export(model: Model, tensors: Mapping[str, LazyTensor], folder: Path) -> None:
    """Write a merged model that stock open_clip opens as local-dir:FOLDER, the text tower included."""
    names, text, base = skeleton(model).state_dict(), text_checkpoint(model), Checkpoint(model.path("base"))
    image = {name: tensor for name, tensor in tensors.items() if name in names}
    rest = text.lazy(name for name in names if not name.startswith(IMAGE_TOWER))
    dtype = output_type(base, {})
    surroundings = config_text(model, skeleton(model).visual.preprocess_cfg)
    stored = as_stored(image, dtype, base) | as_stored(rest, dtype, text)
    require_names(stored, names, folder / "open_clip_model.safetensors")
    write_stored(folder / "open_clip_model.safetensors", stored)
    write_text(folder / "open_clip_config.json", surroundings)  # a weight that is refused leaves nothing
    if text.path.is_dir():
        copy_surroundings(text.path, folder)
