"""Language models of every family: stock transformers opens what was merged; others are refused by name."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.config import Adapt, Anchors, Compare, Config, Eval, Model, Run, Start
from common.core.errors import InputError
from common.io.checkpoints import Checkpoint
from common.io.model_files import INDEX_FILE
from common.io.shards import publish_shards, stage_shards
from common.pipeline import adapt, construct, merge_alone
from helpers import as_made, change, edit_config, files_of
from NLG import domain
from pico_nlg import (
    FAMILIES,
    NORM,
    VOCABULARY,
    pico_config,
    pico_model,
    pico_tokenizer,
    save,
)
from Vision import domain as vision


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_opens_what_was_merged_and_generates(nlg_inputs, tmp_path, family):
    config = pico_config(nlg_inputs, tmp_path, family)
    construct(config, domain)
    folder = adapt(config, domain)
    for place in (folder, folder / "code"):
        tokenizer = AutoTokenizer.from_pretrained(place)
        tokens = tokenizer("abc", return_tensors="pt")
        model = AutoModelForCausalLM.from_pretrained(place)
        written = model.generate(**tokens, max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert written.shape == (1, 8) and model(**tokens).logits.isfinite().all()
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == VOCABULARY + 1
    assert tokenizer.pad_token == "[PAD]" != AutoTokenizer.from_pretrained(folder).pad_token
    rows = json.loads((config.run.dir / "results.json").read_text())["rows"]
    metrics = {"arithmetic": "accuracy", "functions": "pass@1"}
    assert len(rows) == 8 and all(r["n"] == 2 and r["metric"] == metrics[r["task"]] for r in rows)


def test_an_expert_of_another_depth_is_refused_by_tensor(own_nlg):
    root, config = own_nlg
    save(pico_model("llama", num_hidden_layers=3, vocab_size=VOCABULARY + 1), pico_tokenizer(), root / "code")
    with pytest.raises(InputError, match=r"code/config.json: num_hidden_layers is 3, the base's is 2"):
        construct(config, domain)
    edit_config(root / "code", num_hidden_layers=2)
    with pytest.raises(InputError, match=r"code: model.layers.2.input_layernorm.weight: extra"):
        construct(config, domain)
    save(pico_model("llama", num_hidden_layers=1, vocab_size=VOCABULARY + 1), pico_tokenizer(), root / "code")
    edit_config(root / "code", num_hidden_layers=2)
    with pytest.raises(InputError, match=r"code: model.layers.1.input_layernorm.weight: missing"):
        construct(config, domain)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])  # the tensors of the second are those of a Llama
def test_an_expert_of_another_architecture_is_refused(own_nlg, family):
    root, config = own_nlg
    save(pico_model(family, vocab_size=VOCABULARY + 1), pico_tokenizer(), root / "code")
    with pytest.raises(
        InputError, match=rf"code/config.json has model type '{family}', {root}/base/config.json has 'llama'"
    ):
        construct(config, domain)
    (root / "code" / "config.json").unlink()
    if family == "qwen3":
        with pytest.raises(InputError, match=r"code: model.layers.0.self_attn.k_norm.weight: extra"):
            construct(config, domain)
    (root / "code" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"code/config.json is no config file, JSON with a model_type"):
        construct(config, domain)


def damage(folder, how):
    """Cut an expert into shards and spoil it."""
    tensors = Checkpoint(folder).read_under("")
    (folder / "model.safetensors").unlink()
    stage_shards(as_made(tensors), folder, 4000)
    publish_shards(folder)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / INDEX_FILE).read_text())
    if how == "absent":
        second.unlink()
    if how == "short":
        second.write_bytes(second.read_bytes()[:-1])
    if how == "not listed":
        index["weight_map"] = {n: s for n, s in index["weight_map"].items() if s != second.name}
    if how == "outside":
        index["weight_map"][NORM] = "../base/model.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return first.name, second.name


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("absent", "there is no file .*code/{second}"),
        ("short", "code/{second} is truncated"),
        ("not listed", "code/model.safetensors.index.json names only .* shards, {first} among them"),
        ("outside", "code/model.safetensors.index.json names the shard ../base/model.safetensors, which lies outside"),
    ],
)
def test_a_damaged_expert_is_named_and_what_was_made_stays(own_nlg, how, message):
    root, config = own_nlg
    for stage in (construct, adapt):
        stage(config, domain)
    before = files_of(config.run.dir)
    first, second = damage(root / "code", how)
    for stage in (construct, merge_alone, adapt):
        with pytest.raises(InputError, match=message.format(first=first, second=second)) as refusal:
            stage(config, domain)
        assert "\n" not in str(refusal.value)
    assert files_of(config.run.dir) == before


def test_a_base_of_another_family_is_refused(nlg_config):
    with pytest.raises(InputError, match="base/config.json has model type 'llama', model.family is 'gemma'"):
        construct(change(nlg_config, "model", family="gemma"), domain)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("", r"there is no .*base/config.json, and model.arch does not give its text"),
        ("llama", "model.arch is no config file, JSON with a model_type"),
        ('{"hidden_size": 8}', "model.arch names no model_type, by which transformers knows an architecture"),
        ('{"model_type": "llama", "hidden_size": "x"}', "model.arch is no config of a model that transformers knows"),
        ('{"model_type": "bert"}', "model.arch has model type 'bert', model.family is 'llama'"),
    ],
)
def test_an_architecture_that_cannot_be_had_is_named(own_nlg, arch, message):
    root, config = own_nlg
    (root / "base" / "config.json").unlink()
    with pytest.raises(InputError, match=message):
        construct(change(config, "model", arch=arch), domain)


def test_test_sets_are_checked_before_anything_is_made(nlg_config):
    for tests, message in [
        (
            {"math": ["nothing"]},
            "unknown test set 'nothing'; choose from GSM8K, MATH, HumanEval, MBPP, arithmetic, functions",
        ),
        ({"math": ["MATH"], "code": ["MATH"]}, "eval.tests names one test set for two tasks: MATH, MATH"),
        ({"math": [], "code": [], "law": []}, "eval.tests names the task 'law'; tasks are math, code"),
    ]:
        with pytest.raises(InputError, match=message):
            construct(change(nlg_config, "eval", tests=tests), domain)
    unscored = change(change(nlg_config, "eval", tests={"math": [], "code": []}), "run", score=True)
    merge_alone(unscored, domain)
    assert not (nlg_config.run.dir / "results.json").exists()


def test_what_is_for_language_models_is_refused_elsewhere(pico_inputs):
    for field, value in {"dtype": "float16", "vocabulary": "pad", "tokenizers": ("a",)}.items():
        with pytest.raises(InputError, match=f"model.{field} is for language models, not for vision"):
            vision_config = change(pico_vision(pico_inputs), "model", **{field: value})
            construct(vision_config, vision)
    with pytest.raises(InputError, match="eval.dtype is for language models, not for vision"):
        construct(change(pico_vision(pico_inputs), "eval", dtype="bfloat16"), vision)


def pico_vision(inputs):
    parts = [section() for section in (Anchors, Start, Adapt, Eval, Compare, Run)]
    return Config("vision", Model(root=str(inputs / "clip"), base="base", expert="{task}"), ["MNIST"], *parts)
