"""ViTs of transformers with a classifier for each task: how one is opened, and what is anchored of it.

A base is a backbone, or a classifier of another task, whose head is left out. Merged is the backbone; a task's head is
its expert's own, and so is the pooler, which classifiers do without. Names of tensors are those of the bare backbone's
module: checkpoints have them under others, see `names_within` and `stored_parts`.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from common.config import Config, Model
from common.core.blocks import BlockFamily, call_alone, key_biases
from common.core.errors import InputError
from common.domain import other_models
from common.io.cached import cached_by_files
from common.io.lineage import compare_models
from common.io.model_config import known_config, require_family, resolve
from common.io.model_files import CONFIG_FILE
from common.io.skeleton import first_input, layers_of, names_in_body, renamed_pieces, stored_parts, stored_path
from common.io.task_heads import refuse_copies
from Vision.hf_files import CLASSIFIERS, own_config, prepared_size, preprocessing, processor_folder

POOLER = "pooler."
MASK = "embeddings.mask_token"  # which pretraining puts in the place of patches, and nothing else uses


def architecture(model: Model, path: Path) -> PretrainedConfig:
    """The config of a model of the family; no code that it names is ever run."""
    file, fields = own_config(path, CLASSIFIERS)
    require_family(fields, str(file), model.family)
    config = known_config(fields, str(file))
    config.architectures = config.architectures or []
    return config


def check_inputs(config: Config) -> None:
    """Compare the base's config with that of every expert and of a start made elsewhere, and look how each prepares an
    image.

    Raises: InputError if one of them is another function of equal weights, or prepares images that it cannot see.
    """
    model = config.model
    if model.text:
        raise InputError("model.text is not for classifiers: each task's head is its expert's")
    base = model.path("base")
    file, fields = own_config(base, CLASSIFIERS)
    require_family(fields, str(file), model.family)
    compare_models(base, resolve(fields, str(file)), other_models(config))
    root = skeleton(model)
    names, known, blocks = names_within(root), stored_parts(root), stored_path(root, layers_of(root))
    for path in (base, *other_models(config).values()):
        refuse_copies(path, names, known, blocks)
        folder = processor_folder(path)
        if folder:
            tokens_of(model, folder)


@cached_by_files
def skeleton(model: Model) -> PreTrainedModel:
    """The bare backbone of the base without its weights, on the meta device; attention by the plain formula, which has
    a second derivative."""
    path = model.path("base")
    try:
        with torch.device("meta"):
            return AutoModel.from_config(architecture(model, path), attn_implementation="eager").eval()
    except InputError:
        raise
    except Exception as error:  # sizes below zero: whatever its layers raise
        said = " ".join(str(error).split())
        raise InputError(f"transformers cannot build the model of {path / CONFIG_FILE}: {said}") from error


@cached_by_files
def family(model: Model) -> BlockFamily:
    """The layers of the backbone. Keys have a bias of their own, which no input moves."""
    root = skeleton(model)
    path = layers_of(root)
    return BlockFamily(
        blocks=path,
        call=call_alone,
        names=names_within(root),
        before_head=POOLER,
        null_gradients=key_biases(root.get_submodule(f"{path}.0")),
        pieces=renamed_pieces(stored_parts(root)),
    )


def names_within(root: PreTrainedModel) -> Callable[[str], str | None]:
    """From the name of any tensor of a backbone or classifier to that in the file of the bare backbone; None for what
    lies in no part of it: a head, and what pretraining alone uses."""
    in_body, is_masked = names_in_body(root), MASK in stored_parts(root)

    def name_of(stored: str) -> str | None:
        name = in_body(stored)
        return None if name == MASK and not is_masked else name

    return name_of


@cached_by_files
def token_shape(model: Model) -> tuple[int, int]:
    """Tokens and width that a layer sees, of an image as the files beside the base prepare it, or of the size that its
    config says."""
    folder = processor_folder(model.path("base"))
    return tokens_of(model, folder) if folder else seen_of(model, skeleton(model).config.image_size)


def tokens_of(model: Model, folder: Path) -> tuple[int, int]:
    """Tokens and width that a layer sees of an image as a folder's files prepare it; InputError if none can be seen."""
    size = prepared_size(preprocessing(folder))
    try:
        return seen_of(model, size)
    except ValueError as error:
        raise InputError(f"{folder}: images are prepared as {size[0]} x {size[1]} pixels: {error}") from error


def seen_of(model: Model, size: int | tuple[int, int]) -> tuple[int, int]:
    """Tokens and width that a layer sees of an image of so many pixels."""
    root, path = skeleton(model), family(model).blocks
    return first_input(root.get_submodule(f"{path}.0"), root, (size, size) if isinstance(size, int) else tuple(size))
