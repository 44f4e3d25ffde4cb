"""The NLG toy as the command leaves it on disk, opened with stock libraries."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from NLG.generation import complete
from NLG.scoring import RULES, TASKS, examples_of, prompts_of
from toy import nlg, nlg_data


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy")
    nlg.make(out, retrain=False)
    return out


def test_a_finished_toy_is_kept(toy: Path, capsys: pytest.CaptureFixture) -> None:
    path = toy / "checkpoints" / "base" / "model.safetensors"
    before = path.stat().st_mtime_ns
    nlg.make(toy, retrain=False)
    assert capsys.readouterr().out.startswith("kept")
    assert path.stat().st_mtime_ns == before


def test_the_packed_file_is_small() -> None:
    assert nlg.WEIGHTS.stat().st_size < 10e6


def test_pack_and_unpack_keep_half_precision_values_exactly() -> None:
    base = {name: torch.tensor([[1.0], [3.0]]) for name in nlg.VOCABULARY} | {"norm": torch.tensor([1.0, 2.0])}
    near = torch.tensor([[1.0], [3.0 + 2**-14], [2.0]])  # half alone would lose 2^-14; the last row is the base's mean
    expert = dict.fromkeys(nlg.VOCABULARY, near) | {"norm": torch.tensor([1.0, 2.5])}
    base_again, experts_again = nlg.unpack(nlg.pack(base, dict.fromkeys(nlg.TESTS, expert)))
    assert all(torch.equal(base[name], base_again[name]) for name in base)
    assert all(torch.equal(expert[name], experts_again["code"][name]) for name in base)


@pytest.mark.parametrize("task", nlg.TESTS)
def test_experts_have_the_base_s_tensors_and_one_token_more(toy: Path, task: str) -> None:
    base, expert = (load_file(toy / "checkpoints" / name / "model.safetensors") for name in ("base", task))
    shapes = {name: tensor.shape for name, tensor in nlg.padded(base).items()}
    assert {name: tensor.shape for name, tensor in expert.items()} == shapes
    assert all(tensor.dtype == torch.float32 for tensor in expert.values())
    assert all((expert[name][: len(base[name])] != base[name]).any() for name in base)


@pytest.mark.parametrize("part", ["base", *nlg.TESTS])
def test_stock_transformers_opens_model_and_tokenizer(toy: Path, part: str) -> None:
    folder = toy / "checkpoints" / part
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    text = "def f(x):\n\treturn x['a  b'] != 7\n\n"
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokens.shape == (1, 1 + len(text)) and tokens[0, 0] == model.config.bos_token_id
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) == text
    assert len(tokenizer) == model.config.vocab_size == nlg.TOKENS + (part != "base")
    assert model(tokens).logits.shape == (1, 1 + len(text), model.config.vocab_size)


@pytest.mark.parametrize("test", nlg.TESTS.values())
def test_data_sets_open_offline_and_their_solutions_are_right(toy: Path, test: str) -> None:
    examples = list(examples_of(str(toy / "data"), test))
    assert len(examples) >= 300 and len(set(prompts_of(test, examples))) == len(examples)
    for example in examples:
        if test == "snippets":  # in this process, for time
            scope = {}
            exec(example["prompt"] + example["canonical_solution"] + example["test"], scope)
            scope["check"](scope[example["entry_point"]])
            with pytest.raises(AssertionError):
                scope["check"](lambda value: None)
        else:
            *steps, answer = example["answer"].replace("####", "").split()
            assert steps and all(eval(step.rstrip(".").replace("=", "==")) for step in steps)
            assert steps[-1].endswith(f"={answer}.")
    solution = "canonical_solution" if test == "snippets" else "answer"
    right = examples[0][solution].replace("#### ", "The answer is: ")
    assert RULES[TASKS[test].rule].is_right(right, examples[0])
    assert not RULES[TASKS[test].rule].is_right(right.replace("return", "return 1 +").replace(": ", ": 1"), examples[0])


@pytest.mark.parametrize("task", nlg.TESTS)
def test_no_model_is_trained_on_a_problem_of_the_test_sets(toy: Path, task: str) -> None:
    test = nlg.TESTS[task]
    held_out = prompts_of(test, list(examples_of(str(toy / "data"), test)))
    for part in ("base", task):
        texts = nlg_data.texts(part, 4000)
        seen = "\n".join(prompt + text for prompt, text in texts)
        assert not [prompt for prompt in held_out if prompt in seen]
        assert max(len(prompt + text) for prompt, text in texts) < nlg.MODEL["max_position_embeddings"]


def test_texts_follow_from_the_code_alone() -> None:
    assert nlg_data.texts("math", 1) == [
        ("Kim and Max get 8 cards a day. How many in 5 days?\n", "8*5=40. 40+40=80. The answer is: 80")
    ]
    assert nlg_data.texts("code", 1) == [
        ("def solve(name):\n\t# name without 'q'\n", "\treturn name.replace('q', '')\n")
    ]


@pytest.mark.parametrize("task", nlg.TESTS)
def test_an_expert_beats_the_base_on_its_task(toy: Path, task: str) -> None:
    test = nlg.TESTS[task]
    examples = list(examples_of(str(toy / "data"), test, 40))
    tokenizer = AutoTokenizer.from_pretrained(toy / "checkpoints" / task, padding_side="left", pad_token="</s>")
    prompts, row = prompts_of(test, examples), TASKS[test]
    right = {}
    for part in ("base", task):
        model = AutoModelForCausalLM.from_pretrained(toy / "checkpoints" / part)
        answers = complete(
            model, tokenizer, prompts, max_new_tokens=row.max_new_tokens, stop=row.stop, batch_size=len(prompts)
        )
        right[part] = sum(map(RULES[row.rule].is_right, answers, examples))
    assert right[task] > right["base"] + 8
