"""A row of results is known while what scores the model is as it was: heads, prompts, tokenizers, types, not paths."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from common.domain import Scored
from common.evaluation.scoring import publish, results_of, score_run
from common.evaluation.tuning import choose_hyperparameters
from common.io.checkpoints import Checkpoint, write_tensors
from common.io.hashes import digest
from compare import compare
from helpers import change, edit_config, rewrite
from NLG import domain as nlg
from NLG.scoring import TASKS as TEST_SETS
from NLU import domain as nlu
from pico_grid import by_split
from pico_hf_classifiers import pico_classifier_config, write_pico_classifiers
from Vision import domain as vision
from Vision import open_clip_models, zero_shot

pytestmark = pytest.mark.usefixtures("no_figures")
WEIGHTS = "open_clip_model.safetensors"


def scored_anew(config, domain, score=None):
    """{(test set, model)} of what a run scores that it does not know; by the domain's own `score`, or another."""
    asked = Counter()

    def counted(config, task, checkpoints, device):
        asked.update((task, name) for name in checkpoints)
        return (score or domain.score)(config, task, checkpoints, device)

    score_run(config, SimpleNamespace(**vars(domain) | {"score": counted}))
    return set(asked)


def half(config, task, checkpoints, device):
    """A score that opens nothing."""
    return iter([(name, Scored(0.5, 7, "")) for name in checkpoints])


def both(*tests):
    return {(test, name) for test in tests for name in ("Pretrained", "Individual")}


def values_of(config):
    return {(row["task"], row["method"]): row["value"] for row in results_of(config)}


@pytest.fixture
def own_clip(pico_inputs, pico_config, tmp_path):
    """A folder of pico CLIPs that a test may damage, and the config that reads it."""
    shutil.copytree(pico_inputs / "clip", tmp_path / "clip")
    return tmp_path / "clip", change(pico_config, "model", root=str(tmp_path / "clip"))


def test_a_head_in_a_file_is_another_scorer_of_its_test_set_alone(own_clip):
    root, config = own_clip
    assert scored_anew(config, vision) == both("MNIST", "SVHN")
    before = values_of(config)
    head = zero_shot.head_of(config.model, "MNIST", open_clip_models.text_directions)
    write_tensors(root / "heads/MNIST.safetensors", {"weight": head.roll(1, 0)})
    config = change(config, "model", head="heads/{task}.safetensors")
    assert scored_anew(config, vision) == both("MNIST")
    fresh = change(config, "run", name="fresh")
    score_run(fresh, vision)
    assert values_of(config) == values_of(fresh) != before
    (root / "heads").rename(root / "moved")
    assert scored_anew(change(config, "model", head="moved/{task}.safetensors"), vision) == set()


def test_other_class_names_or_prompts_are_another_scorer(pico_config, monkeypatch):
    score_run(pico_config, vision)
    row = vision.TASKS["MNIST"]
    monkeypatch.setitem(vision.TASKS, "MNIST", replace(row, templates=["a {c}"], classes=[*map(str, range(10))]))
    assert scored_anew(pico_config, vision) == both("MNIST")
    fresh = change(pico_config, "run", name="fresh")
    score_run(fresh, vision)
    assert values_of(pico_config) == values_of(fresh)
    monkeypatch.setitem(vision.TASKS, "MNIST", replace(vision.TASKS["MNIST"], test_size=1))  # which decides no answer
    assert scored_anew(pico_config, vision) == set()


@pytest.mark.parametrize("changed", ["text tower", "preprocessing", "another text"])
def test_what_is_beside_the_image_tower_of_a_clip_scores_its_experts(own_clip, changed):
    """Experts are towers alone, whose rows say nothing of the base."""
    root, config = own_clip
    if changed == "another text":
        shutil.copytree(root / "base", root / "text")
        rewrite(root / "base" / WEIGHTS, lambda t: {n: x for n, x in t.items() if n.startswith("visual.")})
        config = change(config, "model", text="text")
    score_run(config, vision)
    where = root / ("text" if changed == "another text" else "base")
    if changed == "preprocessing":
        file = where / "open_clip_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"preprocess_cfg": {"mean": [0, 0, 0]}}))
    else:
        rewrite(where / WEIGHTS, lambda t: t["text_projection"].mul_(-1))
    assert scored_anew(config, vision) == both("MNIST", "SVHN")


def test_the_same_bytes_elsewhere_are_the_same_scorer(own_clip):
    root, config = own_clip
    score_run(config, vision)
    shutil.move(root, root.with_name("moved"))
    assert scored_anew(change(config, "model", root=str(root.with_name("moved"))), vision) == set()


def test_a_classifier_is_scored_with_its_expert_s_head_and_labels(tmp_path, pico_inputs):
    write_pico_classifiers(tmp_path, "vit")
    config = pico_classifier_config(tmp_path, pico_inputs / "data")
    score_run(config, vision)
    edit_config(tmp_path / "MNIST", id2label={str(i): str((i + 1) % 10) for i in range(10)})
    assert scored_anew(config, vision) == both("MNIST")
    rewrite(tmp_path / "SVHN/model.safetensors", lambda t: t["classifier.bias"].add_(1))
    assert scored_anew(config, vision) == both("SVHN")


@pytest.mark.parametrize("changed", ["head", "labels", "tokenizer"])
def test_an_encoder_is_scored_with_its_expert_s_files(own_nlu, changed):
    score_run(own_nlu, nlu)
    expert = own_nlu.model.path("expert", "CoLA")
    if changed == "head":
        rewrite(expert / "model.safetensors", lambda t: t["classifier.out_proj.weight"].mul_(-1))
    elif changed == "labels":
        edit_config(expert, id2label={"0": "wrong", "1": "right"}, label2id={"wrong": 0, "right": 1})
    else:
        file = expert / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 3}))
    assert scored_anew(own_nlu, nlu) == both("CoLA")
    fresh = change(own_nlu, "run", name="fresh")
    score_run(fresh, nlu)
    assert values_of(own_nlu) == values_of(fresh)


def test_the_type_and_what_generates_score_a_language_model(nlg_config, monkeypatch):
    """A row of a type that was asked for is none of the default."""
    every = both("arithmetic", "functions")
    asked = change(nlg_config, "eval", dtype="bfloat16")
    assert scored_anew(asked, nlg, half) == every
    assert scored_anew(asked, nlg, half) == set()
    assert scored_anew(nlg_config, nlg, half) == every
    assert scored_anew(change(nlg_config, "eval", backend="lm-eval-hf"), nlg, half) == every
    assert scored_anew(nlg_config, nlg, half) == every
    monkeypatch.setitem(TEST_SETS, "arithmetic", replace(TEST_SETS["arithmetic"], prompt="Q: {problem}\n"))
    assert scored_anew(nlg_config, nlg, half) == both("arithmetic")


def test_the_tokenizer_of_an_expert_scores_its_test_sets(own_nlg):
    root, config = own_nlg
    score_run(config, SimpleNamespace(**vars(nlg) | {"score": half}))
    file = root / "math/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": True}))
    assert scored_anew(config, nlg, half) == both("arithmetic")


def test_rows_of_before_are_shown_and_scored_anew(pico_config, capsys):
    score_run(pico_config, vision)
    file = pico_config.run.dir / "results.json"
    old = json.loads(file.read_text())
    assert {len(row.pop("scorer")) for row in old["rows"]} == {16}
    file.write_text(json.dumps(old))
    publish(pico_config, vision, results_of(pico_config), {})
    assert "Pretrained" in capsys.readouterr().out
    assert scored_anew(pico_config, vision) == both("MNIST", "SVHN")
    assert all(row["scorer"] for row in results_of(pico_config))


@pytest.mark.parametrize("kind", ["merge", "adaptation"])
def test_a_search_tries_again_what_is_scored_otherwise(pico_config, kind, monkeypatch):
    search = {"ta": {"scale": [0.1, 0.2]}} if kind == "merge" else {"fda": {"blend": [0.5]}}
    config = change(pico_config, "compare", starts=["ta"], inits=["weight"], search=search)
    seen = Counter()

    def score(config, task, checkpoints, device):
        seen[config.eval.split] += 1
        return by_split(config, task, checkpoints, device)

    domain = SimpleNamespace(**vars(vision) | {"score": score})
    find = choose_hyperparameters if kind == "merge" else compare
    for expected in (4, 4):  # two candidates on two test sets; nothing the second time
        find(config, domain)
        assert seen["validation_cut"] == expected
    monkeypatch.setitem(vision.TASKS, "MNIST", replace(vision.TASKS["MNIST"], templates=["a {c}"]))
    find(config, domain)
    assert seen["validation_cut"] == 8


@pytest.mark.parametrize("name", ["vision", "nlu", "nlg"])
def test_no_model_is_opened_to_tell_a_scorer(name, request, monkeypatch):
    config = request.getfixturevalue({"vision": "pico_config"}.get(name, f"{name}_config"))
    domain = {"vision": vision, "nlu": nlu, "nlg": nlg}[name]
    expected = {test: digest(domain.scorer(config, test)) for test in config.tests}
    monkeypatch.setattr(Checkpoint, "__init__", None)
    assert {test: digest(domain.scorer(config, test)) for test in config.tests} == expected
    assert len({*expected.values()}) == len(config.tests)


def test_scored_as_stored_is_another_scorer_than_in_float32(nlg_config, monkeypatch):
    """Without eval.dtype that hangs on there being a GPU; with it, or with a harness, it does not."""

    def told(number: int, **options) -> str:
        monkeypatch.setattr("torch.cuda.device_count", lambda: number)
        return digest(nlg.scorer(change(change(nlg_config, "eval", **options), "run", device="auto"), "arithmetic"))

    assert told(0) != told(1)
    assert told(0, dtype="bfloat16") == told(1, dtype="bfloat16") != told(0)
    assert told(0, backend="lm-eval-hf") == told(1, backend="lm-eval-hf")
