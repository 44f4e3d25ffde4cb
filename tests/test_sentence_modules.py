"""Encoders of sentence-transformers: a merged model opens there, and embeds as its base and experts do.

Folders are written by sentence-transformers 6 itself; those of older releases by hand, as the library's own were.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer import modules
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from common.core import notices
from common.core.errors import InputError
from common.io.checkpoints import Checkpoint, copy_files
from common.io.hub import files_wanted, parse
from common.io.sentence_modules import MODULES_FILE, compare_modules
from common.pipeline import merge_alone
from helpers import change, read
from NLU import domain
from pico_nlu import pico_architecture, pico_tokenizer

TEXTS = ["w1 w2 w3", "w4", "w5 w6"]
OLD = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def write(folder, seed, pooling="cls", dense=None, prompts=None):
    """A RoBERTa with pooling, a Dense layer of that seed if there is one, and normalised outputs."""
    torch.manual_seed(seed)
    encoder = AutoModel.from_config(pico_architecture("roberta"))
    encoder.save_pretrained(folder / "encoder")
    pico_tokenizer().save_pretrained(folder / "encoder")
    parts = [modules.Transformer(str(folder / "encoder"), max_seq_length=32), modules.Pooling(16, pooling_mode=pooling)]
    if dense is not None:
        torch.manual_seed(dense)
        parts.append(modules.Dense(16, 8))
    model = SentenceTransformer(modules=[*parts, modules.Normalize()], prompts=prompts, device="cpu")
    model.save(str(folder), create_model_card=False)
    shutil.rmtree(folder / "encoder")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("sentences")
    for name, options in {
        "base": {}, "a": {}, "b": {}, "mean": {"pooling": "mean"}, "asks": {"prompts": {"query": "ask: "}},
        "dense": {"dense": 1}, "dense_a": {"dense": 1}, "dense_b": {"dense": 2},
    }.items():  # fmt: skip
        write(root / name, seed=len(name) + ord(name[0]), **options)
    copy_files(root / "base", root / "plain", ["config.json", "model.safetensors", "tokenizer.json"])
    return root


@pytest.fixture
def root(written, tmp_path, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    return shutil.copytree(written, tmp_path / "models")


@pytest.fixture
def config(nlu_config, root):
    config = change(nlu_config, "model", root=str(root), base="base", expert="{task}", heads=())
    return change(change(config, "start", method="average"), "run", name="sentences", score=False)


def merged(config, *tasks, **model):
    return merge_alone(replace(change(config, "model", **model), tasks=list(tasks)), domain)


def embed(folder):
    return SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)


def test_a_merged_model_pools_as_its_base(config, root):
    """Expected: the first token of the merged encoder, of length one."""
    folder = merged(config, "a", "b")
    tokens = pico_tokenizer()(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        first = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[:, 0]
    torch.testing.assert_close(embed(folder), torch.nn.functional.normalize(first), atol=1e-5, rtol=0)
    assert (folder / MODULES_FILE).read_bytes() == (root / "base" / MODULES_FILE).read_bytes()
    assert json.loads((folder / "sentence_bert_config.json").read_text())
    card = (folder / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and 'model = SentenceTransformer("average")' in card


def test_weights_of_a_module_that_all_have_go_with_the_merge(config):
    folder = merged(config, "dense_a", base="dense")
    assert embed(folder).shape == (3, 8)


@pytest.mark.parametrize(
    ("task", "base", "said"),
    [
        (
            "mean",
            "base",
            r"mean/1_Pooling/config.json: pooling_mode is 'mean', 'cls' in .*base/1_Pooling/config.json: ",
        ),
        ("dense", "base", r"dense/modules.json has Transformer, Pooling, Dense, Normalize, .*base/modules.json has T"),
        ("dense_b", "dense", r"dense_b/2_Dense has other weights than .*dense/2_Dense, and those of a module are not"),
    ],
)
def test_an_expert_that_embeds_otherwise_is_refused_before_any_weight(config, monkeypatch, task, base, said):
    monkeypatch.setattr(Checkpoint, "read", None)
    with pytest.raises(InputError, match=said) as error:
        merged(config, "a" if base == "base" else "dense_a", task, base=base)
    assert "take modules.json out of" in str(error.value) and "\n" not in str(error.value)
    assert not config.run.dir.exists()


def test_the_encoders_alone_are_merged_where_the_base_is_one(config, root, capsys):
    folder = merged(config, "a", "mean", base="plain")
    assert not (folder / MODULES_FILE).exists() and not (folder / "1_Pooling").exists()
    assert "the base has no modules and the experts' differ, so that none are written" in capsys.readouterr().err
    mean = [read(root / name, "encoder.layer.0.output.dense.weight") for name in ("a", "mean")]
    torch.testing.assert_close(read(folder, "encoder.layer.0.output.dense.weight"), sum(mean) / 2)


def test_a_plain_base_gets_the_modules_of_its_experts(config, root, capsys):
    folder = merged(config, "a", "b", "plain", base="plain")
    assert f"a merged model gets the modules that its experts have, those of {root / 'a'}" in capsys.readouterr().err
    assert [type(module).__name__ for module in SentenceTransformer(str(folder), device="cpu")] == [
        "Transformer", "Pooling", "Normalize",
    ]  # fmt: skip


def test_other_prompts_are_said_and_the_base_s_are_kept(config, capsys):
    folder = merged(config, "a", "asks")
    assert "differ from the base's, and the base's are kept: prompts (asks)" in capsys.readouterr().err
    assert SentenceTransformer(str(folder), device="cpu").prompts["query"] == ""


def test_settings_that_the_base_lacks_are_said(root, capsys):
    """Of what releases have added or say elsewhere, as the greatest length, one side alone says nothing."""
    for file in (root / "base").glob("*sentence_*"):
        file.unlink()
    settings = {"max_seq_length": 8, "do_lower_case": True, "modality_config": {}}
    (root / "a" / "sentence_bert_config.json").write_text(json.dumps(settings))
    prompts = {"prompts": {"query": "x: "}, "default_prompt_name": "query", "similarity_fn_name": "cosine"}
    (root / "a" / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    for name in ("b", "asks"):
        (root / name / "sentence_bert_config.json").write_text('{"do_lower_case": false}')
    empty = {"prompts": {"query": "", "document": ""}, "default_prompt_name": None}
    (root / "b" / "config_sentence_transformers.json").write_text(json.dumps(empty))
    said = "default_prompt_name (a), do_lower_case (a), prompts (a)"
    compare_modules(root / "base", {"a": root / "a", "b": root / "b"})
    assert capsys.readouterr().err.strip().endswith(f"and the base's are kept: {said}")
    compare_modules(root / "plain", {"b": root / "b", "a": root / "a"})
    assert capsys.readouterr().err.strip().endswith(f"those of {root / 'b'}, which a merged model gets: {said}")
    compare_modules(root / "plain", {"b": root / "b"})
    assert "settings" not in capsys.readouterr().err


def test_files_of_an_earlier_release_say_the_same(root):
    """sentence-transformers 2 had a switch for each way of pooling, and its classes elsewhere."""
    modules_of_a = json.loads((root / "a" / MODULES_FILE).read_text())
    for module in modules_of_a:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    (root / "a" / MODULES_FILE).write_text(json.dumps(modules_of_a))
    (root / "a" / "1_Pooling" / "config.json").write_text(json.dumps(OLD))
    assert compare_modules(root / "base", {"a": root / "a"}) == root / "base"
    assert compare_modules(root / "base" / "model.safetensors", {}) == root / "base"
    (root / "a" / "1_Pooling" / "config.json").write_text(json.dumps(OLD | {"pooling_mode_mean_tokens": True}))
    with pytest.raises(InputError, match="pooling_mode is 'cls, mean', 'cls' in"):
        compare_modules(root / "base", {"a": root / "a"})


def test_an_encoder_in_a_folder_of_its_own_is_merged_alone(root, capsys):
    """As releases before 2 laid it out: all modules in folders beside each other."""
    shutil.copytree(root / "plain", root / "base" / "0_Transformer")
    listed = json.loads((root / "base" / MODULES_FILE).read_text())
    listed[0]["path"] = "0_Transformer"
    (root / "base" / MODULES_FILE).write_text(json.dumps(listed))
    assert compare_modules(root / "base" / "0_Transformer", {}) is None
    assert f"0_Transformer is the encoder of the model in {root / 'base'}, whose other" in capsys.readouterr().err
    assert compare_modules(root / "plain", {}) is None and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ("{", "modules.json is no list of the modules of a sentence-transformers model"),
        ([{"type": "sentence_transformers.models.Pooling"}], r"a field is missing .*'path'"),
        ([{"type": "sentence_transformers.models.Dense", "path": "../2_Dense"}], "leads out of the folder"),
        ([{"type": "sentence_transformers.models.Dense", "path": "9_Dense"}], "9_Dense, .*modules.json, holds no file"),
    ],
)
def test_damaged_modules_are_refused(root, listed, said):
    (root / "base" / MODULES_FILE).write_text(listed if isinstance(listed, str) else json.dumps(listed))
    with pytest.raises(InputError, match=said):
        compare_modules(root / "base", {})


def test_a_pickle_of_a_module_is_refused_and_named(root):
    (root / "dense" / "2_Dense" / "model.safetensors").rename(root / "dense" / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"2_Dense, .* no .safetensors .*convert_checkpoint.py makes one of pytorch_m"):
        compare_modules(root / "dense", {})


def test_modules_of_own_code_are_said_and_not_written(config, root, capsys):
    (root / "base" / MODULES_FILE).write_text(json.dumps([{"type": "custom_st.Transformer", "path": ""}]))
    assert not (merged(config, "a", "b") / MODULES_FILE).exists()
    assert "names custom_st.Transformer, code of its own, which is never copied" in capsys.readouterr().err


def test_modules_count_as_what_a_model_is_made_from(root):
    before = Checkpoint(root / "base").fingerprint()
    (root / "base" / "1_Pooling" / "config.json").write_text(json.dumps(OLD))
    assert Checkpoint(root / "base").fingerprint() != before


def test_of_the_hub_the_modules_are_fetched_too(root):
    names = [file.relative_to(root / "dense").as_posix() for file in (root / "dense").rglob("*") if file.is_file()]
    wanted = files_wanted(parse("hf://pico/dense"), [*names, "onnx/model.onnx", "2_Dense/pytorch_model.bin"])
    assert sorted(wanted) == sorted(names)
    assert files_wanted(parse("hf://pico/x"), ["model.safetensors", "1_a/b.json"]) == ["model.safetensors"]


PAIRS = [("w1 w2", "w3"), ("w4", "w5")]


def write_headed(folder, seed, opener, library, **options):
    """A BERT under a head, both at random, as a class of sentence-transformers saves it."""
    torch.manual_seed(seed)
    model = opener.from_config(pico_architecture("bert", num_labels=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    if library:
        library(str(folder), device="cpu", **options).save_pretrained(str(folder), create_model_card=False)


def write_rerankers(root, base):
    """A base and two CrossEncoders whose outputs are logits; the base is one too if `base` is its class."""
    write_headed(root / "base", 0, AutoModelForSequenceClassification, base)
    for seed, name in enumerate(("x", "y"), 1):
        write_headed(
            root / name, seed, AutoModelForSequenceClassification, CrossEncoder, activation_fn=torch.nn.Identity()
        )


def logits_of_average(root):
    """What the first reranker's head makes of the average of both encoders; the pooler before it is its own."""
    first, second = (AutoModelForSequenceClassification.from_pretrained(root / name).eval() for name in ("x", "y"))
    with torch.no_grad():
        for own, other in zip(first.bert.named_parameters(), second.bert.parameters(), strict=True):
            if "pooler" not in own[0]:
                own[1].add_(other).div_(2)
        tokens = pico_tokenizer()(*map(list, zip(*PAIRS, strict=True)), return_tensors="pt", padding=True)
        return first(**tokens).logits[:, 0]


@pytest.mark.parametrize("base", [CrossEncoder, None])
def test_a_cross_encoder_is_one_under_each_head_and_nowhere_else(config, tmp_path, capsys, base, monkeypatch):
    """Its modules want a head that the merged encoder has not: the library would draw it at random, without a word.
    Under the head it answers with the expert's activation, here none: a sigmoid would give values from 0 to 1."""
    monkeypatch.setattr(notices, "_said", set())
    write_rerankers(tmp_path, base)
    folder = merged(config, "x", "y", root=str(tmp_path), family="auto", heads=("x",))
    assert not list(folder.glob("*sentence*")) and not (folder / MODULES_FILE).exists()
    assert "SentenceTransformer" not in (folder / "README.md").read_text()
    said = f"modules.json of {'base, ' if base else ''}x, y is of a CrossEncoder, whose head is not merged"
    assert capsys.readouterr().err.count(said) == 1
    found = CrossEncoder(str(folder / "heads" / "x"), device="cpu").predict(PAIRS, convert_to_tensor=True)
    torch.testing.assert_close(found, logits_of_average(tmp_path), atol=1e-5, rtol=0)


@pytest.mark.parametrize("which", ["base", "x"])
def test_a_sparse_encoder_is_refused_for_its_head_over_words(config, tmp_path, which, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read", None)
    for name in ("base", "x"):
        write_headed(tmp_path / name, len(name), AutoModelForMaskedLM, SparseEncoder if name == which else None)
    with pytest.raises(InputError) as error:
        merged(config, "x", root=str(tmp_path), family="auto")
    place = tmp_path / which
    assert str(error.value) == (
        f"{place / MODULES_FILE} is of a SparseEncoder, with a head over words, which is not merged: the library would "
        f"draw one at random; take {MODULES_FILE} out of {place} to merge the encoders alone"
    )
    (place / MODULES_FILE).unlink()
    monkeypatch.undo()
    assert not (merged(config, "x", root=str(tmp_path), family="auto") / MODULES_FILE).exists()


def test_a_reranker_of_a_language_model_keeps_its_modules(root):
    """Its scores are logits of two words, by the head over words that goes into a merged language model, not into a
    merged encoder."""
    listed = [
        {"type": "sentence_transformers.base.modules.transformer.Transformer", "path": ""},
        {"type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore", "path": "1_LogitScore"},
    ]
    (root / "base" / MODULES_FILE).write_text(json.dumps(listed))
    (root / "base" / "sentence_bert_config.json").write_text('{"transformer_task": "text-generation"}')
    assert compare_modules(root / "base", {}, has_words=True) == root / "base"
    with pytest.raises(InputError, match="is of a model with a head for text-generation, which is not merged"):
        compare_modules(root / "base", {})
