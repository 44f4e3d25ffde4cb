"""What lies beside the weights of vision models of transformers: their configs, and how they prepare an image."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from common.core.errors import InputError, in_short
from common.io.model_config import ModelConfig, config_file, read_config, resolve
from common.io.model_files import folder_of
from common.io.tokenizer_files import contents

TWO_TOWERS = ("clip", "siglip", "siglip2", "metaclip_2")  # the image's is called vision_model
CLASSIFIERS = ("vit", "deit", "dinov2", "dinov2_with_registers")  # a backbone, and a head for each task
LEVEL = 0.04  # of a prepared image: what two ways to compute one interpolation differ by at most
BLANK = Image.fromarray(np.zeros((48, 64, 3), dtype=np.uint8))
PROBE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (48, 64, 3), dtype=np.uint8))
PROCESSORS = ("preprocessor_config.json", "processor_config.json")

Pixels = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]
"""pixels(records with an image in RGB each) -> what a model is called with: pixel_values, (images, channels, height,
width); SigLIP 2 has patches in their place, (images, patches, numbers), and their grids and mask besides."""


def kind_of(path: Path) -> str:
    """The architecture that the config beside a model names, "" if there is none; an image tower's is the model's."""
    file = config_file(path)
    return str((read_config(file) if file else {}).get("model_type") or "").removesuffix("_vision_model")


def own_config(path: Path, kinds: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """The config.json of a model and its fields; InputError if there is none, or it is of none of the architectures."""
    file = config_file(path)
    if not file:
        raise InputError(f"{path} holds no config.json; a folder as save_pretrained writes it is needed")
    fields = read_config(file)
    if kind_of(path) not in kinds:
        raise InputError(
            f"{file} has model type {fields.get('model_type')!r}; vision merges the image towers of open_clip, and of "
            f"transformers {', '.join((*TWO_TOWERS, *CLASSIFIERS))}; models that are merged are of one kind"
        )
    return file, fields


def image_config(path: Path) -> ModelConfig:
    """The config of a model's image tower, whether it is saved alone or with a text tower.

    Without the width of a projection: of a whole model another field says it, and a tower alone may have none.
    """
    file, fields = own_config(path, TWO_TOWERS)
    kind = fields["model_type"].removesuffix("_vision_model")
    tower = fields if kind != fields["model_type"] else fields.get("vision_config") or {}
    fields = {key: value for key, value in tower.items() if key != "projection_dim"}
    return resolve(fields | {"model_type": f"{kind}_vision_model"}, str(file))


def processor_folder(*paths: Path) -> Path | None:
    """The first folder of some models that says how an image is prepared."""
    return next(
        (folder for folder in map(folder_of, paths) if any((folder / name).is_file() for name in PROCESSORS)), None
    )


def preprocessing(*paths: Path) -> Pixels:
    """From records with an image each to what a model sees of them, as the files beside the first of the models say
    that has any. InputError if none has."""
    folder = processor_folder(*paths)
    if folder is None:
        raise InputError(f"{' and '.join(map(str, paths))}: no {PROCESSORS[0]}, which says how an image is prepared")
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the class of a processor makes of any value
        said = " ".join(str(error).split())
        raise InputError(f"{folder}: transformers cannot read how an image is prepared: {said}") from error
    return lambda rows: processor([row["image"] for row in rows], return_tensors="pt").data


def prepared_size(pixels: Pixels) -> tuple[int, int]:
    """Height and width of what a model sees of an image."""
    return tuple(pixels([{"image": BLANK}])["pixel_values"].shape[-2:])


def require_same_preprocessing(bases: Sequence[Path], others: Iterable[Path]) -> None:
    """InputError if the files beside a model prepare an image otherwise than those beside the first of `bases` that has
    any, or beside the first of the models where the base says nothing. A model without such files goes with these."""
    folders = {path: folder for path in others if (folder := processor_folder(path))}
    base = processor_folder(*bases)
    first = base or next(iter(folders.values()), None)
    for path, folder in folders.items():
        said = unlike_preparation(folder, first) if first else ""
        if said and base:
            raise InputError(
                f"{path} prepares an image otherwise than {base} ({said}): the merged model sees images as the latter "
                "says, for which these weights are not made; merge models of one base, or correct the file that is "
                "wrong"
            )
        if said:
            raise InputError(
                f"{path} prepares an image otherwise than {first} ({said}), and no {PROCESSORS[0]} beside the base "
                "says how it is done: one merged model sees images in one way; merge models that see them alike, or "
                "correct the file that is wrong"
            )


def unlike_preparation(own: Path, other: Path) -> str:
    """In what the files of a folder prepare an image otherwise than those of another; "" if they do not."""
    if own == other or contents(own, PROCESSORS) == contents(other, PROCESSORS):
        return ""
    theirs, ours = (preprocessing(folder)([{"image": PROBE}]) for folder in (own, other))
    shapes = [{name: tuple(x.shape) for name, x in made.items()} for made in (theirs, ours)]
    if shapes[0] == shapes[1] and all(((x - ours[name]).abs() <= LEVEL).all() for name, x in theirs.items()):
        return ""
    fields, others = (processor_fields(folder) for folder in (own, other))
    unlike = [key for key in {**fields, **others} if fields.get(key) != others.get(key)]
    return "; ".join(in_short(f"{key} is {fields.get(key)!r}, there {others.get(key)!r}" for key in unlike))


def processor_fields(folder: Path) -> dict[str, Any]:
    """What the first of the files in a folder says of how an image is prepared, names of classes left out."""
    fields = read_config(next(folder / name for name in PROCESSORS if (folder / name).is_file()))
    fields = fields.get("image_processor", fields)
    return {key: value for key, value in fields.items() if not key.endswith(("_type", "_class"))}
