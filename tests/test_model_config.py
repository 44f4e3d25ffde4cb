"""Which fields of two configs make another function of equal weights, and how a config is kept."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from common.core import notices
from common.core.errors import InputError, in_short
from common.io.config_fields import computing_fields
from common.io.lineage import compare_models
from common.io.model_config import compare_configs, differences, edited, known_config, require_same_function, resolve
from common.io.skeleton import computing
from helpers import edit_config

LLAMA = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
MISTRAL, QWEN = LLAMA | {"model_type": "mistral"}, LLAMA | {"model_type": "qwen2"}
BERT = LLAMA | {"model_type": "bert"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


def compared(one, two):
    """Names of the fields that count, and of those that do not."""
    counted, harmless = differences(resolve(one, "one"), resolve(two, "two"))
    return set(counted), {field.split(".")[0] for field in harmless}


@pytest.mark.parametrize(
    ("base", "changes", "field"),
    [
        (LLAMA, {"rope_theta": 5e5}, "rope_parameters.rope_theta"),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 2e7}}, "rope_parameters.rope_theta"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters.factor"),
        (LLAMA, {"num_attention_heads": 4}, "num_attention_heads"),
        (LLAMA, {"num_key_value_heads": 1}, "num_key_value_heads"),
        (LLAMA, {"head_dim": 4}, "head_dim"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA, {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        (LLAMA, {"attention_bias": True}, "attention_bias"),
        (LLAMA, {"logits_scaling": 8.0}, "logits_scaling"),
        (MISTRAL, {"sliding_window": None}, "sliding_window"),
        (QWEN, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "layer_types.1"),
        (BERT, {"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        (BERT, {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        (BERT, {"is_decoder": True}, "is_decoder"),
        (LLAMA, {"is_causal": False}, "is_causal"),
        (LLAMA, {"is_causal": None}, "is_causal"),
        (LLAMA | {"is_causal": False}, {"is_causal": True}, "is_causal"),
        ({"model_type": "gemma3", "text_config": {}}, {"text_config": {"is_causal": False}}, "text_config.is_causal"),
        (BERT, {"max_position_embeddings": 64}, "max_position_embeddings"),
        (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {"max_position_embeddings": 64},
         "max_position_embeddings"),
        ({"model_type": "esm", "vocab_size": 33, "token_dropout": True}, {"token_dropout": False}, "token_dropout"),
        ({"model_type": "phimoe", "router_jitter_noise": 0.01}, {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    ],
)  # fmt: skip
def test_a_field_that_changes_the_function_counts(base, changes, field):
    assert field in compared(base, base | changes)[0]


@pytest.mark.parametrize(
    ("base", "one", "two"),
    [
        (LLAMA, {}, {"rope_theta": 10000, "rope_scaling": None, "num_key_value_heads": 2, "head_dim": 8}),
        (LLAMA, {"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (LLAMA, {"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}},
         {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        (LLAMA, {"hidden_act": "silu"}, {"hidden_act": "swish"}),
        (LLAMA, {}, {"use_mrope": False, "_flash_attn_2_enabled": True}),
        (LLAMA, {}, {"is_causal": True}),
        (LLAMA, {"is_causal": False}, {"is_causal": False}),
        (QWEN, {"use_sliding_window": False}, {"use_sliding_window": False, "sliding_window": 4096}),
        (BERT, {}, {"position_embedding_type": "absolute", "type_vocab_size": 2}),
        (BERT, {}, {"position_embedding_type": None}),
    ],
)  # fmt: skip
def test_two_spellings_of_one_function_are_no_difference(base, one, two):
    assert compared(base | one, base | two) == (set(), set())


def test_of_many_fields_that_count_three_are_named_and_the_rest_counted():
    many = {"hidden_act": "gelu", "head_dim": 4, "attention_bias": True, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
    with pytest.raises(InputError, match=r"^two: [^;]+; [^;]+; [^;]+; 2 more \(one\)"):
        require_same_function(resolve(LLAMA, "one"), resolve(LLAMA | many, "two"))
    names = [f"field{i}" for i in range(4)]
    assert in_short(names) == names and in_short(names, most=2) == ["field0", "3 more"]


def test_what_changes_no_function_does_not_count():
    harmless = {"eos_token_id": 7, "torch_dtype": "float16", "use_cache": False, "max_position_embeddings": 64,
                "attention_dropout": 0.5, "initializer_range": 0.5, "pretraining_tp": 2, "unsloth_version": "x",
                "architectures": ["LlamaModel"], "id2label": {"0": "a", "1": "b", "2": "c"}}  # fmt: skip
    wanted = set(harmless) - {"torch_dtype"} | {"dtype", "label2id"}
    counted, found = compared(LLAMA, LLAMA | harmless)
    assert (counted, found - {"label2id"}) == (set(), wanted - {"label2id"})
    elsewhere = LLAMA | {
        "vocab_size": 9,
        "tie_word_embeddings": True,
        "_name_or_path": "x",
        "transformers_version": "4",
    }
    assert compared(LLAMA, elsewhere) == (set(), set())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "summary_first_dropout": 0.3}),
        ("opt", {"dropout": 0.0, "layerdrop": 0.2, "activation_dropout": 0.5}),
        ("starcoder2", {"residual_dropout": 0.05, "embedding_dropout": 0.05}),
        ("gpt_neo", {"resid_dropout": 0.1, "embed_dropout": 0.1, "attention_dropout": 1}),
        ("mixtral", {"router_jitter_noise": 0.1}),
        ("phimoe", {"input_jitter_noise": 0.1}),
        ("bert", {"classifier_dropout": 0.3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
        ("vit", {"hidden_dropout_prob": 0.3}),
        ("gemma2", {"cache_implementation": "static"}),
        ("llama", {"neftune_noise_alpha": 5, "eos_token": "</s>", "pad_token": "<pad>"}),
    ],
)
def test_what_is_for_training_or_generation_alone_does_not_count(kind, changes):
    assert compared({"model_type": kind}, {"model_type": kind} | changes) == (set(), set(changes))


def test_a_refusal_names_file_field_and_both_values_in_its_spelling():
    old = resolve(LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"factor": 4.0}}, "math/config.json")
    base = resolve(LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3}, "base/config.json")
    with pytest.raises(InputError, match=r"^math/config.json: rope_scaling.factor is 4.0, the base.s is 8.0"):
        require_same_function(base, old)
    with pytest.raises(InputError, match="one has model type 'qwen2', two has 'llama'"):
        require_same_function(resolve(LLAMA, "two"), resolve(QWEN, "one"))
    with pytest.raises(InputError, match="^it is no config of a model that transformers knows"):
        resolve({"model_type": "no such"}, "it")


def test_a_decoder_that_sees_what_is_behind_is_named_with_both_values():
    plain, free = resolve(LLAMA, "plain"), resolve(LLAMA | {"is_causal": False}, "free")
    with pytest.raises(InputError, match=r"^free: is_causal is False, the base's is True \(plain\)"):
        require_same_function(plain, free)
    with pytest.raises(InputError, match=r"^plain: is_causal is True, the base's is False \(free\)"):
        require_same_function(free, plain)
    assert computing_fields(LLAMA | {"is_causal": False})["is_causal"] is False


def test_padding_counts_where_positions_are_counted_from_it():
    base, other = (resolve(BERT | {"model_type": "roberta", "pad_token_id": n}, str(n)) for n in (1, 3))
    assert require_same_function(base, other) == {"pad_token_id"}
    with pytest.raises(InputError, match="3: pad_token_id is 3, the base's is 1"):
        require_same_function(base, other, frozenset({"pad_token_id"}))


@pytest.mark.parametrize(
    ("opener", "kind", "fields", "counts"),
    [
        (AutoModel, "roberta", {}, True),
        (AutoModel, "bert", {}, False),
        (AutoModel, "esm", {"position_embedding_type": "absolute", "mask_token_id": 2}, True),
        (AutoModel, "esm", {"position_embedding_type": "rotary", "mask_token_id": 2}, False),
        (AutoModelForSeq2SeqLM, "m2m_100", {}, True),
        (AutoModelForSeq2SeqLM, "bart", {}, False),
        (AutoModelForSeq2SeqLM, "pegasus", {}, False),
        (AutoModelForCausalLM, "xglm", {"num_layers": 1}, True),
        (AutoModelForCausalLM, "llama", {}, False),
        (AutoModelForCausalLM, "gemma3n_text", {"num_kv_shared_layers": 0}, False),
    ],
)
def test_which_models_number_positions_from_the_padding_token(opener, kind, fields, counts):
    with torch.device("meta"):
        root = opener.from_config(
            known_config({"model_type": kind, "vocab_size": 40, "pad_token_id": 1} | fields, kind)
        )
    assert computing(root) == ({"pad_token_id"} if counts else set())


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    for name in ("base", "math", "code"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def test_harmless_differences_are_one_line(folders, capsys):
    edit_config(folders / "math", eos_token_id=7)
    edit_config(folders / "code", eos_token_id=7, use_cache=False)
    base, others = resolve(LLAMA, "base"), {name: folders / name for name in ("math", "code", "none")}
    for _ in range(2):
        compare_configs(base, others)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and line.endswith("kept: eos_token_id (math, code), use_cache (code)")


def adapter(folders, computing=frozenset(), **settings):
    (folders / "lora").mkdir(exist_ok=True)
    (folders / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))
    compare_models(folders / "base", resolve(LLAMA, "base"), {"lora": folders / "lora"}, computing)


def test_an_adapter_of_another_base_is_refused_or_told(folders, capsys):
    for named in (None, str(folders / "base"), "org/BASE"):
        adapter(folders, base_model_name_or_path=named)
    assert capsys.readouterr().err == ""
    adapter(folders, base_model_name_or_path="org/other")
    assert "names the base org/other, model.base is" in capsys.readouterr().err
    adapter(folders, base_model_name_or_path="org/base", revision="v2")
    assert "names revision v2 of org/base" in capsys.readouterr().err
    edit_config(folders / "math", hidden_size=32)
    with pytest.raises(InputError, match=r"lora/adapter_config.json names the base .*math, .* hidden_size is 32 there"):
        adapter(folders, base_model_name_or_path=str(folders / "math"))


def test_what_counts_for_one_architecture_counts_of_an_adapters_base(folders):
    """As the padding's number of a decoder that counts positions from it."""
    edit_config(folders / "math", pad_token_id=3)
    named = {"base_model_name_or_path": str(folders / "math")}
    adapter(folders, **named)
    with pytest.raises(InputError, match="names the base .*math, which is another model: pad_token_id is 3 there"):
        adapter(folders, computing=frozenset({"pad_token_id"}), **named)


def test_a_config_is_kept_but_for_what_must_change():
    text = '{\n "rope_theta": 500000.0,\n "torch_dtype": "bfloat16", "é": 1e-05\n}'
    assert edited(text, {"torch_dtype": "bfloat16"}, ("absent",)) == text
    changed = edited(text, {"torch_dtype": "float32"}, ("rope_theta",))
    assert json.loads(changed) == {"torch_dtype": "float32", "é": 1e-05} and '\n "torch' in changed
