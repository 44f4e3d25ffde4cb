"""CLIPs and SigLIPs of transformers: how one is opened, what is anchored of it, and how a merged one is written.

A base is a folder of the whole model, or of its image tower alone, with model.text for the rest; experts are either.
Names of tensors are those of the whole model: vision_model.encoder.layers.0.…
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from common.config import Config, Model
from common.core.blocks import BlockFamily, call_alone, key_biases, no_pieces
from common.core.errors import InputError
from common.core.notices import warn
from common.core.task_vectors import LazyTensor
from common.domain import other_models
from common.io.adapters import is_adapter
from common.io.cached import cached_by_files
from common.io.checkpoints import Checkpoint
from common.io.lineage import check_lineage
from common.io.model_config import (
    ModelConfig,
    config_file,
    dtype_field,
    known_config,
    parse,
    read_config,
    read_text,
    require_family,
    require_same_function,
)
from common.io.model_files import CONFIG_FILE
from common.io.shards import write_stored
from common.io.skeleton import first_input, layers_of
from common.io.stored_types import as_stored, output_type
from common.io.surroundings import copy_settings, copy_surroundings, write_edited
from Vision.clip_config import clip_file
from Vision.hf_files import (
    BLANK,
    PROCESSORS,
    TWO_TOWERS,
    Pixels,
    image_config,
    own_config,
    processor_folder,
    require_same_preprocessing,
)
from Vision.hf_files import preprocessing as preprocessing_of
from Vision.layouts import facts_of_config, facts_of_module, in_transformers, pieces_in_transformers, require_same_facts
from Vision.open_clip_models import skeleton as open_clip_skeleton
from Vision.tasks import Headed
from Vision.unmerged import check_projection, warn_of_unmerged
from Vision.zero_shot import Classifier, head_of, refuse_heads

IMAGE_TOWER = "vision_model."


def check_inputs(config: Config) -> None:
    """Compare the config of the base's image tower with that of every other model.

    Raises: InputError if one of them is another function of equal weights.
    """
    refuse_heads(config.model)
    path = config.model.path("base")
    file, fields = own_config(path, TWO_TOWERS)
    require_family(fields, str(file), config.model.family)
    base = image_config(path)
    for task, other in other_models(config).items():
        if is_adapter(other):
            check_lineage(other, path, base)
        elif clip_file(other):
            check_open_clip(config.model, base, other)
        elif config_file(other):
            harmless = require_same_function(base, image_config(other)) - {"architectures", "dtype"}
            if harmless:  # which towers alone and whole models always differ in
                said = ", ".join(sorted(harmless))
                warn(f"config.json of {task} differs from the base's in what changes no weight's work: {said}")
        check_projection(path, family(config.model), partial(text_checkpoint, config.model), other)
    whole = [other for other in other_models(config).values() if not is_adapter(other)]
    require_same_preprocessing(processors(config.model), whole)
    warn_of_unmerged(config.model, family(config.model), skeleton(config.model).state_dict(), other_models(config))


def check_open_clip(model: Model, base: ModelConfig, other: Path) -> None:
    """InputError if a model of open_clip is another function of the weights of the base, a CLIPModel with this config,
    or of images."""
    if base.model_type != "clip_vision_model":
        raise InputError(f"{other} is of open_clip, where a CLIPModel alone has a counterpart, no {base.model_type}")
    visual = open_clip_skeleton(Model(base=str(other.absolute()))).visual
    ours = facts_of_config(base.resolved, processor_folder(*processors(model)))
    require_same_facts(ours, facts_of_module(visual, str(other)), other)


@cached_by_files
def skeleton(model: Model) -> PreTrainedModel:
    """The whole model without its weights, on the meta device; attention by the plain formula, which has a second
    derivative. Of a base that is an image tower alone the text tower is that of model.text."""
    path = model.path("base")
    if "vision_model" in own_config(path, TWO_TOWERS)[1]["model_type"]:
        if not model.text:
            raise InputError(f"{path} is an image tower alone: model.text must name a folder with the whole model")
        path = model.path("text")
    file, fields = own_config(path, TWO_TOWERS)
    try:
        with torch.device("meta"):
            return AutoModel.from_config(known_config(fields, str(file)), attn_implementation="eager").eval()
    except InputError:
        raise
    except Exception as error:  # sizes below zero: whatever its layers raise
        raise InputError(f"transformers cannot build the model of {file}: {' '.join(str(error).split())}") from error


@cached_by_files
def family(model: Model) -> BlockFamily:
    """The layers of the image tower. Keys have a bias of their own, which no input moves."""
    tower = skeleton(model).vision_model
    path, names = layers_of(tower), names_of(tower)
    of_clip = skeleton(model).config.model_type == "clip"  # which open_clip has in a layout of its own
    return BlockFamily(
        blocks=f"{IMAGE_TOWER}{path}",
        call=call_alone,
        names=(lambda stored: names(in_transformers(stored))) if of_clip else names,
        pieces=pieces_in_transformers if of_clip else no_pieces,
        scope=IMAGE_TOWER,
        null_gradients=key_biases(tower.get_submodule(f"{path}.0")),
        published_axes="ATD",
    )


def names_of(tower: nn.Module) -> Callable[[str], str | None]:
    """From a stored name to that in the whole model: a tower that is saved alone may lack the prefix."""
    children = {name.split(".")[0] for name in tower.state_dict()}

    def name_of(stored: str) -> str | None:
        if stored.endswith("position_ids"):
            return None
        return IMAGE_TOWER + stored if stored.split(".")[0] in children else stored

    return name_of


@cached_by_files
def token_shape(model: Model) -> tuple[int, int]:
    """Tokens and width that a layer sees, of an image of the size that the config says; of one that is cut into patches
    beforehand, as SigLIP 2's is, as many as the files beside the base make."""
    tower = skeleton(model).vision_model
    if "spatial_shapes" in inspect.signature(tower.forward).parameters:
        return prepared(model)([{"image": BLANK}])["pixel_values"].shape[1], tower.config.hidden_size
    return first_input(tower.get_submodule(f"{layers_of(tower)}.0"), tower, (tower.config.image_size,) * 2)


def text_checkpoint(model: Model) -> Checkpoint:
    """The checkpoint that has the text tower: the base, or what model.text names."""
    wanted = [name for name in skeleton(model).state_dict() if not name.startswith(IMAGE_TOWER)]
    tried = []
    for which in ("base", "text"):
        if getattr(model, which):
            checkpoint = Checkpoint(model.path(which), family(model).names)
            missing = [name for name in wanted if name not in checkpoint.shapes and not name.endswith("_ids")]
            if not missing:
                return checkpoint
            tried.append(f"{checkpoint.path} lacks {missing[0]}")
    raise InputError(f"no text tower: {'; '.join(tried)}; model.text can name a folder of the whole model")


@torch.no_grad()
def text_directions(model: Model, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The mean direction of the prompts of each class, normalised and scaled by the logit scale: (classes, embedding).

    SigLIP's logit bias is the same for all classes, and left out.
    """
    text = text_checkpoint(model)
    whole = deepcopy(skeleton(model))
    weights = text.read(name for name in text.shapes if not name.startswith(IMAGE_TOWER))
    whole.load_state_dict(weights, strict=False, assign=True)
    del whole.vision_model
    number_positions(whole)
    tokenizer = AutoTokenizer.from_pretrained(text.folder, local_files_only=True, trust_remote_code=False)
    length = whole.config.text_config.max_position_embeddings
    padding = "max_length" if whole.config.model_type.startswith("siglip") else True  # as SigLIP was trained
    directions = []
    for name in classes:
        prompts = [template.replace("{c}", name) for template in templates]
        tokens = tokenizer(prompts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
        directions.append(F.normalize(F.normalize(pooled(whole.get_text_features(**tokens)), dim=-1).mean(0), dim=-1))
    return torch.stack(directions) * whole.logit_scale.exp()


def pooled(features: Any) -> Tensor:
    """The embedding in what a model's get_…_features gives, which is it or holds it."""
    return features if isinstance(features, Tensor) else features.pooler_output


def preprocessing(config: Config, task: str) -> Pixels:
    """From records with an image each to what the image tower sees of them, as the files beside the base say."""
    return prepared(config.model)


def prepared(model: Model) -> Pixels:
    """The same of a model, for any task."""
    return preprocessing_of(*processors(model))


def processors(model: Model) -> list[Path]:
    """Where the files can be that say how an image is prepared."""
    return [model.path(which) for which in ("base", "text") if getattr(model, which)]


class Tower(nn.Module):
    """An image tower without weights, with its projection if it has one; tensors have the names of the whole model."""

    def __init__(self, model: Model):
        super().__init__()
        whole = skeleton(model)
        self.vision_model = deepcopy(whole.vision_model)
        self.visual_projection = nn.Identity()
        if hasattr(whole, "visual_projection"):
            self.visual_projection = deepcopy(whole.visual_projection)
            weights = text_checkpoint(model).read_under("visual_projection.")
            self.visual_projection.load_state_dict(weights, assign=True)

        number_positions(self)

    def forward(self, **images: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(**images).pooler_output)


def classifier(config: Config, task: str) -> Headed:
    """The image tower without weights under the head of a task."""
    found = Classifier(Tower(config.model), head_of(config.model, task, text_directions))
    return Headed(found, "", [found.head])


def number_positions(module: nn.Module) -> None:
    """Give a module from the meta device its position ids, which are no weights and in no checkpoint."""
    for name, buffer in list(module.named_buffers()):
        part, _, last = name.rpartition(".")
        if buffer.is_meta and last == "position_ids":
            ids = torch.arange(buffer.shape[-1])[None]
            module.get_submodule(part).register_buffer(last, ids, persistent=False)


def check_export(model: Model) -> None:
    """InputError if a merged model could not be written because no text tower is at hand."""
    text_checkpoint(model)


def export(model: Model, tensors: Mapping[str, LazyTensor], folder: Path) -> None:
    """Write a merged model that stock transformers opens, the text tower included."""
    text, base = text_checkpoint(model), Checkpoint(model.path("base"), family(model).names)
    source = text.folder
    written = read_text(config_file(source) or source / CONFIG_FILE)
    dtype = output_type(base, read_config(source / CONFIG_FILE))
    names = skeleton(model).state_dict()
    image = {name: tensor for name, tensor in tensors.items() if name.startswith(IMAGE_TOWER)}
    others = [name for name in text.names() if name in names and not name.startswith(IMAGE_TOWER)]
    stored = as_stored(image, dtype, base) | as_stored(text.lazy(others), dtype, text)
    write_stored(folder / "model.safetensors", stored)
    changes = dtype_field(parse(written, CONFIG_FILE), str(dtype).removeprefix("torch."))
    write_edited(written, folder / CONFIG_FILE, changes)
    copy_surroundings(source, folder)
    if source != base.folder:
        copy_settings(base.folder, folder, PROCESSORS)
