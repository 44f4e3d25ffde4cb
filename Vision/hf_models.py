"""CLIPs and SigLIPs of transformers: how one is opened, what is anchored of it, and how a merged one is written.

A base is a folder of the whole model, or of its image tower alone, with model.text for the rest; experts are either.
Names of tensors are those of the whole model: vision_model.encoder.layers.0.…
"""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedModel

from common.config import Config, Model
from common.core.blocks import BlockFamily, call_alone, key_biases
from common.core.errors import InputError
from common.core.notices import warn
from common.domain import other_models
from common.io.adapters import is_adapter
from common.io.checkpoints import Checkpoint, copy_files
from common.io.hub import is_stand_in
from common.io.lineage import check_lineage
from common.io.lora import open_checkpoint
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
    resolve,
)
from common.io.shards import write_stream
from common.io.skeleton import first_input, layers_of
from common.io.stored_types import as_stored, output_type
from common.io.surroundings import copy_tokenizer, write_edited

IMAGE_TOWER = "vision_model."
KINDS = ("clip", "siglip", "siglip2", "metaclip_2")  # two towers, the image's called vision_model
PROJECTION = "visual_projection.weight"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def own_config(path: Path) -> tuple[Path, dict[str, Any]]:
    """The config.json of a model and its fields; InputError if it is of no architecture that is served."""
    file = config_file(path)
    if not file:
        raise InputError(f"{path} holds no config.json; a folder as save_pretrained writes it is needed")
    fields = read_config(file)
    if not is_served(path):
        raise InputError(
            f"{file} has model type {fields.get('model_type')!r}; vision merges the image towers of open_clip, and of "
            f"transformers those of {', '.join(KINDS)}"
        )
    return file, fields


def is_served(path: Path) -> bool:
    """Whether the config beside a model names an architecture that is served."""
    file = config_file(path)
    kind = read_config(file).get("model_type") if file else None
    return str(kind).removesuffix("_vision_model") in KINDS


def image_config(path: Path) -> ModelConfig:
    """The config of a model's image tower, whether it is saved alone or with a text tower."""
    file, fields = own_config(path)
    kind = fields["model_type"].removesuffix("_vision_model")
    tower = fields if kind != fields["model_type"] else fields.get("vision_config") or {}
    return resolve(tower | {"model_type": f"{kind}_vision_model"}, str(file))


def check_inputs(config: Config) -> None:
    """Compare the config of the base's image tower with that of every other model.

    Raises: InputError if one of them is another function of equal weights.
    """
    path = config.model.path("base")
    file, fields = own_config(path)
    require_family(fields, str(file), config.model.family)
    base = image_config(path)
    for task, other in other_models(config).items():
        if is_adapter(other):
            check_lineage(other, path, base)
        elif config_file(other):
            harmless = require_same_function(base, image_config(other)) - {"architectures", "dtype"}
            if harmless:  # which towers alone and whole models always differ in
                said = ", ".join(sorted(harmless))
                warn(f"config.json of {task} differs from the base's in what changes no weight's work: {said}")
            check_projection(config.model, other)


def check_projection(model: Model, other: Path) -> None:
    """InputError if another model brings a projection of its own behind the tower, which is never merged."""
    theirs = Checkpoint(other, family(model).names)
    if PROJECTION not in theirs.shapes or is_stand_in(other):
        return
    ours = text_checkpoint(model)
    if not torch.equal(theirs.read([PROJECTION])[PROJECTION], ours.read([PROJECTION])[PROJECTION]):
        raise InputError(
            f"{other}: {PROJECTION} is not that of {ours.path}; the image tower alone is merged, and would answer "
            "through the latter: take experts whose projection was frozen"
        )


@cache
def skeleton(model: Model) -> PreTrainedModel:
    """The whole model without its weights, on the meta device; attention by the plain formula, which has a second
    derivative. Of a base that is an image tower alone the text tower is that of model.text."""
    path = model.path("base")
    if "vision_model" in own_config(path)[1]["model_type"]:
        if not model.text:
            raise InputError(f"{path} is an image tower alone: model.text must name a folder with the whole model")
        path = model.path("text")
    file, fields = own_config(path)
    try:
        with torch.device("meta"):
            return AutoModel.from_config(known_config(fields, str(file)), attn_implementation="eager").eval()
    except InputError:
        raise
    except Exception as error:  # sizes below zero: whatever its layers raise
        raise InputError(f"transformers cannot build the model of {file}: {' '.join(str(error).split())}") from error


@cache
def family(model: Model) -> BlockFamily:
    """The layers of the image tower. Keys have a bias of their own, which no input moves."""
    tower = skeleton(model).vision_model
    path = layers_of(tower)
    return BlockFamily(
        blocks=f"{IMAGE_TOWER}{path}",
        call=call_alone,
        names=names_of(tower),
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


@cache
def token_shape(model: Model) -> tuple[int, int]:
    """Tokens and width that a layer sees, of an image of the size that the config says."""
    tower = skeleton(model).vision_model
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


def preprocessing(model: Model) -> Callable[[list[dict]], Tensor]:
    """From records with an image each to what the image tower sees of them, as the files beside the base say."""
    for which in ("base", "text"):
        folder = model.path(which)
        if getattr(model, which) and any((folder / name).is_file() for name in PROCESSORS):
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return lambda rows: processor([r["image"].convert("RGB") for r in rows], return_tensors="pt").pixel_values
    raise InputError(f"{model.path('base')} holds no {PROCESSORS[0]}, which says how an image is prepared")


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

    def forward(self, images: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(images).pooler_output)


def image_tower(model: Model, path: Path) -> nn.Module:
    """The image tower with the weights of one checkpoint."""
    tower, names = Tower(model), family(model).names
    weights = open_checkpoint(path, model.path("base"), names).read_under(IMAGE_TOWER)
    tower.vision_model.load_state_dict(weights, strict=False, assign=True)
    return tower


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


def export(model: Model, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write a merged model that stock transformers opens, the text tower included."""
    text, base = text_checkpoint(model), Checkpoint(model.path("base"), family(model).names)
    source = text.folder
    written = read_text(config_file(source) or source / "config.json")
    dtype = output_type(base, read_config(source / "config.json"))
    names = skeleton(model).state_dict()
    image = ((name, tensor) for name, tensor in tensors if name.startswith(IMAGE_TOWER))
    others = [name for name in text.names() if name in names and not name.startswith(IMAGE_TOWER)]
    rest = ((name, text.read([name])[name]) for name in others)
    write_stream(folder / "model.safetensors", chain(as_stored(image, dtype, base), as_stored(rest, dtype, text)))
    changes = dtype_field(parse(written, "config.json"), str(dtype).removeprefix("torch."))
    write_edited(written, folder / "config.json", changes)
    copy_tokenizer(source, folder)
    copy_files(source, folder, PROCESSORS)
    if source != model.path("base"):
        copy_files(model.path("base"), folder, PROCESSORS)
