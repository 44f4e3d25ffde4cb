"""What is a right answer or a passing program, by hand-made cases, and the generation loop against a plain one."""

import json
import os
import time
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.core.errors import InputError
from common.evaluation.answers import scored
from NLG import scoring
from NLG.answers import (
    boxed,
    is_right_expression,
    is_right_number,
    is_right_text,
    normalised,
    stated_answer,
    stated_number,
)
from NLG.generation import before, complete, open_tokenizer
from NLG.harness import TASKS_FOLDER
from NLG.lm_eval_tasks import rules
from NLG.programs import program_in, runs
from NLG.scoring import RULES, TASKS, examples_of, prompts_of, score
from pico_nlg import pico_config, pico_model, pico_tokenizer, save, write_pico_tests

# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tail", "number"),
    [
        ("18", 18), ("$18.", 18), ("-7 degrees", -7), ("1,234.5", 1234), ("1,234,567", 1234567), ("7/2", 4),
        ("7 / 2", 4), ("2/3", 1), ("about 3 or 4", 3), (".75", 1), ("+5", 5), ("5,", 5), ("1/0", None), ("none", None),
        ("", None), ("9" * 400, None), ("12.00 dollars", 12), ("10%", 10), ("x = 3", 3), ("\\frac{1}{2}", 1),
    ],
)  # fmt: skip
def test_the_stated_number(tail, number):
    assert stated_number(f"First 2. The answer is: 99. Then The answer is: {tail}") == number


def test_without_the_marker_there_is_no_answer():
    assert stated_answer("It is 18.") is None and stated_number("It is 18.") is None
    assert not is_right_number("#### 18", "#### 18")
    assert not is_right_number("The answer is 18", "#### 18")  # the colon is part of it


@pytest.mark.parametrize(
    ("completion", "solution", "right"),
    [
        ("2+3=5. The answer is: 5", "2+3=<<2+3=5>>5\n#### 5", True),
        ("The answer is: 1,200", "so\n#### 1,200", True),
        ("The answer is: 1200.00", "so\n#### 1,200", True),
        ("The answer is: -3", "#### -3", True),
        ("The answer is: 6", "#### 5", False),
        ("5", "#### 5", False),
    ],
)
def test_right_numbers(completion, solution, right):
    assert is_right_number(completion, solution) is right


def test_a_solution_without_a_number_is_bad_data():
    with pytest.raises(InputError, match="'five' does not end in #### and a number"):
        is_right_number("The answer is: 5", "five")


# ---- short answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("sports", True), (" Sports.\n", True), ("sports\nand more", True), ("sports news", False), ("", False),
        ("\n\nsports", True), ("The answer is sports", False),
    ],
)  # fmt: skip
def test_a_short_answer_is_the_first_line(completion, right):
    assert is_right_text(completion, "sports") is right


def test_spaces_in_a_short_answer_do_not_count():
    assert is_right_text("Ann,  Oslo, 3", "Ann, Oslo, 3") and not is_right_text("Ann, Oslo, 33", "Ann, Oslo, 3")


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("def g(n):\n    return n + 1", True),
        ("Sure!\n```python\ndef g(n):\n    return n + 1\n```\nIt adds one.", True),
        ("def g(n):\n    return n", False),
        ("    return n + 1", False),
    ],
)
def test_a_function_is_written_whole(completion, right):
    example = {"text": "g(n) returns n plus 1.", "test_list": ["assert g(1) == 2"]}
    assert RULES["function"].is_right(completion, example) is right
    assert "assert" not in RULES["function"].problem(example), "the tests are not shown"


# ---- expressions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\\dfrac12", "\\frac{1}{2}"), ("\\tfrac{1}{2}", "\\frac12"), ("\\frac1{72}", "\\frac{1}{72}"),
        ("1/2", "\\frac{1}{2}"), ("-3/4", "\\frac{-3}{4}"), ("0.5", "\\frac{1}{2}"), (".5", "0.5"),
        ("\\left(1, 2\\right)", "(1,2)"), ("90^\\circ", "90"), ("90^{\\circ}", "90"), ("\\$5", "5"), ("5\\%", "5"),
        ("5%", "5"), ("k = 5", "5"),
        ("5\\text{ cm}", "5"), ("5 \\text{ cm} \\text{ wide}", "5"), ("\\sqrt3", "\\sqrt{3}"), ("1\\!000", "1000"),
        ("a\\\\b", "a\\b"), ("\\{.1, .2\\}", "\\{0.1,0.2\\}"), ("x +\ny", "x+y"),
    ],
)  # fmt: skip
def test_spellings_of_one_expression(one, other):
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("stated", "right"),
    [
        # The released scorer called these right whatever the answer was: its normalisation failed on them.
        ("x/2", "7"), ("2a/3", "\\frac{1}{2}"), ("km/h", "3"), ("3 \\text{ m} \\text{ s}", "7"),
        ("1/2/3", "5"), ("\\frac", "1"), ("\\sqrt", "1"), ("", "1"), ("=", "1"), ("x=y=2", "2"), ("abc = 2", "2"),
    ],
)  # fmt: skip
def test_odd_answers_are_compared_not_waved_through(stated, right):
    assert not is_right_expression(f"The answer is: {stated}", f"so \\boxed{{{right}}}")
    assert is_right_expression(f"The answer is: {stated}.", f"\\boxed{{{stated}}}")


def test_the_stated_expression_ends_at_a_full_stop_before_a_new_line():
    assert is_right_expression("The answer is: 2.5.\nNext one.", "\\boxed{2.5}")
    assert is_right_expression("so The answer is: 1. The answer is: \\frac{1}{2}.", "it is \\boxed{\\frac12}.")
    assert not is_right_expression("\\boxed{2}", "\\boxed{2}")


def test_boxed():
    assert boxed("first \\boxed{1} then \\boxed{\\frac{a}{b}} end") == "\\frac{a}{b}"
    assert boxed("so $\\boxed 5$.") == "5"
    for text in ("nothing", "\\boxed{1"):
        with pytest.raises(InputError, match="has no .*boxed answer whose braces close"):
            boxed(text)


def test_a_normal_form_is_its_own():
    for text in ("\\frac{1}{2}", "\\sqrt{x^{2}+1}", "3.14", "(1,2)", "\\frac{\\pi}{2}", "\\sqrt[3]{2}"):
        assert normalised(normalised(text)) == normalised(text) == text


# ---- programs --------------------------------------------------------------------------------------------------------


def test_the_program_in_a_completion():
    body = "def f(x):\n    return x\n"
    assert program_in(f"Sure:\n```python\n{body}```\nand\n```python\nother\n```") == body
    assert program_in(f"```python\n{body}") == body  # cut off by the token limit
    assert program_in(body.replace("    ", "\t")) == body
    assert program_in(f"The solution is:{body}") == body
    for end in ('if __name__ == "__main__":\n    main()', "# Example usage\nf(1)", "# Test examples\nassert f(1)"):
        assert program_in(f"```python\n{body}{end}```") == body


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("assert 1 + 1 == 2", True),
        (
            "import math\ndef helper(x):\n    return math.sqrt(x)\ndef f(x):\n    return helper(x)\nassert f(4) == 2",
            True,
        ),
        ("def f(n):\n    return 1 if n < 2 else n * f(n - 1)\n\nassert f(5) == 120", True),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nassert P(1).x == 1", True),
        ("assert 1 + 1 == 3", False),
        ("def f(:", False),
        ("import sys\nsys.exit(0)\nassert False", False),  # leaving before the tests is no pass
        ("import os\nos._exit(0)", False),
        ("raise KeyboardInterrupt", False),
        ("input()", False),
        ("x = bytearray(8 * 2**30)", False),
        ("open('big', 'wb').write(bytes(2**26))", False),
        ("while True:\n    pass", False),
        ("import time\ntime.sleep(60)", False),
        ("print('a' * 10**6)", True),
        ("", True),
    ],
)
def test_programs_pass_or_fail(program, passes):
    began = time.monotonic()
    assert runs(program, seconds=2) is passes
    assert time.monotonic() - began < 10


def test_what_a_program_started_ends_with_it_and_this_process_goes_on(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time\ntime.sleep(2)\nopen({str(mark)!r}, 'w')"
    assert runs(
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nimport os\nos.chdir('/')"
    )
    here = os.getcwd()
    time.sleep(3)
    assert not mark.exists() and os.getcwd() == here


def test_passing_and_failing_by_the_rules_of_the_sets():
    mbpp = {"task_id": 11, "text": "Add one.", "test_list": ["assert f(1) == 2", "assert f(2) == 3"]}
    assert RULES["asserts"].problem(mbpp) == "\nAdd one.\nTest examples:\nassert f(1) == 2\nassert f(2) == 3"
    assert RULES["asserts"].is_right("```python\ndef f(x):\n\treturn x + 1\n```", mbpp)
    assert not RULES["asserts"].is_right("def f(x):\n    return 2", mbpp)
    long = mbpp | {"task_id": 493}
    assert RULES["asserts"].problem(long).endswith("calculate_polygons(startx, starty, endx, endy, radius)")
    check = {
        "prompt": 'def f(x):\n    """Add one."""\n',
        "test": "def check(candidate):\n    assert candidate(1) == 2\n",
        "entry_point": "f",
    }
    assert RULES["check"].problem(check) == 'def f(x):\n\t"""Add one."""\n'
    assert RULES["check"].is_right("    return x + 1\n", check)
    assert RULES["check"].is_right("\treturn x + 1\n", check)
    assert RULES["check"].is_right("```python\ndef f(x):\n    return x + 1\n```", check)
    assert not RULES["check"].is_right("    return x\n", check)


def test_the_prompts_are_those_of_the_paper():
    begin = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    math = begin + "### Instruction:\n{problem}\n\n### Response: Let's think step by step."
    code = begin + "\n### Instruction:\nCreate a Python script for this problem:\n{problem}\n\n### Response:"
    prompts = {"GSM8K": math, "MATH": math, "HumanEval": code, "MBPP": code}
    assert {test: TASKS[test].prompt for test in prompts} == prompts
    assert [TASKS[test].max_new_tokens for test in prompts] == [1024, 2048, 2048, 2048]


# ---- generation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pico(tmp_path):
    """A tiny Llama that is base and both experts, its tokenizer, test sets, and a config."""
    torch.manual_seed(1)
    model = pico_model("llama")
    for name in ("base", "math", "code"):
        save(model, pico_tokenizer(), tmp_path / "llama" / name)
    write_pico_tests(tmp_path / "data")
    config = pico_config(tmp_path, tmp_path)
    return model, open_tokenizer(config.model, "math"), config


def greedy(model, tokenizer, prompt, steps):
    """One prompt alone, one argmax after the other, no cache."""
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    begin = tokens.shape[1]
    for _ in range(steps):
        following = model(tokens).logits[0, -1].argmax()
        if following == tokenizer.eos_token_id:
            break
        tokens = torch.cat([tokens, following[None, None]], 1)
    return tokenizer.decode(tokens[0, begin:], skip_special_tokens=True)


def test_completions_in_padded_batches_are_those_of_a_plain_loop(pico):
    model, tokenizer, _ = pico
    prompts = ["abc", "a longer one", "x", "9"]
    expected = [greedy(model, tokenizer, prompt, 12) for prompt in prompts]
    assert complete(model, tokenizer, prompts, max_new_tokens=12, stop=[], batch_size=3) == expected
    assert len(set(expected)) > 1
    stop = expected[0][3:5]
    stopped = complete(model, tokenizer, prompts, max_new_tokens=12, stop=[stop], batch_size=3)
    assert stopped == [before([stop], text) for text in expected] and stop not in stopped[0]


def test_generation_ends_where_all_have_stopped(pico):
    model, tokenizer, _ = pico
    stop, steps = greedy(model, tokenizer, "abc", 4), []
    model.register_forward_hook(lambda *_: steps.append(1))
    complete(model, tokenizer, ["abc"], max_new_tokens=50, stop=[stop], batch_size=1)
    assert len(steps) == 4


def test_the_score_is_what_the_completions_deserve(pico, monkeypatch):
    *_, config = pico
    answers = {"one\n": "The answer is: 3", "two\n": "The answer is: 3"}
    monkeypatch.setattr(scoring, "complete", lambda m, t, prompts, **_: [answers[prompt] for prompt in prompts])
    paths = {"Base": config.model.path("base")}
    assert dict(score(config, "arithmetic", paths, torch.device("cpu"))) == {"Base": scored([True, False])}
    kept = (config.run.dir / "completions" / "arithmetic" / "llama-base.jsonl").read_text().splitlines()
    assert [json.loads(line)["right"] for line in kept] == [True, False]
    programs = ["pass", "def f(x):\n    return x + 1"]
    monkeypatch.setattr(scoring, "complete", lambda *_, **__: programs)
    assert dict(score(config, "functions", paths, torch.device("cpu"))) == {"Base": scored([True, True])}
    limited = replace(config, eval=replace(config.eval, limit=1))
    monkeypatch.setattr(scoring, "complete", lambda *_, **__: programs[:1])
    assert dict(score(limited, "functions", paths, torch.device("cpu"))) == {"Base": scored([True])}


def test_code_is_run_only_with_leave(pico, monkeypatch):
    *_, config = pico
    monkeypatch.setattr("NLG.programs.subprocess.Popen", lambda *_: pytest.fail("a program was run"))
    forbidden = replace(config, eval=replace(config.eval, allow_code_execution=False))
    with pytest.raises(InputError, match="functions runs what the models write; --eval.allow_code_execution true"):
        dict(score(forbidden, "functions", {"Base": config.model.path("base")}, torch.device("cpu")))


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(pico, tmp_path):
    *_, config = pico
    tokenizer = pico_tokenizer()
    tokenizer.add_tokens(["one"])
    tokenizer.save_pretrained(tmp_path / "llama" / "math")
    with pytest.raises(InputError, match="base knows 41 tokens, too few for the tokenizer of the expert"):
        dict(score(config, "arithmetic", {"Base": config.model.path("base")}, torch.device("cpu")))


def test_several_hub_configs_are_put_together(pico, monkeypatch):
    *_, config = pico
    asked = []

    def load(hub, name, split):
        asked.append((hub, name, split))
        return datasets.Dataset.from_dict({"problem": [f"of {name}"], "solution": ["\\boxed{1}"]})

    monkeypatch.setattr("datasets.load_dataset", load)
    records = scoring.examples_of(config.eval.data, "MATH")
    assert len(records) == 7 and records[0]["problem"] == "of algebra"
    assert asked[0] == ("EleutherAI/hendrycks_math", "algebra", "test")
    assert len(asked) == 7


def test_the_tokenizer_is_the_experts_or_the_bases(pico, tmp_path):
    *_, config = pico
    assert open_tokenizer(config.model, "math").name_or_path.endswith("llama/math")
    for file in (tmp_path / "llama" / "math").glob("tokenizer*"):
        file.unlink()
    assert open_tokenizer(config.model, "math").name_or_path.endswith("llama/base")
    for file in (tmp_path / "llama" / "base").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"no tokenizer: neither .*math nor .*base holds one of tokenizer.json"):
        open_tokenizer(config.model, "math")
    assert AutoTokenizer.from_pretrained(tmp_path / "llama" / "code")("a").input_ids == [3]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "llama" / "code")


# ---- lm-eval ---------------------------------------------------------------------------------------------------------


def task_of_ours(test):
    """A task file of NLG/lm_eval_tasks as plain data."""
    text = (TASKS_FOLDER / f"{test.lower()}.yaml").read_text()
    return yaml.safe_load(text)


@pytest.mark.parametrize("test", ["GSM8K", "MATH", "HumanEval", "MBPP"])
def test_the_tasks_for_lm_eval_say_what_the_task_table_says(test):
    task, row = task_of_ours(test), TASKS[test]
    assert task["task"] == f"fda_{test.lower()}" and task["metadata"]["test"] == test
    wanted = {"until": row.stop, "max_gen_toks": row.max_new_tokens, "do_sample": False}
    assert task["generation_kwargs"] == wanted
    assert task.get("unsafe_code", False) is RULES[row.rule].runs_code


def test_without_the_harness_the_error_says_how_to_get_it(pico, monkeypatch):
    *_, config = pico
    harness = replace(config, eval=replace(config.eval, backend="lm-eval-vllm"))
    installed = set()
    monkeypatch.setattr("NLG.harness.find_spec", lambda part: part in installed)
    with pytest.raises(InputError, match=r"eval.backend lm-eval-vllm needs lm_eval: pip install '\.\[nlg\]'"):
        dict(score(harness, "arithmetic", {"Base": config.model.path("base")}, torch.device("cpu")))
    installed.add("lm_eval")
    with pytest.raises(InputError, match=r"eval.backend lm-eval-vllm needs vllm: pip install 'lm-eval\[vllm\]'"):
        dict(score(harness, "arithmetic", {"Base": config.model.path("base")}, torch.device("cpu")))
    installed.add("vllm")
    with pytest.raises(InputError, match=r"has no task for arithmetic, only for gsm8k, humaneval, math, mbpp; transf"):
        dict(score(harness, "arithmetic", {"Base": config.model.path("base")}, torch.device("cpu")))


ROWS = {
    "GSM8K": {"question": ["one", "two", "three"], "answer": ["#### 3", "#### 4", "#### 5"]},
    "MBPP": {"task_id": [1, 2, 3], "text": ["one", "two", "three"], "test_list": [["assert f(1) == 2"]] * 3},
}


@pytest.fixture
def test_set(pico, tmp_path, request):
    """One of ROWS as a data set on disk, and a config that scores the math expert on two of its examples."""
    *_, config = pico
    rows = datasets.Dataset.from_dict(ROWS[request.param])
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "data" / request.param))
    options = replace(config.eval, tests={"math": [request.param]}, limit=2)
    return request.param, replace(config, tasks=["math"], eval=options)


@pytest.mark.parametrize("test_set", ROWS, indirect=True)
def test_what_lm_eval_is_given_is_what_our_loop_asks(test_set):
    test, config = test_set
    found = rules.examples(test=test, root=config.eval.data)["test"]
    assert found["prompt"] == prompts_of(test, examples_of(config.eval.data, test))
    completions = {"GSM8K": "The answer is: 4", "MBPP": "def f(x):\n    return x + 1"}
    assert rules.judge(found[1], [completions[test]]) == {"right": 1}
    assert rules.judge(found[1], ["The answer is: 5"]) == {"right": 0}


@pytest.mark.parametrize("test_set", ["GSM8K", pytest.param("MBPP", marks=pytest.mark.slow)], indirect=True)
def test_lm_eval_answers_and_judges_as_our_loop_does(test_set, tmp_path):
    pytest.importorskip("lm_eval")
    test, config = test_set
    save(pico_model("llama", max_position_embeddings=4096), pico_tokenizer(), tmp_path / "llama" / "base")
    found = {}
    for backend in ("transformers", "lm-eval-hf"):
        chosen = replace(config, eval=replace(config.eval, backend=backend))
        value = dict(score(chosen, test, {"Base": config.model.path("base")}, torch.device("cpu")))
        found[backend] = value, (config.run.dir / "completions" / test / "llama-base.jsonl").read_text()
    assert found["lm-eval-hf"] == found["transformers"]
    assert found["transformers"][0]["Base"][1] == 2


def test_the_validation_cut_is_the_last_tenth_of_the_training_set(tmp_path):
    for split, size in {"train": 40, "test": 5}.items():
        rows = [{"question": f"{split} {i}", "answer": "a"} for i in range(size)]
        (tmp_path / "news_sections").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "news_sections" / f"{split}-0.parquet")
    cut = [e["question"] for e in examples_of(str(tmp_path), "news_sections", cut=True)]
    kept = np.random.RandomState(0).permutation(40)[36:]
    assert cut == [f"train {i}" for i in kept]
    assert len(examples_of(str(tmp_path), "news_sections")) == 5
    assert len(examples_of(str(tmp_path), "news_sections", limit=2, cut=True)) == 2


def test_models_are_scored_in_the_type_that_is_asked_for(nlg_inputs, tmp_path, monkeypatch):
    config = pico_config(nlg_inputs, tmp_path)
    config = replace(config, eval=replace(config.eval, limit=1, allow_code_execution=True, dtype="bfloat16"))
    opened = []
    monkeypatch.setattr(scoring, "complete", lambda model, *of, **how: opened.append(model.dtype) or [""])
    test = next(iter(config.tests))
    dict(score(config, test, {"base": config.model.path("base")}, torch.device("cpu")))
    assert opened == [torch.bfloat16]
    assert scoring.scored_type("", torch.device("cpu")) == torch.float32
    assert scoring.scored_type("", torch.device("cuda")) == "auto"
