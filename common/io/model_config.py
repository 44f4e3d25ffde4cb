"""The config.json beside a model's weights: which of its fields change what the model computes, and how it is kept.

Equal shapes do not make two models the same function: another rope_theta, head count or activation does not show in
any tensor. Configs are compared as transformers resolves them, so that a default that is written out in one file and
left out in another, or rope_theta in its old and its new place, are no difference. Every field counts as computing
unless it is known not to.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.core.errors import InputError, in_short
from common.core.notices import warn
from common.io.json_files import parse_object, read_object
from common.io.model_files import CONFIG_FILE, MODEL_FILE, folder_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AUTO = "auto"  # model.family: whatever the config says
WHAT = "config file, JSON with a model_type"

# Fields that say where a file comes from. They differ between any two models and tell nothing.
ORIGIN = frozenset({"_name_or_path", "name_or_path", "transformers_version"})
# Fields that other parts of the project compare: the vocabulary's rows, its tied head, the family, quantised weights.
ELSEWHERE = frozenset({
    "vocab_size", "tie_word_embeddings", "model_type", "quantization_config", "compression_config", "quantization",
})  # fmt: skip
# Fields that change no tensor's way through the model.
HARMLESS = frozenset((
    # names and tools
    "architectures", "auto_map", "tokenizer_class", "finetuning_task", "unsloth_version", "unsloth_fixed",
    # the type in which weights are stored, and how they are executed
    "dtype", "torch_dtype", "use_bfloat16", "attn_implementation", "use_flash_attn", "pretraining_tp",
    "chunk_size_feed_forward", "torchscript", "tf_legacy_loss",
    # training, besides rates of dropout
    "initializer_range", "initializer_factor", "gradient_checkpointing", "router_aux_loss_coef", "layerscale_value",
    "router_jitter_noise", "input_jitter_noise", "moe_jitter_eps", "neftune_noise_alpha",
    # pretraining on masked images
    "encoder_stride", "use_mask_token",
    # a task's head, which no other task shares
    "id2label", "label2id", "num_labels", "problem_type", "summary_type", "summary_use_proj", "summary_activation",
    # tokens and generation
    "bos_token", "eos_token", "pad_token", "unk_token", "cache_implementation",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
    "use_cache", "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "remove_invalid_values", "exponential_decay_length_penalty", "prefix", "task_specific_params",
    "model_max_length", "max_sequence_length", "tokenizer_model_max_length", "tokenizer_padding_side",
    # what a call returns
    "return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "output_past", "output_router_logits",
))  # fmt: skip
# Of these the fields that change what one architecture computes: PhiMoE chooses its experts within that margin.
COMPUTING = {"phimoe": frozenset({"router_jitter_noise"})}
# Names of rates at which training leaves something out. A truth value of such a name is no rate: with token_dropout ESM
# scales its embeddings in every use.
RATES = re.compile(r"dropout|pdrop$|layerdrop$|drop_path|droppath|^drop_rate$")
# Fields of earlier releases of transformers and what they stood for where they were not written.
EARLIER = {"position_embedding_type": "absolute", "hidden_activation": "gelu_pytorch_tanh"}
# One function under several names.
SYNONYMS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
# Rotary positions whose angles do not depend on the greatest length.
ENDLESS = ("default", "linear", "llama3", "proportional")


@dataclass(frozen=True)
class ModelConfig:
    """The fields of a config.json as they are written, and resolved: {"rope_parameters.rope_theta": 10000.0}."""

    file: str
    written: Mapping[str, Any]
    resolved: Mapping[str, Any]

    @property
    def model_type(self) -> str | None:
        """The architecture that it names."""
        return self.written.get("model_type")

    def spelling(self, field: str) -> str:
        """The name that a resolved field has in the file: rope_theta lay outside before it was in rope_parameters."""
        last = field.removeprefix("rope_parameters.")
        if last == field or "rope_parameters" in self.written:
            return field
        return f"rope_scaling.{last}" if last in (self.written.get("rope_scaling") or {}) else last


def config_file(path: Path) -> Path | None:
    """The config.json of the model at a path: in the folder, or beside the file that transformers saves, none other."""
    file = folder_of(path, (MODEL_FILE,)) / CONFIG_FILE
    return file if file.is_file() else None


def read_text(file: Path) -> str:
    """A text file; InputError if it cannot be read or is no text."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as text: {error}") from error


def read_config(file: Path) -> dict[str, Any]:
    """The fields of a config file; InputError if it is none."""
    return typed(read_object(file, WHAT), str(file))


def parse(text: str, file: str) -> dict[str, Any]:
    """The fields of a JSON text; InputError naming the file if it is none."""
    return typed(parse_object(text, file, WHAT), file)


def typed(fields: dict[str, Any], file: str) -> dict[str, Any]:
    """The fields; InputError if those that name the model are no names, or tie_word_embeddings is no truth value."""
    classes, kind, tied = (fields.get(name) for name in ("architectures", "model_type", "tie_word_embeddings"))
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise InputError(f"{file} is no {WHAT}: architectures is {shown(classes)}, but should be a list of names")
    if not isinstance(kind, str | None):
        raise InputError(f"{file} is no {WHAT}: model_type is {shown(kind)}, but should be a name")
    if not isinstance(tied, bool | None):
        raise InputError(f"{file} is no {WHAT}: tie_word_embeddings is {shown(tied)}, but should be true or false")
    return fields


def shown(value: object) -> str:
    """A JSON value for a sentence, cut where it is long."""
    return json.dumps(value)[:40]


def require_family(fields: Mapping[str, Any], file: str, family: str) -> None:
    """InputError if a config is of another architecture than model.family names, or names none."""
    found = fields.get("model_type")
    if found is None:
        raise InputError(f"{file} names no model_type, by which transformers knows an architecture")
    if family not in (AUTO, found):
        raise InputError(f"{file} has model type {found!r}, model.family is {family!r}")


def known_config(written: Mapping[str, Any], file: str) -> "PretrainedConfig":
    """A config as transformers has it, with all defaults of its architecture; no code that it names is run.

    Raises: InputError if transformers knows no such architecture or refuses one of the values.
    """
    from transformers import AutoConfig

    try:
        own = json.loads(json.dumps(written), object_hook=special_float)  # a copy: it writes into what it is given
        return AutoConfig.for_model(**own)
    except Exception as error:  # whatever the class of an architecture makes of any value
        raise InputError(f"{file} is no config of a model that transformers knows: {one_line(error)}") from error


def special_float(fields: dict[str, Any]) -> Any:
    """A number that JSON has no word for, as transformers writes it: {"__float__": "Infinity"}."""
    return float(fields["__float__"]) if fields.keys() == {"__float__"} else fields


def resolve(written: Mapping[str, Any], file: str) -> ModelConfig:
    """A config with the fields in which two files of one function agree, however each of them says it."""
    fields = known_config(written, file).to_dict()
    resolved = {name: SYNONYMS.get(value, value) for name, value in flat(fields) if not is_off(value)}
    for name in [name for name in resolved if name.endswith(".rope_type")]:
        resolved.pop(name.removesuffix("rope_type") + "type", None)  # how it was called before
    for name, value in EARLIER.items():
        resolved.setdefault(name, value)
    return ModelConfig(file, written, resolved)


def flat(nested: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of everything in nested dictionaries and lists, as in layer_types.3."""
    if isinstance(nested, dict | list | tuple):
        for key, value in nested.items() if isinstance(nested, dict) else enumerate(nested):
            yield from flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, nested


def is_off(value: Any) -> bool:
    """Whether a field that has this value says what one says that is not there."""
    return value is None or value is False or value == ""


def one_line(error: Exception) -> str:
    """The first sentence of an error: some list all architectures that there are."""
    return re.split(r"\. Should contain|\n", " ".join(str(error).split()) or repr(error))[0]


def differences(base: ModelConfig, other: ModelConfig, computing: frozenset[str] = frozenset()) -> tuple[dict, dict]:
    """{field: (the other's value, the base's)} of fields that change what is computed, and of those that do not.

    computing: fields that count for this architecture though they do not for others.
    """
    counted, harmless = {}, {}
    computing |= COMPUTING.get(base.model_type or "", frozenset())
    known_not_to = HARMLESS - computing | endless(base, other)
    for field in dict.fromkeys((*base.resolved, *other.resolved)):
        values = other.resolved.get(field), base.resolved.get(field)
        parts = set(field.split("."))
        if values[0] != values[1] and not parts & (ORIGIN | ELSEWHERE) and not field.startswith("_"):
            (harmless if parts & known_not_to or is_rate(field, values) else counted)[field] = values
    return counted, harmless


def is_rate(field: str, values: tuple[Any, Any]) -> bool:
    """Whether a field says how much is left out in training, by its name and its two values: numbers, or none."""
    numbers = all(value is None or (isinstance(value, int | float) and value is not True) for value in values)
    return numbers and bool(RATES.search(field.rpartition(".")[2]))


def endless(*configs: ModelConfig) -> frozenset[str]:
    """The field of the greatest length, if positions are rotary and no angle depends on it."""
    kinds = [
        [value for name, value in config.resolved.items() if name.endswith("rope_type")] or ["none"]
        for config in configs
    ]
    free = all(kind in ENDLESS for each in kinds for kind in each)
    return frozenset({"max_position_embeddings"} if free else ())


def require_same_function(base: ModelConfig, other: ModelConfig, computing: frozenset[str] = frozenset()) -> set[str]:
    """InputError naming the fields in which another model's config makes another function of equal weights.

    Returns: names of the fields that differ and do not matter.
    """
    if other.model_type != base.model_type:
        raise InputError(f"{other.file} has model type {other.model_type!r}, {base.file} has {base.model_type!r}")
    counted, harmless = differences(base, other, computing)
    if counted:
        said = [f"{other.spelling(field)} is {one!r}, the base's is {two!r}" for field, (one, two) in counted.items()]
        raise InputError(
            f"{other.file}: {'; '.join(in_short(said))} ({base.file}): the merged model computes with the base's, "
            "for which these weights are not made; merge models of one base, or correct the file that is wrong"
        )
    return {field.split(".")[0] for field in harmless}


def compare_configs(base: ModelConfig, others: Mapping[str, Path], computing: frozenset[str] = frozenset()) -> None:
    """Compare the base's config with that of every other model that has one.

    Args:
        base: Its config.
        others: Path of each other model, under the name of its task.
        computing: Fields that count for this architecture though they do not for others.
    Raises: InputError at the first model whose config makes another function of its weights.
    """
    found: dict[str, list[str]] = {}
    for task, path in others.items():
        file = config_file(path)
        if file:
            written = read_config(file)
            if written.get("model_type") != base.model_type:
                require_same_function(base, ModelConfig(str(file), written, {}))
            for field in sorted(require_same_function(base, resolve(written, str(file)), computing)):
                found.setdefault(field, []).append(task)
    if found:
        said = ", ".join(f"{field} ({', '.join(tasks)})" for field, tasks in found.items())
        warn(f"{CONFIG_FILE} differs from the base's in what changes no weight's work, and the base's is kept: {said}")


def edited(text: str, changes: Mapping[str, Any], dropped: tuple[str, ...] = ()) -> str:
    """A JSON text with some fields changed or dropped; the text itself if it says all that already."""
    fields = json.loads(text)
    wanted = {name: value for name, value in (fields | changes).items() if name not in dropped}
    if wanted == fields:
        return text
    indent = re.search(r"\n([ \t]+)\"", text)
    return json.dumps(wanted, indent=indent[1] if indent else None, ensure_ascii=False) + "\n"


def dtype_field(fields: Mapping[str, Any], dtype: str) -> dict[str, str]:
    """The field in which a config names the type of its weights, as it spells it, for another type."""
    return {name: dtype for name in ("dtype", "torch_dtype") if name in fields}
