"""Text encoders: where their blocks are, and how a folder of Hugging Face becomes a model without weights.

Every name of a tensor here is that of the bare encoder, as stock AutoModel has it: embeddings.…, encoder.layer.0.…
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from common.config import Config, Model
from common.core.blocks import BlockFamily
from common.core.errors import InputError
from common.domain import other_models
from common.io.lineage import compare_models
from common.io.model_config import CONFIG_FILE, config_file, known_config, read_config, require_family, resolve

POOLER = "pooler."


def config_of(model: Model, path: Path) -> Path:
    """The config.json beside a model's weights; InputError if there is none, or if it is of another family."""
    file = config_file(path)
    if not file:
        raise InputError(f"{path} holds no {CONFIG_FILE}; a folder as save_pretrained writes it is needed")
    require_family(read_config(file), str(file), model.family)
    return file


def architecture(model: Model, path: Path) -> PretrainedConfig:
    """The config of a model of the family; no code that it names is ever run."""
    file = config_of(model, path)
    return known_config(read_config(file), str(file))


def check_inputs(config: Config) -> None:
    """Compare the base's config with that of every expert and of a start made elsewhere.

    Raises: InputError if one of them is another function of equal weights.
    """
    model, file = config.model, config_of(config.model, config.model.path("base"))
    base = resolve(read_config(file), str(file))
    compare_models(model.path("base"), base, other_models(config), COMPUTING.get(base.model_type or "", frozenset()))


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

    Merged are the embeddings and the blocks; a head is a task's own, and so is the pooler before it. The key bias has a
    tensor to itself.
    """

    def name_of(stored: str) -> str | None:
        name = stored.removeprefix(f"{prefix}.")
        if not name.startswith(("embeddings", "encoder.", POOLER)) or name.endswith("_ids"):
            return None
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")

    return BlockFamily(
        blocks="encoder.layer",
        call=call_layer,
        names=name_of,
        before_head=POOLER,
        null_gradients={"attention.self.key.bias": (0, 1)},
        positions="embeddings.position_embeddings.weight",
    )


def family(model: Model) -> BlockFamily:
    """The blocks of the base's encoder; InputError if it is of an architecture without an entry here."""
    file = config_of(model, model.path("base"))
    found = read_config(file)["model_type"]
    if found not in FAMILIES:
        raise InputError(
            f"{file} has model type {found!r}; of text encoders those of {', '.join(FAMILIES)} are anchored"
        )
    return FAMILIES[found]


def body_name(model: Model) -> Callable[[str], str | None]:
    """From a stored name to that of the encoder without its pooler: what a classifier takes from a merged model."""

    def name_of(stored: str) -> str | None:
        name = family(model).names(stored)
        return None if name is None or name.startswith(POOLER) else name

    return name_of


# XLM-R and CamemBERT are RoBERTa with another vocabulary.
ROBERTA = encoder("roberta")
FAMILIES = {
    "roberta": ROBERTA,
    "bert": encoder("bert"),
    "electra": encoder("electra"),
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
}
# Positions are counted from the number of the padding token on.
COMPUTING = dict.fromkeys(("roberta", "xlm-roberta", "camembert"), frozenset({"pad_token_id"}))
