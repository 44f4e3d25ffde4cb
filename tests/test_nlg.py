"""The language wing end to end on pico models: both boxes, vocabularies, shards, resuming, and every refusal."""

import json
import os
import pkgutil
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from pico_nlg import (
    PICO_TASKS,
    VOCABULARY,
    pico_config,
    pico_model,
    pico_tokenizer,
    save,
    write_pico_models,
    write_pico_tests,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.command import parse
from common.config import ROOT, Adapt, Anchors, Compare, Config, Eval, Model, Run, Start
from common.core.errors import InputError
from common.core.task_vectors import subtract
from common.evaluation.scoring import score_run
from common.fda.matching import matching_gradient
from common.io.checkpoints import Checkpoint, write_tensors
from common.io.model_files import INDEX_FILE
from common.io.shards import publish_shards, stage_shards
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import describe
from NLG import domain
from NLG.decoders import DECODER
from NLG.export import stored_dtype
from Vision import domain as vision

EMBEDDING, HEAD = DECODER.vocabulary
NORM = "model.norm.weight"


def change(config, section, **fields):
    return replace(config, **{section: replace(getattr(config, section), **fields)})


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def read(path, name):
    return Checkpoint(path).read([name])[name]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Models of every family with experts of one token more, and test sets; read only."""
    root = tmp_path_factory.mktemp("nlg")
    for family in domain.FAMILIES:
        write_pico_models(root / family, family)
    write_pico_tests(root / "data")
    return root


@pytest.fixture
def config(inputs, tmp_path):
    return change(pico_config(inputs, tmp_path), "run", score=False)


@pytest.fixture
def own(inputs, config, tmp_path):
    """A copy of the pico Llamas that a test may damage, and the config that reads it."""
    shutil.copytree(inputs / "llama", tmp_path / "llama")
    return tmp_path / "llama", change(config, "model", root=str(tmp_path / "llama"))


def rewrite(folder, edit):
    tensors = dict(Checkpoint(folder).read_under(""))
    edit(tensors)
    write_tensors(folder / "model.safetensors", tensors)


# ---- the pipeline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", domain.FAMILIES)
def test_stock_transformers_opens_what_was_merged_and_generates(inputs, tmp_path, family):
    config = pico_config(inputs, tmp_path, family)
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


def test_every_start_gives_a_checkpoint(config):
    construct(config, domain)
    for start in ("pretrained", "average", "ta", "tsv", "wudi"):
        folder = adapt(change(config, "start", method=start), domain)
        assert AutoModelForCausalLM.from_pretrained(folder)(torch.arange(9)[None]).logits.isfinite().all()


def test_task_arithmetic_by_hand(config):
    """θ₀ + ½(τ₁ + τ₂) for every tensor, rows that the base lacks filled with the mean of its others."""
    folder = merge_alone(config, domain)
    base = AutoModelForCausalLM.from_pretrained(config.model.path("base")).state_dict()
    experts = [AutoModelForCausalLM.from_pretrained(config.model.path("expert", t)).state_dict() for t in PICO_TASKS]
    for name in (EMBEDDING, HEAD):
        base[name] = torch.cat([base[name], base[name].mean(0, keepdim=True)])
    for name, theta_0 in base.items():
        expected = theta_0 + 0.5 * sum(expert[name] - theta_0 for expert in experts)
        torch.testing.assert_close(read(folder, name), expected, msg=name)


def test_only_the_mlps_are_adapted_and_the_rest_is_the_starts(config):
    construct(config, domain)
    start, adapted = (Checkpoint(f(config, domain)) for f in (merge_alone, adapt))
    changed = {n for n in start.names() if not torch.equal(start.read([n])[n], adapted.read([n])[n])}
    assert changed == {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 1) for m in ("gate", "up", "down")}
    base = Checkpoint(adapt(change(config, "adapt", rest="pretrained", label="base"), domain))
    torch.testing.assert_close(base.read([NORM])[NORM], read(config.model.path("base"), NORM))


def test_every_weight_is_read_once_in_a_stage(config, monkeypatch):
    reads = Counter()
    plain = Checkpoint.read

    def counting(self, names):
        names = list(names)
        reads.update((self.path, name) for name in names)
        return plain(self, names)

    monkeypatch.setattr(Checkpoint, "read", counting)
    mlps, tensors = 2 * 3, 2 * 9 + 3
    for stage, expected in [(construct, 3 * mlps), (merge_alone, 3 * tensors)]:
        stage(config, domain)
        assert set(reads.values()) == {1} and len(reads) == expected
        reads.clear()
    adapt(config, domain)  # base, experts and start for the blocks, the start for the rest, the adapted blocks
    assert set(reads.values()) == {1} and len(reads) == 4 * mlps + (tensors - mlps) + mlps


def test_a_start_made_elsewhere_is_taken(config, tmp_path):
    construct(config, domain)
    expected = contents(adapt(config, domain))
    shutil.copytree(config.run.dir / "merged" / "ta", tmp_path / "elsewhere")
    shutil.rmtree(config.run.dir / "merged")
    given = change(config, "start", checkpoint=str(tmp_path / "elsewhere"))
    found = contents(adapt(given, domain))
    assert not (config.run.dir / "merged" / "ta").exists()
    assert {n: b for n, b in found.items() if n.endswith("safetensors")} == {
        n: b for n, b in expected.items() if n.endswith("safetensors")
    }
    with pytest.raises(InputError, match="start.checkpoint needs start.method to name it"):
        adapt(change(given, "start", method="pretrained"), domain)
    score_run(change(given, "start", method="dare"), domain)  # of any name
    assert "DARE" in (config.run.dir / "table.md").read_text()
    with pytest.raises(InputError, match=r"there is no checkpoint at .*nowhere"):
        adapt(change(config, "start", checkpoint="nowhere"), domain)


def test_a_coefficient_for_each_task_or_for_their_sum(config):
    construct(config, domain)
    one, two = (
        Checkpoint(adapt(change(config, "adapt", per_task=per_task, label=str(per_task)), domain)).read_under("")
        for per_task in (False, True)
    )
    assert any(not torch.equal(one[n], two[n]) for n in one)
    still = change(change(config, "adapt", lr=1e-12, label="still"), "start", method="ta")
    ta = Checkpoint(merge_alone(config, domain)).read_under("")
    for per_task in (False, True):  # both begin at task arithmetic
        folder = adapt(change(still, "adapt", per_task=per_task, label=f"still {per_task}"), domain)
        for name, theta in Checkpoint(folder).read_under("").items():
            torch.testing.assert_close(theta, ta[name])


def test_released_anchors_of_two_axes_are_used_in_place(config, tmp_path):
    for task in PICO_TASKS:
        (tmp_path / "released" / task).mkdir(parents=True)
        for layer in (1, 2):
            x_AD = np.random.default_rng(layer).normal(size=(12, 16)).astype(np.float32)
            np.save(tmp_path / "released" / task / f"dual_anchors_layer_{layer}.npy", x_AD)
    adapt(change(config, "anchors", source=str(tmp_path / "released")), domain)
    np.save(tmp_path / "released" / "code" / "dual_anchors_layer_2.npy", np.ones((12, 1, 16), np.float32))
    with pytest.raises(InputError, match=r"layer_2.npy holds anchors of shape \(12, 1, 16\); 2 axes with width 16"):
        again = change(config, "anchors", source=str(tmp_path / "released"))
        adapt(change(again, "adapt", label="again"), domain)


# ---- chunks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["cos", "mse"])
@pytest.mark.parametrize("chunk", [1, 4, 5, 9, 10])
def test_the_gradient_in_chunks_is_the_whole_one(distance, chunk):
    torch.manual_seed(0)
    module = pico_model("llama").model.layers[0].mlp.double()
    block = DECODER.pure(module)
    theta_0 = dict(module.named_parameters())
    theta_t = {n: p + 0.1 * torch.randn_like(p) for n, p in theta_0.items()}
    x_ATD = torch.randn(9, 1, 16, dtype=torch.float64)
    setting = block, theta_0, theta_t, subtract(theta_t, theta_0), x_ATD
    expected = matching_gradient(*setting, distance=distance)
    found = matching_gradient(*setting, distance=distance, chunk=chunk)
    assert expected[1].abs().max() > 1e-6
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


def test_anchors_made_in_chunks_are_equal_to_rounding_and_need_no_new_run(config):
    construct(config, domain)
    before = contents(config.run.dir / "anchors")
    construct(change(config, "anchors", chunk=5), domain)  # kept: the chunk is no part of what they are
    assert contents(config.run.dir / "anchors") == before
    construct(change(change(config, "anchors", chunk=5), "run", name="chunks"), domain)
    for name in before:
        one, two = (read(config.run.dir.with_name(run) / "anchors" / name, "anchors") for run in ("pico", "chunks"))
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


# ---- vocabularies and types ------------------------------------------------------------------------------------------


def test_unlike_vocabularies_are_refused_unless_a_policy_is_chosen(config):
    refused = change(config, "model", vocabulary="refuse")
    for stage in (construct, adapt, merge_alone):
        with pytest.raises(
            InputError, match=r"math has 42 tokens, .*base has 41; model.vocabulary may be pad .* or base"
        ):
            stage(refused, domain)
    assert not config.run.dir.exists()


def test_the_policy_base_cuts_to_the_bases_tokens(config):
    cut = change(config, "model", vocabulary="base")
    folder = merge_alone(cut, domain)
    assert Checkpoint(folder).shapes[EMBEDDING] == Checkpoint(folder).shapes[HEAD] == (VOCABULARY, 16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == VOCABULARY
    padded = merge_alone(change(config, "run", name="padded"), domain)
    for name in (EMBEDDING, HEAD):
        assert torch.equal(read(folder, name), read(padded, name)[:VOCABULARY])


def test_an_expert_with_two_tokens_more_and_one_with_none(own):
    root, config = own
    expert = AutoModelForCausalLM.from_pretrained(root / "math")
    expert.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    save(expert, pico_tokenizer(), root / "math")
    shutil.copytree(root / "base", root / "code", dirs_exist_ok=True)
    merged = read(merge_alone(config, domain), EMBEDDING)
    base, math = (read(root / name, EMBEDDING) for name in ("base", "math"))
    assert len(merged) == VOCABULARY + 2
    torch.testing.assert_close(merged[-2:], base.mean(0) + 0.5 * (math[-2:] - base.mean(0)))


def test_equal_vocabularies_need_no_policy(own):
    root, config = own
    write_pico_models(root, "llama", extra_tokens=0)
    folder = merge_alone(change(config, "model", vocabulary="refuse"), domain)
    assert Checkpoint(folder).shapes[HEAD] == (VOCABULARY, 16)


@pytest.mark.parametrize("tied", ["base", "math"])
def test_tied_and_untied_models_do_not_merge(own, tied):
    root, config = own
    rewrite(root / tied, lambda t: t.pop(HEAD))
    with pytest.raises(InputError, match=rf"has a head {HEAD}, .*{tied} is tied and has the embedding for it"):
        construct(config, domain)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", ""])
def test_the_merged_type_is_chosen_or_the_bases(own, dtype):
    root, config = own
    AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16).save_pretrained(root / "base")
    folder = merge_alone(change(config, "model", dtype=dtype), domain)
    wanted = getattr(torch, dtype or "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == wanted
    assert stored_dtype(folder) == wanted
    exact = merge_alone(change(change(config, "model", dtype="float32"), "run", name="exact"), domain)
    for name in Checkpoint(folder).names():
        assert torch.equal(read(folder, name), read(exact, name).to(wanted).float())


def test_weights_beyond_the_chosen_type_are_named(own):
    root, config = own
    rewrite(root / "math", lambda t: t[NORM].fill_(1e6))
    with pytest.raises(
        InputError, match=rf"{NORM}: the merged weights reach 5e\+05, too much for model.dtype torch.float16"
    ):
        merge_alone(change(config, "model", dtype="float16"), domain)
    assert not (config.run.dir / "merged" / "ta" / INDEX_FILE).exists()


# ---- interruptions ---------------------------------------------------------------------------------------------------


def dying(monkeypatch, where, survived):
    """Let a function go through so many times and then be interrupted."""
    plain, calls = pkgutil.resolve_name(where), iter(range(99))

    def function(*args, **kwargs):
        if next(calls) == survived:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(where, function)


def test_interrupted_anywhere_it_goes_on_and_ends_with_the_same_bytes(config, monkeypatch):
    monkeypatch.setattr("common.io.shards.stage_shards.__defaults__", (4000,))  # several shards
    alone, stopped = (change(config, "run", name=name) for name in ("alone", "stopped"))
    for stage in (construct, merge_alone, adapt):
        stage(alone, domain)
    moments = {
        construct: [("common.pipeline.save_anchors", 1), ("common.pipeline.save_anchors", 2)],
        merge_alone: [
            ("common.io.shards.write_stored", 2),
            ("common.io.shards.os.replace", 1),
            ("common.io.shards.write_text", 0),
            ("common.assembly.write_text", 0),
        ],
        adapt: [
            ("common.pipeline.write_tensors", 1),
            ("common.io.shards.write_stored", 1),
            ("NLG.export.link_weights", 0),
            ("common.assembly.shutil.rmtree", 0),
        ],
    }
    for stage, blows in moments.items():
        for where, survived in blows:
            with monkeypatch.context() as patch:
                dying(patch, where, survived)
                with pytest.raises(KeyboardInterrupt):
                    stage(stopped, domain)
            whole = list((stopped.run.dir / "merged").glob("*/provenance.json"))
            assert all(len(Checkpoint(file.parent).shapes) == 21 for file in whole)
        stage(stopped, domain)
    assert len(list((alone.run.dir / "merged" / "ta").glob("*.safetensors"))) > 2
    for folder in ("anchors", "merged"):
        assert contents(alone.run.dir / folder) == contents(stopped.run.dir / folder)


def test_a_second_run_touches_nothing(config):
    times = []
    for _ in range(2):
        construct(config, domain)
        adapt(config, domain)
        times.append({f: f.stat().st_mtime_ns for f in sorted(config.run.dir.rglob("*.safetensors"))})
    assert times[0] == times[1] and len(times[0]) == 4 + 2 * 2


def test_other_output_than_before_is_refused_by_field(config):
    merge_alone(config, domain)
    for field, value in {"dtype": "float16", "vocabulary": "base", "tokenizers": ()}.items():
        with pytest.raises(InputError, match=rf"provenance.json was made with inputs\.model\.{field} = "):
            merge_alone(change(config, "model", **{field: value}), domain)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_an_expert_of_another_depth_is_refused_by_tensor(own):
    root, config = own
    save(pico_model("llama", num_hidden_layers=3, vocab_size=VOCABULARY + 1), pico_tokenizer(), root / "code")
    with pytest.raises(InputError, match=r"code: model.layers.2.input_layernorm.weight: extra"):
        construct(config, domain)
    save(pico_model("llama", num_hidden_layers=1, vocab_size=VOCABULARY + 1), pico_tokenizer(), root / "code")
    with pytest.raises(InputError, match=r"code: model.layers.1.input_layernorm.weight: missing"):
        construct(config, domain)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])  # the tensors of the second are those of a Llama
def test_an_expert_of_another_architecture_is_refused(own, family):
    root, config = own
    save(pico_model(family, vocab_size=VOCABULARY + 1), pico_tokenizer(), root / "code")
    with pytest.raises(InputError, match=rf"code/config.json has model type '{family}', that of .*base has 'llama'"):
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
    stage_shards(tensors.items(), folder, 4000)
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
def test_a_damaged_expert_is_named_and_what_was_made_stays(own, how, message):
    root, config = own
    for stage in (construct, adapt):
        stage(config, domain)
    before = contents(config.run.dir)
    first, second = damage(root / "code", how)
    for stage in (construct, merge_alone, adapt):
        with pytest.raises(InputError, match=message.format(first=first, second=second)) as refusal:
            stage(config, domain)
        assert "\n" not in str(refusal.value)
    assert contents(config.run.dir) == before


def test_a_base_of_another_family_is_refused(config):
    with pytest.raises(InputError, match="base/config.json has model type 'llama', model.family is 'gemma'"):
        construct(change(config, "model", family="gemma"), domain)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("", r"there is no .*nowhere/config.json, and model.arch does not give its text"),
        ("llama", "model.arch is no config of a model that transformers knows"),
        ('{"hidden_size": 8}', "model.arch is no config of a model that transformers knows"),
        ('{"model_type": "bert"}', "model.arch has model type 'bert', model.family is 'llama'"),
    ],
)
def test_an_architecture_that_cannot_be_had_is_named(config, arch, message):
    with pytest.raises(InputError, match=message):
        construct(change(config, "model", base="nowhere", arch=arch), domain)


def test_test_sets_are_checked_before_anything_is_made(config):
    for tests, message in [
        (
            {"math": ["nothing"]},
            "unknown task 'nothing'; choose from GSM8K, MATH, HumanEval, MBPP, arithmetic, functions",
        ),
        ({}, "unknown task 'math'"),
        ({"math": ["MATH"], "code": ["MATH"]}, "eval.tests names one test set for two tasks: MATH, MATH"),
        ({"math": [], "code": [], "law": []}, "eval.tests names the task 'law'; tasks are math, code"),
    ]:
        with pytest.raises(InputError, match=message):
            construct(change(config, "eval", tests=tests), domain)
    unscored = change(change(config, "eval", tests={"math": [], "code": []}), "run", score=True)
    merge_alone(unscored, domain)
    assert not (config.run.dir / "results.json").exists()


def test_a_tokenizer_that_is_not_there_is_named_before_anything_is_made(own):
    root, config = own
    for file in (root / "code").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"model.tokenizers names code, but .*code holds none of tokenizer.json"):
        merge_alone(config, domain)
    assert not config.run.dir.exists()


def test_what_is_for_language_models_is_refused_elsewhere(pico_inputs):
    for field, value in {"dtype": "float16", "vocabulary": "pad", "tokenizers": ("a",)}.items():
        with pytest.raises(InputError, match=f"model.{field} is for language models, not for vision"):
            vision_config = change(pico_vision(pico_inputs), "model", **{field: value})
            construct(vision_config, vision)


def pico_vision(inputs):
    parts = [section() for section in (Anchors, Start, Adapt, Eval, Compare, Run)]
    return Config("vision", Model(root=str(inputs / "clip"), base="base", expert="{task}"), ["MNIST"], *parts)


def paper_plan(*arguments):
    file = str(ROOT / "configs/nlg/llama2_13b.yaml")
    return describe(parse("", ["--config", file, "--model.root", "/nowhere", *arguments]), domain)


def test_the_paper_config_is_planned_without_any_file():
    text = paper_plan()
    for line in (
        "MISSING    base: there is no checkpoint at /nowhere/Llama-2-13b-hf",
        "810 MiB in 3 tensors, 40 blocks",
        "8192 x 1 x 5120, 160.0 MiB",
        "80 units of 200 steps",
        "12.50 GiB",  # of anchors
        "24.24 GiB a model in torch.float16",  # 13.0 G weights
        "40 units of 50 epochs, 16384 anchors each",
    ):
        assert line in text


def test_chunks_take_less_memory_and_more_work_in_the_plan():
    def numbers(*arguments):
        text = paper_plan(*arguments)
        memory = float(text.split("construct, memory  about ")[1].split()[0])
        return memory, float(text.split("steps, ")[1].split()[0])

    (whole, fewer), (chunked, more) = numbers(), numbers("--anchors.chunk", "512")
    assert chunked < 0.6 * whole and fewer < more < 2 * fewer


def test_os_errors_while_linking_are_reported(config, monkeypatch):
    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.symlink_to", no_links)
    with pytest.raises(InputError, match=r"cannot link .*code/model-.*model.tokenizers: .*not permitted"):
        merge_alone(config, domain)
    assert os.listdir(config.run.dir / "merged" / "ta" / "code")
