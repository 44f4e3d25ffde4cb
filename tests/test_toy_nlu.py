"""The NLU toy as the command leaves it on disk, opened with stock libraries."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.config import Eval
from common.io.examples import load_scored
from NLU.domain import TASKS
from toy import nlu, nlu_base, nlu_data


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy")
    nlu.make(out, retrain=False)
    return out


@pytest.fixture(scope="module")
def prose() -> list[list[str]]:
    return nlu.unpack(load_file(nlu.PACKED))[2]["prose"]


def test_a_finished_toy_is_kept(toy: Path, capsys: pytest.CaptureFixture) -> None:
    path = toy / "checkpoints" / nlu.BASE / "model.safetensors"
    before = path.stat().st_mtime_ns
    nlu.make(toy, retrain=False)
    assert capsys.readouterr().out.startswith("kept")
    assert path.stat().st_mtime_ns == before


def test_the_packed_file_is_small() -> None:
    assert nlu.PACKED.stat().st_size < 12e6


def test_unpacked_experts_are_off_by_half_a_step_at_most() -> None:
    """Eight bits: each row's largest difference is exact, the others are within 1/254 of it."""
    base = {"roberta.w": torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.5, 0.5]])}
    delta = torch.tensor([[0.127, 0.0254, -0.0009], [0.0, 0.0, 0.0]])
    experts = {task: {"roberta.w": base["roberta.w"] + delta, "classifier.w": torch.ones(2)} for task in nlu.TASKS}
    base_again, experts_again, texts = nlu.unpack(nlu.pack(base, experts, {"any": ["é"]}))
    assert torch.equal(base_again["roberta.w"], base["roberta.w"])
    expected = base["roberta.w"] + torch.tensor([[0.127, 0.025, -0.001], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(experts_again["topic"]["roberta.w"], expected, rtol=0, atol=1e-6)
    assert torch.equal(experts_again["topic"]["classifier.w"], torch.ones(2))
    assert texts == {"any": ["é"]}


def test_stock_transformers_opens_the_base_which_guesses_words(toy: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = toy / "checkpoints" / nlu.BASE
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForMaskedLM.from_pretrained(folder, local_files_only=True)
    assert [tokenizer.convert_tokens_to_ids(token) for token in nlu_base.SPECIAL] == [0, 1, 2, 3, 4]
    tokens = tokenizer("If the object is not iterable, a TypeError exception <mask> raised.", return_tensors="pt")
    guess = model(**tokens).logits[0, tokens.input_ids[0].tolist().index(4)].argmax()
    assert tokenizer.decode(guess).strip() == "is"


def test_a_pair_is_separated_as_roberta_does(toy: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy / "checkpoints" / "contains", local_files_only=True)
    ids = tokenizer("the", "value of the")["input_ids"]
    the = tokenizer.convert_tokens_to_ids("Ġthe")
    assert ids[:4] == [0, the, 2, 2]
    assert ids[-2:] == [the, 2]
    assert len(tokenizer("word " * 200, truncation=True)["input_ids"]) == nlu_base.LENGTH


@pytest.mark.parametrize("task", nlu.TASKS)
def test_experts_differ_from_the_base_in_every_tensor(toy: Path, task: str) -> None:
    base = load_file(toy / "checkpoints" / nlu.BASE / "model.safetensors")
    expert = load_file(toy / "checkpoints" / task / "model.safetensors")
    shared = nlu.encoder(base)
    assert {n: t.shape for n, t in nlu.encoder(expert).items()} == {n: t.shape for n, t in shared.items()}
    assert all((expert[name] != tensor).any() for name, tensor in shared.items())


@pytest.mark.parametrize("task", nlu.TASKS)
def test_data_sets_open_offline(toy: Path, task: str, tmp_path: Path) -> None:
    from datasets import load_dataset

    row = TASKS[task]
    rows = load_dataset(str(toy / "data" / task), cache_dir=str(tmp_path))
    assert {split: len(rows[split]) for split in rows} == nlu_data.SPLITS
    examples = rows[row.split]
    assert examples.column_names == [*row.text, "label"]
    if row.labels == 1:
        assert min(examples["label"]) == 0 and max(examples["label"]) == 5
    else:
        assert set(examples["label"]) == set(range(row.labels))


def test_the_data_are_the_same_everywhere(prose: list[list[str]]) -> None:
    """Whatever the versions of Python and numpy."""
    digest = hashlib.sha256(repr([nlu_data.task_split(prose, task, "validation") for task in nlu.TASKS]).encode())
    assert digest.hexdigest()[:16] == "6ad8654e0f857d93"


def test_training_validation_and_its_cut_share_no_paragraph(prose: list[list[str]]) -> None:
    train, validation, cut, held_out = (
        nlu_data.split_manual(prose, split) for split in ("train", "validation", nlu_data.CUT, "held out")
    )
    assert sorted(train + validation + cut) == prose and sorted(validation + cut) == sorted(held_out)
    assert len({line for _, line in prose}) == len(prose)
    assert len(validation) == pytest.approx(len(prose) / 6, abs=1) and len(cut) == pytest.approx(len(prose) / 12, abs=1)


@pytest.mark.parametrize("task", ["topic", "similarity"])
def test_what_coefficients_are_chosen_on_was_not_trained_on(toy: Path, prose: list[list[str]], task: str) -> None:
    """The validation cut of the data set as the pipeline reads it, against what the experts saw and are tested on."""
    rows = load_scored(Eval(data=str(toy / "data"), split="validation_cut"), task, TASKS[task], TASKS[task].text)
    found = [tuple(row[column] for column in TASKS[task].text) for row in rows]
    texts, labels = nlu_data.task_split(prose, task, nlu_data.CUT)
    assert found == texts and rows["label"] == pytest.approx(labels) and len(found) == 1600
    kept = nlu_data.split_manual(prose, nlu_data.CUT)
    if task == "topic":  # a window of one paragraph
        assert all(any(text in line for _, line in kept) for (text,) in found)
        elsewhere = [line for split in ("train", "validation") for _, line in nlu_data.split_manual(prose, split)]
        assert not any(text in line for (text,) in found[:100] for line in elsewhere)


def examples(prose: list[list[str]], task: str) -> list[tuple]:
    texts, labels = nlu_data.task_split(prose, task, "validation")
    return [(*(text.split() for text in pair), label) for pair, label in zip(texts, labels, strict=True)]


def test_the_labels_are_true(prose: list[list[str]]) -> None:
    lines = {task: [line for _, line in nlu_data.split_manual(prose, "validation")] for task in nlu.TASKS}
    assert lines
    for word, words, label in examples(prose, "contains"):
        assert (word[0] in words) == label
    for words, second, label in examples(prose, "similarity"):
        assert sum(a == b for a, b in zip(words, second, strict=True)) >= round(label * len(words) / 5)


@pytest.mark.parametrize("task", ["topic", "acceptability", "blank"])
def test_an_expert_beats_the_base_on_its_task(prose: list[list[str]], task: str) -> None:
    base, experts, texts = nlu.unpack(load_file(nlu.PACKED))
    some = tuple(part[:100] for part in nlu_data.task_split(prose, task, "validation"))
    tokenizer = nlu.new_tokenizer(texts["words"])
    scores = [
        nlu.score(nlu.load_expert(task, experts[task], encoder), tokenizer, task, some)
        for encoder in (nlu.encoder(base), {})
    ]
    assert scores[1] > scores[0] + 0.1


def test_paraphrases_repeat_the_first_text_in_order() -> None:
    """A row of the pretraining pairs: the second text follows from the first but for some other words."""
    torch.manual_seed(0)
    stream = torch.arange(100, 5000)
    rows = nlu_base.paraphrased(stream, 30)
    assert rows.shape == (64, 15 + 2 + 10)  # of fifteen words and as many places for the second text, a fifth left out
    assert (rows == nlu_base.END).sum(1).tolist() == [2] * 64
    first, second = rows[:, :15], rows[:, 17:]
    repeated = (second[:, :, None] == first[:, None]).any(-1)
    assert 0.75 < repeated.float().mean() < 0.95
    assert all((row[kept].diff() > 0).all() for row, kept in zip(second, repeated, strict=True))


def test_a_fifth_of_the_places_is_guessed() -> None:
    torch.manual_seed(0)
    ids = torch.full((400, 50), 7)
    ids[:, 0] = nlu_base.START
    shown, guess = nlu_base.masked(ids)
    asked = guess >= 0
    assert asked[:, 1:].float().mean() == pytest.approx(0.2, abs=0.01) and not asked[:, 0].any()
    assert (guess[asked] == 7).all() and torch.equal(shown[~asked], ids[~asked])
    assert (shown[asked] == nlu_base.MASK).float().mean() == pytest.approx(0.8, abs=0.02)
