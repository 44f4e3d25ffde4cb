"""How a merged language model is written: as stock transformers opens it, with the tokenizers that are asked for."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from common.config import Model
from common.core.errors import InputError
from common.io.checkpoints import copy_files, write_text
from common.io.headers import opened
from common.io.model_files import weight_files
from common.io.shards import publish_shards, stage_shards
from NLG.decoders import EMBEDDING, HEAD, architecture, skeleton
from NLG.generation import VOCABULARIES

TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)


def check_export(model: Model) -> None:
    """InputError if a merged model could not be written, or not with the tokenizers asked for."""
    architecture(model)
    for task in model.tokenizers:
        folder = model.path("expert", task)
        if not any((folder / name).is_file() for name in VOCABULARIES):
            raise InputError(f"model.tokenizers names {task}, but {folder} holds none of {', '.join(VOCABULARIES)}")


def export(model: Model, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write a merged model that stock AutoModelForCausalLM opens, a shard at a time; its index is written last.

    The folder has the base's tokenizer. For each of model.tokenizers a folder within it has that expert's, and links to
    the weights: the paper saves the same weights once with each tokenizer.
    """
    dtype = getattr(torch, model.dtype) if model.dtype else stored_dtype(model.path("base"))
    shapes = stage_shards(cast(tensors, dtype), folder)
    config = architecture(model)
    config.architectures, config.dtype = [type(skeleton(model)).__name__], dtype
    config.vocab_size = shapes[EMBEDDING][0]
    if HEAD in shapes:
        config.tie_word_embeddings = False  # though the base's may be: an expert's head can differ from its embedding
    places = {folder: model.path("base")}
    places |= {folder / task: model.path("expert", task) for task in model.tokenizers}
    for place, tokenizer in places.items():
        write_text(place / "config.json", config.to_json_string())
        copy_files(model.path("base"), place, ["generation_config.json"])
        copy_files(tokenizer, place, TOKENIZER_FILES)
    publish_shards(folder)
    for place in list(places)[1:]:
        link_weights(folder, place)


def cast(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors in another type; InputError names one whose values it cannot hold."""
    for name, tensor in tensors:
        stored = tensor.to(dtype)
        if not stored.isfinite().all():
            raise InputError(
                f"{name}: the merged weights reach {tensor.abs().max():.3g}, too much for model.dtype {dtype}"
            )
        del tensor
        yield name, stored
        del stored  # before the next is made


def stored_dtype(path: Path) -> torch.dtype:
    """The type in which a checkpoint keeps its weights: that of its first tensor."""
    with opened(weight_files(path)[0]) as handle:
        return handle.get_tensor(next(iter(handle.keys()))).dtype


def link_weights(folder: Path, place: Path) -> None:
    """Relative links from a folder within `folder` to its weights, in place of what was linked before.

    An index that points to the folder above would do for transformers, but other loaders look for the files themselves.
    """
    for link in place.glob("model*safetensors*"):
        link.unlink()
    for file in sorted(folder.glob("model*safetensors*")):
        try:
            (place / file.name).symlink_to(Path("..") / file.name)
        except OSError as error:
            raise InputError(f"cannot link {place / file.name} to the weights, model.tokenizers: {error}") from error
