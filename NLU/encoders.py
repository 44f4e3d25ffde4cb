"""Text encoders: where their blocks are, and how a folder of Hugging Face becomes a model without weights.

Every name of a tensor here is that of the bare encoder, as stock AutoModel has it: embeddings.…, encoder.layer.0.…
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from common.config import Model
from common.core.blocks import BlockFamily
from common.core.errors import InputError


def architecture(model: Model, folder: Path) -> PretrainedConfig:
    """The config.json of a Hugging Face folder of the family, else InputError; no code beside it is ever run."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json; a folder as save_pretrained writes it is needed")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/config.json is of no use: {error}") from error
    if config.model_type != model.family_of(FAMILIES):
        raise InputError(
            f"{folder} has model type {config.model_type!r}, model.family is {model.family_of(FAMILIES)!r}"
        )
    return config


@cache
def skeleton(model: Model) -> PreTrainedModel:
    """The bare encoder of the base without its weights, on the meta device.

    Attention is the plain formula: the fused kernels have no second derivative.
    """
    for name in ("arch", "text", "head"):
        if getattr(model, name):
            raise InputError(f"model.{name} is not for nlu: the folders of base and experts tell everything")
    config = architecture(model, model.path("base"))
    with torch.device("meta"):
        return AutoModel.from_config(config, attn_implementation="eager", trust_remote_code=False).eval()


def token_shape(model: Model) -> tuple[int, int]:
    """Tokens of an anchor as published, and the width of the encoder."""
    return 5, skeleton(model).config.hidden_size


def call_layer(layer: nn.Module, x_ATD: Tensor) -> Tensor:
    """An encoder layer without a mask; releases of transformers differ in whether they wrap the output in a tuple."""
    y = layer(x_ATD)
    return y[0] if isinstance(y, tuple) else y


def encoder(prefix: str) -> BlockFamily:
    """An encoder laid out like BERT, which a masked language model or a classifier keeps under `prefix`.

    Merged are the embeddings and the blocks; pooler and heads are a task's own. The key bias has a tensor to itself.
    """

    def name_of(stored: str) -> str | None:
        name = stored.removeprefix(f"{prefix}.")
        if not name.startswith(("embeddings", "encoder.")) or name.endswith("_ids"):
            return None
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")

    return BlockFamily(
        blocks="encoder.layer",
        call=call_layer,
        names=name_of,
        null_gradients={"attention.self.key.bias": (0, 1)},
        positions="embeddings.position_embeddings.weight",
    )


FAMILIES = {"roberta": encoder("roberta"), "bert": encoder("bert"), "electra": encoder("electra")}
