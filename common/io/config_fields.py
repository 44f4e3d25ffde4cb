"""Which fields of a model's config change what the model makes of its weights: every one that is not known not to."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

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
# What a field that is not written stands for, where that is not "off": fields of earlier releases of transformers, and
# one without which a decoder sees nothing of what follows a token (masking_utils.py of transformers).
UNWRITTEN = {"position_embedding_type": "absolute", "hidden_activation": "gelu_pytorch_tanh", "is_causal": True}
# One function under several names.
SYNONYMS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
# Rotary positions whose angles do not depend on the greatest length.
ENDLESS = ("default", "linear", "llama3", "proportional")


def flat(nested: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of everything in nested dictionaries and lists, as in layer_types.3."""
    if isinstance(nested, dict | list | tuple):
        for key, value in nested.items() if isinstance(nested, dict) else enumerate(nested):
            yield from flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, nested


def unwritten(field: str) -> Any:
    """What a field, also one within others, stands for where it is not written; None where that is off."""
    return UNWRITTEN.get(field.rpartition(".")[2])


def is_off(field: str, value: Any) -> bool:
    """Whether a field that has this value says what one says that is not there, or nothing that is known."""
    return value == "" or ((value is None or value is False) and unwritten(field) is not True)


def tells(field: str) -> bool:
    """Whether a field, also one within others, is compared here: its own business and no file's origin."""
    return not set(field.split(".")) & (ORIGIN | ELSEWHERE) and not field.startswith("_")


def computes(field: str, values: tuple[Any, ...], known_not_to: frozenset[str] = HARMLESS) -> bool:
    """Whether a field changes what a model makes of its weights, by its name and the values it has."""
    return not set(field.split(".")) & known_not_to and not is_rate(field, values)


def computing_fields(written: Mapping[str, Any]) -> dict[str, Any]:
    """{field: value} of all that is written in a config and changes what the model makes of its weights."""
    said = {field: value for field, value in flat(written) if not is_off(field, value) and tells(field)}
    kind = COMPUTING.get(written.get("model_type", ""), frozenset())
    return {field: said[field] for field in sorted(said) if computes(field, (said[field],), HARMLESS - kind)}


def is_rate(field: str, values: tuple[Any, ...]) -> bool:
    """Whether a field says how much is left out in training, by its name and its values: numbers, or none."""
    numbers = all(value is None or (isinstance(value, int | float) and value is not True) for value in values)
    return numbers and bool(RATES.search(field.rpartition(".")[2]))
