"""Text encoders: where their blocks are, and how a folder of Hugging Face becomes a model without weights.

Every name of a tensor here is that of the bare encoder, as stock AutoModel has it: embeddings.…, encoder.layer.0.…
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto as classes
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as WITH_DECODER

from common.config import Config, Model
from common.core.blocks import BlockFamily, by_kind, key_biases
from common.core.errors import InputError
from common.core.notices import warn
from common.domain import other_models
from common.io.adapters import is_adapter
from common.io.cached import cached_by_files
from common.io.checkpoints import Checkpoint
from common.io.layer_calls import LayerCalls, one_line, require_second_derivative
from common.io.lineage import compare_models
from common.io.model_config import config_file, known_config, read_config, require_family, resolve
from common.io.model_files import CONFIG_FILE
from common.io.skeleton import (
    computing,
    counts_from_padding,
    layers_of,
    names_in_body,
    not_by_rows,
    renamed_pieces,
    stored_parts,
    stored_path,
    stored_shapes,
    token_axes,
    turned_weights,
)
from common.io.task_heads import refuse_copies
from common.io.tokenizer_rules import warn_of_reading
from NLU.encoder_decoders import (
    UNSCORED,
    UNSERVED,
    check_encoder_decoder,
    copies_of,
    encoder_decoder,
    require_equal_copies,
    without,
)

POOLER = "pooler."
WITH_WORDS = frozenset((
    *classes.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values(), *classes.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    *classes.MODEL_FOR_PRETRAINING_MAPPING_NAMES.values(),
))  # fmt: skip
OTHERS = "take models of an architecture that NLU/README.md lists"


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
    root = skeleton(model)
    compare_models(model.path("base"), base, other_models(config), computing(root))
    experts = {task: path for task, path in other_models(config).items() if task in config.tasks}
    warn_of_reading(model.path("base"), experts, model.heads, "model.heads")
    if is_encoder_decoder(root):
        check_encoder_decoder(config, root, str(file))
    else:
        if config.run.score:
            require_classifiers(model)
        names, known, blocks = names_within(root), stored_shapes(root), stored_path(root, layers_of(root))
        for path in (model.path("base"), *other_models(config).values()):
            refuse_copies(path, names, known, blocks)
            if copies_of(root) and not is_adapter(path):
                require_equal_copies(Checkpoint(path, names), root)
        warn_of_word_heads(config)


def warn_of_word_heads(config: Config) -> None:
    """Say that models with a head over words, or of pretraining, lose it, if base and experts are all such."""
    files = map(config_file, (config.model.path("base"), *other_models(config).values()))
    named = {name for file in files if file for name in read_config(file).get("architectures") or [""]}
    if named and named <= WITH_WORDS:
        warn(
            f"base and experts are language models ({', '.join(sorted(named))}), of which the encoder alone is merged: "
            "stock transformers would draw a head over words at random, so give the merged model the base's"
        )


def positions_of(root: PreTrainedModel) -> int | float:
    """How many tokens an encoder has positions for: those behind that of the padding token where it numbers them from
    there. Infinity where its config names no number."""
    positions = getattr(root.config, "max_position_embeddings", None) or math.inf
    return positions - root.config.pad_token_id - 1 if counts_from_padding(root) else positions


@cached_by_files
def skeleton(model: Model) -> PreTrainedModel:
    """The bare encoder of the base without its weights, on the meta device; of an encoder-decoder the whole model.

    Attention is the plain formula: the fused kernels have no second derivative.
    """
    for name in ("arch", "text", "head"):
        if getattr(model, name):
            raise InputError(f"model.{name} is not for nlu: the folders of base and experts tell everything")
    config, file = architecture(model, model.path("base")), str(config_of(model, model.path("base")))
    opener = opener_of(config)
    if type(config) not in opener._model_mapping:
        named = (config.architectures or [config.model_type])[0]
        raise InputError(f"{file}: nlu cannot merge a {named}, for {opener.__name__} opens none such; {OTHERS}")
    try:
        with torch.device("meta"):
            root = opener.from_config(config, attn_implementation="eager", trust_remote_code=False).eval()
    except Exception as error:  # sizes below zero, an activation that is none, a library that is not there
        raise InputError(f"transformers cannot build the model of {file}: {one_line(error)}") from error
    require_text_model(root, file)
    return root


def require_text_model(root: PreTrainedModel, where: str) -> None:
    """InputError, which begins with `where`, if a model has not one embedding of its inputs or not one width: it hears,
    reads characters, or is made of two models; or if an encoder is stored otherwise than by the rows of its tensors."""
    try:
        embedding = root.get_input_embeddings()
    except NotImplementedError:  # none that transformers finds
        embedding = None
    kind = type(root).__name__
    if all(part is not embedding for part in root.modules()):
        raise InputError(f"{where}: nlu cannot merge a {kind}, which has no one embedding of its tokens; {OTHERS}")
    if not isinstance(getattr(root.config, "hidden_size", None), int):
        raise InputError(f"{where}: nlu cannot merge a {kind}, whose config has no one hidden_size; {OTHERS}")
    if is_encoder_decoder(root) and not isinstance(root.get_encoder(), PreTrainedModel):
        raise InputError(f"{where}: nlu cannot merge a {kind}, whose encoder is no model by itself; {OTHERS}")
    if not is_encoder_decoder(root) and (apart := not_by_rows(root)):
        raise InputError(f"{where}: nlu cannot merge a {kind}, whose {apart} is stored in another form; {OTHERS}")


def token_shape(model: Model, part: str = "layer") -> tuple[int, int]:
    """Tokens of an anchor as published, and the width of the encoder."""
    return 5, skeleton(model).config.hidden_size


@cached_by_files
def family(model: Model, part: str = "layer") -> BlockFamily:
    """The blocks of any encoder that transformers knows, found in its skeleton; see `encoder`, and
    `encoder_decoder` for one with a decoder."""
    root, where = skeleton(model), str(config_of(model, model.path("base")))
    return encoder_decoder(root, where, model.path("base")) if is_encoder_decoder(root) else encoder(root, where)


def reading_of(model: Model) -> BlockFamily:
    """How the base is stored and read, whether or not its layers can be anchored, as those of MPNet and DeBERTa cannot,
    whose attention is given a table of relative positions."""
    root, where = skeleton(model), str(config_of(model, model.path("base")))
    return family(model) if is_encoder_decoder(root) else reading(root, where)


def encoder_alone(kind: str) -> str:
    """The class of the encoder alone of a model type that has a decoder, as T5EncoderModel; "" of other types."""
    return classes.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(kind, "") if kind in WITH_DECODER else ""


def opener_of(config: PretrainedConfig) -> Any:
    """What opens a model of this config: an encoder, an encoder with its decoder, or the encoder of such a model
    alone, if that is the class that the config names; whether there is a decoder it may say either way."""
    alone = encoder_alone(config.model_type)
    if alone and alone in (config.architectures or []):
        return AutoModelForTextEncoding
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder or alone else AutoModel


def is_encoder_decoder(root: PreTrainedModel) -> bool:
    """Whether a model has a decoder behind its encoder."""
    return type(root).__name__ in WITH_DECODER.values()


def require_classifiers(model: Model) -> None:
    """InputError if heads or scores are asked for of an encoder that has no classifier, or answers in words."""
    root = skeleton(model)
    if is_encoder_decoder(root):
        raise InputError(f"{model.path('base')}: a {type(root).__name__} {UNSCORED}")
    if type(root).__name__ == encoder_alone(root.config.model_type):
        raise InputError(f"{model.path('base')}: a {type(root).__name__} is for embeddings: {UNSERVED}")


def encoder(root: PreTrainedModel, where: str) -> BlockFamily:
    """The layers of a bare encoder without weights; `where` names its config in what is refused.

    Merged are the embeddings and the layers; a head is a task's own, and so is the pooler before it. A masked language
    model or a classifier keeps the encoder under the prefix of its class. Where positions are not rotary, no input
    moves the bias of the keys.

    Raises: InputError if a layer is given what all layers share and weights decide, such as a table of relative
        positions; if it is no twice differentiable function of its hidden states, of any number of tokens; or if
        these do not reach all of its weights.
    """
    found = reading(root, where)
    calls = LayerCalls(root, found.blocks, where)
    null_gradients = {} if calls.are_rotated else key_biases(root.get_submodule(f"{found.blocks}.0"))
    found = replace(found, call=calls, null_gradients=null_gradients)
    for (_, layer), *_ in by_kind(found.modules(root)):
        require_second_derivative(found.pure(layer), layer, root.config.hidden_size, calls.name)
    return found


def reading(root: PreTrainedModel, where: str) -> BlockFamily:
    """How a bare encoder without weights is stored, whether or not its layers can be anchored; InputError if it has no
    list of layers, or its matrices the other way round. What is stored under other names than the module's, or in one
    tensor with others, is merged by itself, under the module's."""
    path, kind = layers_of(root), type(root).__name__
    if not path:
        raise InputError(f"{where}: a {kind} has no list of layers to anchor; {OTHERS}")
    if turned_weights(root):  # a rule that goes by rows would take outputs for inputs
        raise InputError(
            f"{where}: a {kind} has its matrices as (inputs, outputs), which are not turned for nlu; merge it as the "
            "decoder that it is, domain: nlg"
        )
    positions = "embeddings.position_embeddings.weight"
    return BlockFamily(
        blocks=path,
        names=without(copies_of(root), names_within(root)),
        before_head=POOLER,
        positions=positions if positions in stored_shapes(root) else "",
        by_token=token_axes(root),
        turned=(),
        pieces=renamed_pieces(stored_parts(root)),
    )


def names_within(root: PreTrainedModel) -> Callable[[str], str | None]:
    """From a stored name to that in a file of the bare encoder; None for what lies in no part of it, a head, and for
    counted positions. Files of old have other names for the weights of a layer norm."""
    in_body = names_in_body(root)

    def name_of(stored: str) -> str | None:
        name = stored.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        return None if name.endswith("_ids") else in_body(name)

    return name_of


def body_name(model: Model) -> Callable[[str], str | None]:
    """From a stored name to that of the encoder without its pooler: what a classifier takes from a merged model."""
    names = reading_of(model).names

    def name_of(stored: str) -> str | None:
        name = names(stored)
        return None if name is None or name.startswith(POOLER) else name

    return name_of
