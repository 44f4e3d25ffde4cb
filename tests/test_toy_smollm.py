"""SmolLM2's tasks: what is drawn, what is held out, and that what a model is taught is what is counted as right."""

from importlib.util import find_spec

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.config import ROOT
from NLG.scoring import RULES, TASKS
from toy import nlu, smollm, smollm_data
from toy.smollm_data import SIZES, TESTS

NEEDS_NEWS = pytest.mark.skipif(find_spec(smollm_data.NEWSPAPER) is None, reason="needs the extra smollm")
OFFLINE = [task for task in TESTS if task != "news"]


@pytest.fixture(scope="module")
def prose():
    return nlu.unpack(load_file(nlu.PACKED))[2]["prose"]


def problem(task, example):
    return RULES[TASKS[TESTS[task]].rule].problem(example)


@pytest.mark.parametrize("task", [*OFFLINE, pytest.param("news", marks=NEEDS_NEWS)])
def test_no_test_example_is_among_those_to_train_on(task, prose):
    train, test = (smollm_data.examples(task, split, prose) for split in ("train", "test"))
    assert len(test) == SIZES["test"] and len(train) > 1500
    assert not {problem(task, e) for e in train} & {problem(task, e) for e in test}
    assert test == smollm_data.examples(task, "test", prose), "drawn from seeds"
    assert len(smollm_data.train_examples(task, prose)) == int(0.9 * len(train)), "without the validation cut"


@pytest.mark.parametrize("task", [*OFFLINE, pytest.param("news", marks=NEEDS_NEWS)])
def test_what_a_model_is_taught_counts_as_right(task, prose):
    rule = RULES[TASKS[TESTS[task]].rule]
    some = smollm_data.examples(task, "test", prose)[:20]
    assert all(rule.is_right(smollm_data.solution(e), e) for e in some)
    others = [*some[1:], some[0]]
    wrong = [e for e, other in zip(some, others, strict=True) if not rule.is_right(smollm_data.solution(other), e)]
    assert len(wrong) > 10, "and that of another problem does not"


def test_dates_are_written_anew(prose):
    rows = smollm_data.examples("records", "test", prose)
    months = {name: f"-{i:02}-" for i, name in enumerate(smollm_data.MONTHS, 1)}
    named = [(e["question"], e["answer"]) for e in rows if any(name in e["question"] for name in months)]
    assert len(named) > 100
    assert all(any(name in q and number in a for name, number in months.items()) for q, a in named)


def test_the_committed_adapters_are_small_and_of_every_layer():
    files = {task: smollm.HERE / task / "adapter_model.safetensors" for task in TESTS}
    assert sum(file.stat().st_size for file in files.values()) < 16e6
    for file in files.values():
        assert len(load_file(file)) == 30 * len(smollm.PARTS) * 2
    assert not (smollm.HERE / "math/README.md").exists()


def test_without_its_package_the_toy_says_how_it_is_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match=r"needs the package no_such_package: pip install"):
        smollm.write_base(tmp_path)


@pytest.mark.slow
def test_a_merged_model_chats_with_stock_transformers(tmp_path):
    """The whole of the toy: base and experts made, merged by task arithmetic, opened and asked a question."""
    from common.command import parse
    from common.pipeline import merge_alone
    from NLG import domain

    smollm.make(tmp_path / "toy", retrain=False)
    options = [
        "--config", str(ROOT / "configs/nlg/smollm.yaml"), "--model.root", str(tmp_path / "toy/checkpoints"),
        "--start.method", "ta", "--run.score", "false", "--run.root", str(tmp_path),
    ]  # fmt: skip
    config = parse("", options)
    merge_alone(config, domain)
    assert "Paris" in said_by(tmp_path / "toy/checkpoints/smollm2", "What is the capital of France?")
    article = "Shares in the bank fell by ten percent after it warned of losses."
    asked = f"{article}\nIs this from business, entertainment, politics, sports or tech?"
    assert said_by(config.run.dir / "merged/ta", asked) == "business<|im_end|>"


def said_by(folder, text):
    """What a model answers in its chat template, opened by stock transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr(), "tied"
    said = [{"role": "user", "content": text}]
    asked = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return tokenizer.decode(answer)
