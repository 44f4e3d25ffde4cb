"""Unlike vocabularies, tied heads, tokenizers, and the type of the merged weights."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from common.config import Start
from common.core.errors import InputError
from common.io.checkpoints import Checkpoint
from common.io.model_files import INDEX_FILE
from common.pipeline import adapt, construct, merge_alone
from helpers import change, read, rewrite
from NLG import domain
from pico_decoders import fields_of
from pico_nlg import (
    EMBEDDING,
    HEAD,
    NORM,
    PICO,
    VOCABULARY,
    pico_tokenizer,
    save,
    write_pico_models,
)


def test_unlike_vocabularies_are_refused_unless_a_policy_is_chosen(nlg_config):
    refused = change(nlg_config, "model", vocabulary="refuse")
    for stage in (construct, adapt, merge_alone):
        with pytest.raises(
            InputError, match=r"math has 42 tokens, .*base has 41; model.vocabulary may be pad .* or base"
        ):
            stage(refused, domain)
    assert not nlg_config.run.dir.exists()


def test_the_policy_base_cuts_to_the_bases_tokens(nlg_config):
    cut = change(nlg_config, "model", vocabulary="base")
    folder = merge_alone(cut, domain)
    assert Checkpoint(folder).shapes[EMBEDDING] == Checkpoint(folder).shapes[HEAD] == (VOCABULARY, 16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == VOCABULARY
    padded = merge_alone(change(nlg_config, "run", name="padded"), domain)
    for name in (EMBEDDING, HEAD):
        assert torch.equal(read(folder, name), read(padded, name)[:VOCABULARY])


def test_an_expert_with_two_tokens_more_and_one_with_none(own_nlg):
    root, config = own_nlg
    expert = AutoModelForCausalLM.from_pretrained(root / "math")
    expert.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    save(expert, pico_tokenizer(), root / "math")
    shutil.copytree(root / "base", root / "code", dirs_exist_ok=True)
    merged = read(merge_alone(config, domain), EMBEDDING)
    base, math = (read(root / name, EMBEDDING) for name in ("base", "math"))
    assert len(merged) == VOCABULARY + 2
    torch.testing.assert_close(merged[-2:], base.mean(0) + 0.5 * (math[-2:] - base.mean(0)))


def test_equal_vocabularies_need_no_policy(own_nlg):
    root, config = own_nlg
    write_pico_models(root, "llama", extra_tokens=0)
    folder = merge_alone(change(config, "model", vocabulary="refuse"), domain)
    assert Checkpoint(folder).shapes[HEAD] == (VOCABULARY, 16)


@pytest.mark.parametrize("tied", ["base", "math"])
def test_a_head_that_a_config_promises_and_no_file_has_is_refused(own_nlg, tied):
    root, config = own_nlg
    rewrite(root / tied / "model.safetensors", lambda t: t.pop(HEAD))
    with pytest.raises(InputError, match=rf"{tied} has no tensor {HEAD}, and its config.json says .* false: .* lost"):
        construct(config, domain)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", ""])
def test_the_merged_type_is_chosen_or_the_bases(own_nlg, dtype):
    root, config = own_nlg
    AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16).save_pretrained(root / "base")
    folder = merge_alone(change(config, "model", dtype=dtype), domain)
    wanted = getattr(torch, dtype or "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == wanted
    stored = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[wanted]
    assert {row.dtype for row in Checkpoint(folder).rows.values()} == {stored}
    exact = merge_alone(change(change(config, "model", dtype="float32"), "run", name="exact"), domain)
    for name in Checkpoint(folder).names():
        assert torch.equal(read(folder, name), read(exact, name).to(wanted).float())


@pytest.mark.parametrize("dtype", ["", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("said", ["bfloat16", None])
def test_a_tensor_kept_in_a_wider_type_than_the_rest_keeps_it(own_nlg, dtype, said):
    """Norms and a router's bias in float32 in a file of bfloat16: a merge of three equal models has the bytes."""
    root, config = own_nlg
    rest = {"float16": "F16", "float32": "F32"}.get(dtype, "BF16")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields_of("deepseek_v3")), dtype=torch.bfloat16)
    save(model, pico_tokenizer(), root / "base")
    kept = {name for name in model.state_dict() if name.endswith(("e_score_correction_bias", "norm.weight"))}
    values = {name: 6 + torch.rand(model.state_dict()[name].shape) / 64 for name in kept}
    rewrite(root / "base" / "model.safetensors", lambda t: t.update(values))
    fields = json.loads((root / "base" / "config.json").read_text()) | {"dtype": said}
    (root / "base" / "config.json").write_text(json.dumps(fields))
    for task in ("math", "code"):
        shutil.rmtree(root / task)
        shutil.copytree(root / "base", root / task)
    config = change(config, "model", dtype=dtype, family="auto")
    folder = merge_alone(replace(config, start=Start("average")), domain)
    before, after = Checkpoint(root / "base"), Checkpoint(folder)
    wide = {name for name, row in before.rows.items() if row.dtype == "F32"}  # among them what transformers keeps so
    assert kept <= wide and len(wide) < 0.5 * len(before.rows)
    assert {n: row.dtype for n, row in after.rows.items()} == {n: "F32" if n in wide else rest for n in before.rows}
    whole = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in load_file(root / "base" / "model.safetensors").items():
        assert torch.equal(whole[name], tensor.to(whole[name].dtype))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert all(torch.equal(loaded[name].float(), values[name].to(loaded[name].dtype).float()) for name in kept)


def test_weights_beyond_the_chosen_type_are_named(own_nlg):
    root, config = own_nlg
    rewrite(root / "math" / "model.safetensors", lambda t: t[NORM].fill_(1e6))
    with pytest.raises(
        InputError, match=rf"{NORM}: the merged weights reach 5e\+05, more than torch.float16 can hold; smaller"
    ):
        merge_alone(change(config, "model", dtype="float16"), domain)
    assert not (config.run.dir / "merged" / "ta" / INDEX_FILE).exists()


def test_a_tokenizer_that_is_not_there_is_named_before_anything_is_made(own_nlg):
    root, config = own_nlg
    for file in (root / "code").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"model.tokenizers names code, but .*code holds none of tokenizer.json"):
        merge_alone(config, domain)
    assert not config.run.dir.exists()


def test_os_errors_while_linking_are_reported(nlg_config, monkeypatch):
    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.symlink_to", no_links)
    with pytest.raises(InputError, match=r"cannot link .*code/model-.*model.tokenizers: .*not permitted"):
        merge_alone(nlg_config, domain)
    assert os.listdir(nlg_config.run.dir / "merged" / "ta" / "code")


EYE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2,
    "image_size": 16, "patch_size": 8, "vision_output_dim": 32, "intermediate_layers_indices": [0],
}  # fmt: skip
MLLAMA = {
    "text_config": PICO | {"model_type": "mllama_text_model", "cross_attention_layers": [1]}, "vision_config": EYE
}  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "more"), [("moshi", PICO, 1), ("mllama", MLLAMA, 8)])
def test_rows_besides_those_of_the_vocabulary_are_not_counted(own_nlg, kind, fields, more):
    """An embedding has some for what is no token: vocab_size is less than its rows, and says so still. Mllama's config
    has no tie_word_embeddings either: it ties nothing."""
    root, config = own_nlg
    config = change(config, "model", family=kind, vocabulary="refuse", tokenizers=())
    architecture = AutoConfig.for_model(kind, **fields)
    opener = AutoModelForImageTextToText if kind == "mllama" else AutoModelForCausalLM
    rows = []
    for name in ("base", "math", "code"):
        model = opener.from_config(architecture)
        save(model, pico_tokenizer(), root / name)
        rows.append(model.get_input_embeddings().weight.detach())
    opened = opener.from_pretrained(merge_alone(change(config, "run", score=False), domain))
    merged, (base, math, code) = opened.get_input_embeddings().weight, rows
    assert opened.config.get_text_config().vocab_size == VOCABULARY and len(merged) == VOCABULARY + more
    torch.testing.assert_close(merged.detach(), base + 0.5 * (math - base) + 0.5 * (code - base))
