"""What the project knows about causal language models: their blocks, how a model is opened and written, its test sets.

What is anchored is the MLP of each decoder layer, which sees one token at a time; all else is merged in weight space.
"""

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from common.config import Model
from common.core.blocks import BlockFamily
from common.core.errors import InputError
from common.io.checkpoints import copy_files, opened, weight_files, write_text
from common.io.shards import publish_shards, stage_shards
from NLG.generation import VOCABULARIES
from NLG.scoring import TASKS, metric, score

__all__ = [
    "FAMILIES",
    "NAME",
    "PERCENT",
    "TASKS",
    "check_export",
    "export",
    "metric",
    "score",
    "skeleton",
    "token_shape",
]
NAME = "nlg"
PERCENT = False  # tables print fractions
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)


def architecture(model: Model) -> PretrainedConfig:
    """The config.json beside the base's weights, or what model.arch says where there is none; no code is ever run.

    InputError if there is neither, or if it is of another family.
    """
    file = model.path("base") / "config.json"
    if not file.is_file() and not model.arch:
        raise InputError(f"there is no {file}, and model.arch does not give its text")
    where = str(file) if file.is_file() else "model.arch"
    try:
        fields = json.loads(file.read_text() if file.is_file() else model.arch)
        config = AutoConfig.for_model(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{where} is no config of a model that transformers knows: {error}") from error
    if config.model_type != model.family_of(FAMILIES):
        raise InputError(f"{where} has model type {config.model_type!r}, model.family is {model.family_of(FAMILIES)!r}")
    return config


@cache
def skeleton(model: Model) -> nn.Module:
    """The base without its weights, on the meta device."""
    for name in ("text", "head"):
        if getattr(model, name):
            raise InputError(f"model.{name} is for vision; here the folders of base and experts tell everything")
    config = architecture(model)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()


def token_shape(model: Model) -> tuple[int, int]:
    """One token and the width of the model: an MLP sees every token alone."""
    return 1, architecture(model).hidden_size


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


EMBEDDING = "model.embed_tokens.weight"


def name_of(stored: str) -> str | None:
    """Old checkpoints keep the rotary frequencies, which follow from the config and are no weights."""
    return None if stored.endswith("rotary_emb.inv_freq") else stored


# In every one the MLP is down(act(gate(x)) * up(x)); the activation, SiLU or GELU, comes with the config.
DECODER = BlockFamily(
    blocks="model.layers",
    part="mlp",
    names=name_of,
    published_axes="AD",
    vocabulary=(EMBEDDING, "lm_head.weight"),
)
FAMILIES = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), DECODER)
