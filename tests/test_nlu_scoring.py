"""GLUE scores as stock transformers gives them, on which examples; refused heads, tokenizers and tables."""

import json
import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.config import Config, Eval
from common.core import notices
from common.core.errors import InputError
from common.evaluation.metrics import METRICS
from common.evaluation.scoring import score_run
from common.io.examples import SEVERAL, Sample, identity_of
from common.opening import open_experiment
from common.pipeline import merge_alone
from helpers import change, edit_config, rewrite
from NLU import domain, scoring, tasks
from pico_nlu import (
    CONFIGS,
    PICO_TASKS,
    pico_config,
)

CPU = torch.device("cpu")


def batches_of(config: Config, task: str) -> list:
    """What a task is scored on: batches of (tokens, labels)."""
    tokenizer = scoring.open_tokenizer(config.model, task, 50)
    return scoring.tokenised(scoring.scored_records(config, task), task, config.eval.batch_size, tokenizer)


def write_examples(config: Config, task: str, columns: dict, features: datasets.Features | None = None) -> None:
    """The examples of a task in the place of those that there are, in both of its splits."""
    folder, row = Path(config.eval.data) / task, tasks.TASKS[task]
    shutil.rmtree(folder)
    table = datasets.Dataset.from_dict(columns, features)
    datasets.DatasetDict({row.split: table, row.train_split: table}).save_to_disk(str(folder))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("task", PICO_TASKS)
def test_the_score_is_that_of_stock_transformers(nlu_inputs, tmp_path, family, task):
    """Expert, and merged encoder under the expert's head as exported, one example at a time."""
    config = change(pico_config(nlu_inputs, tmp_path, family), "start", method="ta")
    config = change(config, "model", heads=(task,))
    expert, merged = config.model.path("expert", task), merge_alone(change(config, "run", score=False), domain)
    found = dict(domain.score(config, task, {"expert": expert, "merged": merged}, CPU))
    folders = {"expert": expert, "merged": merged / "heads" / task}
    tokenizer, row = AutoTokenizer.from_pretrained(expert), domain.TASKS[task]
    records = datasets.load_from_disk(f"{config.eval.data}/{task}")[row.split]
    for name in found:
        stock, report = AutoModelForSequenceClassification.from_pretrained(folders[name], output_loading_info=True)
        assert not any(report.values())
        with torch.no_grad():
            logits = torch.cat(
                [stock(**tokenizer(*(r[key] for key in row.text), return_tensors="pt")).logits for r in records]
            )
        answers = logits[:, 0] if row.labels == 1 else logits.argmax(1)
        assert found[name][:2] == (pytest.approx(METRICS[row.metric](records["label"], answers), abs=1e-4), 30)


def test_another_test_set_is_scored_under_the_head_of_its_task(own_nlu):
    """eval.tests: the sentences of CoLA, called SST-2, under CoLA's head."""
    shutil.copytree(f"{own_nlu.eval.data}/CoLA", f"{own_nlu.eval.data}/SST-2")
    expert = {"x": own_nlu.model.path("expert", "CoLA")}
    other = change(own_nlu, "eval", tests={"CoLA": ["CoLA", "SST-2"], "MNLI": ["RTE"]})
    labels = datasets.load_from_disk(f"{own_nlu.eval.data}/CoLA")["validation"]["label"]
    value, n, _ = dict(domain.score(other, "SST-2", expert, CPU))["x"]
    assert n == len(labels) == 30 and round(value * 30) == pytest.approx(value * 30), "an accuracy, not Matthews'"
    with pytest.raises(InputError, match="eval.tests: MNLI and RTE have unlike numbers of labels, 3 against 2"):
        dict(domain.score(other, "RTE", expert, CPU))


GLUE = ["entailment", "neutral", "contradiction"]  # MNLI's classes as the hub's data number them


def named_mnli(config: Config, names: list[str], own: list[str], right: int) -> None:
    """MNLI with classes of these names, an expert that calls its outputs so, and labels that say of every example what
    the expert answers first: its output `right`, by the number that the data give the class of that name."""
    expert = config.model.path("expert", "MNLI")
    edit_config(expert, id2label={str(i): n for i, n in enumerate(own)}, label2id={n: i for i, n in enumerate(own)})
    data = datasets.load_from_disk(f"{config.eval.data}/MNLI")["validation_matched"]
    rewrite(expert / "model.safetensors", lambda t: t["classifier.out_proj.bias"][right].add_(1e3))
    features = datasets.Features(
        {"premise": datasets.Value("string"), "hypothesis": datasets.Value("string")}
        | {"label": datasets.ClassLabel(names=names)}
    )
    columns = {"premise": data["premise"], "hypothesis": data["hypothesis"], "label": [0] * 30}
    write_examples(config, "MNLI", columns, features)


@pytest.mark.parametrize("own", [["(CONTRADICTION)", "Entailment.", "neutral"], GLUE], ids=["other order", "same"])
def test_outputs_are_scored_in_the_order_that_the_data_name(own_nlu, own, capsys):
    """All examples are of entailment, which the expert calls its output 1, or 0, and which is the data's class 0."""
    right = [name.casefold().strip(".") for name in own].index("entailment")
    named_mnli(own_nlu, GLUE, own, right)
    assert dict(domain.score(own_nlu, "MNLI", {"x": own_nlu.model.path("expert", "MNLI")}, CPU))["x"].value == 1
    labelled = domain.labelled_task(own_nlu, "MNLI", Sample("train", 9, 9), CPU)
    theta = open_experiment(own_nlu, domain).experts["MNLI"]
    assert labelled.loss(theta.read(theta.names()), labelled.batch(range(9))) < 1e-3
    assert ("its outputs are scored in the data's order" in capsys.readouterr().err) == (own != GLUE)


@pytest.mark.parametrize(
    ("names", "own", "said"),
    [
        (GLUE, ["no", "maybe", "yes"], "has the classes no, maybe, yes, the data of task MNLI entailment, neutral,"),
        (GLUE, ["neutral", "neutral", "entailment"], "these are not the same names, so its outputs are taken to be"),
        (GLUE, ["LABEL_2", "LABEL_1", "LABEL_0"], ""),
        (["0", "1", "2"], GLUE, ""),
        (["not entailed", "B-x", "c"], ["Not_Entailed", "b_x", "C"], ""),
    ],
)
def test_names_that_say_no_other_order_leave_the_outputs_as_they_are(own_nlu, names, own, said, capsys, monkeypatch):
    """The expert answers its first output, and all labels are 0."""
    monkeypatch.setattr(notices, "_said", set())
    named_mnli(own_nlu, names, own, 0)
    assert dict(domain.score(own_nlu, "MNLI", {"x": own_nlu.model.path("expert", "MNLI")}, CPU))["x"].value == 1
    err = capsys.readouterr().err
    assert said in err and ("the classifier of" in err) == bool(said)


def test_batches_and_limit(nlu_config):
    """The score does not depend on the batches; a limit takes the first examples."""
    expert = {"x": nlu_config.model.path("expert", "STS-B")}
    whole, n, _ = dict(domain.score(nlu_config, "STS-B", expert, CPU))["x"]
    again = dict(domain.score(change(nlu_config, "eval", batch_size=7), "STS-B", expert, CPU))["x"]
    assert again[:2] == (pytest.approx(whole, abs=1e-4), n)
    labels = [x for _, batch in batches_of(change(nlu_config, "eval", limit=4), "STS-B") for x in batch]
    first = datasets.load_from_disk(f"{nlu_config.eval.data}/STS-B")["validation"]["label"][:4]
    assert sorted(labels) == pytest.approx(sorted(first))


def test_the_validation_cut_is_scored_apart_from_the_test_set(nlu_config):
    """The cut is the last tenth of a permutation by RandomState(0); rows of both splits stay, a table shows one."""
    cut = change(nlu_config, "eval", split="validation_cut")
    train = datasets.load_from_disk(f"{nlu_config.eval.data}/STS-B")["train"]["label"]
    expected = [train[i] for i in np.random.RandomState(0).permutation(30)[27:]]
    labels = [x for _, batch in batches_of(cut, "STS-B") for x in batch]
    assert sorted(labels) == pytest.approx(sorted(expected))
    tables = []
    for one in (nlu_config, cut, nlu_config):
        score_run(one, domain)
        rows = json.loads((nlu_config.run.dir / "results.json").read_text())["rows"]
        tables.append((nlu_config.run.dir / "table.md").read_text())
    scores = [table.split("Avg:")[0] for table in tables]
    assert Counter((r["split"], r["n"]) for r in rows) == {("test", 30): 6, ("validation_cut", 3): 6}
    assert "Pearson and Spearman on 3 of STS-B" in tables[1] and scores[0] == scores[2] != scores[1]


def test_other_examples_in_the_same_folder_are_scored_anew(nlu_config, tmp_path):
    """A row is of the data set that it was made with, whichever files that has."""
    config = change(nlu_config, "eval", data=str(tmp_path / "data"))
    shutil.copytree(nlu_config.eval.data, config.eval.data)
    found = []
    for turn in range(3):
        if turn == 2:
            sets = datasets.load_from_disk(f"{nlu_config.eval.data}/STS-B")
            other = sets["validation"].map(lambda row: {"label": 5 - row["label"]}, keep_in_memory=True)
            shutil.rmtree(f"{config.eval.data}/STS-B")
            datasets.DatasetDict({**sets, "validation": other}).save_to_disk(f"{config.eval.data}/STS-B")
        score_run(config, domain)
        rows = json.loads((config.run.dir / "results.json").read_text())["rows"]
        found.append({(row["method"], row["task"]): row["value"] for row in rows})
    assert found[0] == found[1]
    assert {key: value for key, value in found[2].items() if key[1] != "STS-B"} == {
        key: value for key, value in found[0].items() if key[1] != "STS-B"
    }
    assert found[2]["individual", "STS-B"] == pytest.approx(-found[0]["individual", "STS-B"], abs=1e-6)


def test_a_data_set_of_many_files_is_told_by_their_names_and_sizes(tmp_path):
    """As images are, whose bytes would take as long to read as to score; fewer are read."""
    options, seen = Eval(data=str(tmp_path)), []
    (tmp_path / "many" / "cats").mkdir(parents=True)
    files = [tmp_path / "many" / "cats" / f"{i}.png" for i in range(SEVERAL + 1)]
    for file in files:
        file.write_bytes(b"ab")
    for change_files in (lambda: None, lambda: files[0].write_bytes(b"cd"), lambda: files[0].write_bytes(b"cde")):
        change_files()
        seen.append(identity_of(options, "many"))
    files[-1].rename(tmp_path / "many" / "dog.png")
    seen.append(identity_of(options, "many"))
    assert seen[0] == seen[1] and len({*seen}) == 3
    files[1].unlink()  # now SEVERAL
    seen = [identity_of(options, "many")]
    files[2].write_bytes(b"cd")
    assert identity_of(options, "many") != seen[0]
    assert identity_of(options, "elsewhere") is None


def test_labels_beside_many_images_are_told_by_their_bytes(tmp_path):
    """A label that is put right in place leaves the size of its table as it was."""
    options, folder = Eval(data=str(tmp_path)), tmp_path / "many"
    folder.mkdir()
    for i in range(SEVERAL + 1):
        (folder / f"{i}.PNG").write_bytes(b"ab")
    for table, right in {"metadata.csv": "0.PNG,1", "labels.jsonl": '{"label": 1}', "train/rows.parquet": "1"}.items():
        (folder / table).parent.mkdir(exist_ok=True)
        (folder / table).write_text(right.replace("1", "2"))
        before = identity_of(options, "many")
        (folder / table).write_text(right)
        assert identity_of(options, "many") != before
    before = identity_of(options, "many")
    (folder / "0.PNG").write_bytes(b"cd")
    assert identity_of(options, "many") == before


def test_many_tables_are_told_by_their_bytes(tmp_path):
    options = Eval(data=str(tmp_path))
    (tmp_path / "many").mkdir()
    for i in range(SEVERAL + 1):
        (tmp_path / "many" / f"test-{i}.parquet").write_bytes(b"ab")
    before = identity_of(options, "many")
    (tmp_path / "many" / "test-7.parquet").write_bytes(b"cd")
    assert identity_of(options, "many") != before


def test_local_files_named_after_the_split_are_that_split(nlu_config, tmp_path):
    """`datasets` alone would put validation_mismatched and validation_matched together as validation."""
    for split, label in (("validation_matched", 1), ("validation_mismatched", 2), ("train", 0)):
        (tmp_path / "data" / "MNLI").mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict({"premise": ["w1"] * 4, "hypothesis": ["w2"] * 4, "label": [label] * 4})
        table.to_parquet(tmp_path / "data" / "MNLI" / f"{split}-00000-of-00001.parquet")
    local = change(nlu_config, "eval", data=str(tmp_path / "data"))
    ((_, labels),) = batches_of(local, "MNLI")
    assert labels.tolist() == [1] * 4


def test_long_examples_are_cut_at_128_tokens(own_nlu):
    long = {"sentence": ["w1 " * 300], "label": [1]}
    datasets.DatasetDict({"validation": datasets.Dataset.from_dict(long)}).save_to_disk(f"{own_nlu.eval.data}/CoLA")
    ((tokens, _),) = batches_of(own_nlu, "CoLA")
    assert tokens["input_ids"].shape == (1, 128)


@pytest.mark.parametrize(("family", "tokens"), [("roberta", 38), ("bert", 40)])
def test_examples_are_cut_where_positions_end(nlu_inputs, tmp_path, family, tokens):
    """A table of 40, of which RoBERTa has no use for the first two: it numbers them from the padding token's, 1, on."""
    shutil.copytree(nlu_inputs / family, tmp_path / family)
    shutil.copytree(nlu_inputs / "data", tmp_path / "data")
    config = pico_config(tmp_path, tmp_path, family)
    for place in (config.model.path("base"), config.model.path("expert", "CoLA")):
        edit_config(place, max_position_embeddings=40)
        rewrite(place / "model.safetensors", lambda t: {n: x[:40] if "position_emb" in n else x for n, x in t.items()})
    write_examples(config, "CoLA", {"sentence": ["w1 " * 300, "w2"], "label": [1, 0]})
    assert max(batch["input_ids"].shape[1] for batch, _ in batches_of(config, "CoLA")) == tokens
    assert dict(domain.score(config, "CoLA", {"x": config.model.path("expert", "CoLA")}, CPU))["x"].n == 2


def labels_of(number: int) -> dict:
    return {
        "id2label": {str(i): f"LABEL_{i}" for i in range(number)},
        "label2id": {f"LABEL_{i}": i for i in range(number)},
    }


@pytest.mark.parametrize(
    ("task", "outputs", "message"),
    [
        ("STS-B", 2, "stsb/model has num_labels 2, but the task STS-B is a regression and has 1"),
        ("CoLA", 1, "cola/model has num_labels 1, but the task CoLA has 2 classes"),
        ("MNLI", 4, "mnli/model has num_labels 4, but the task MNLI has 3 classes"),
    ],
)
def test_a_head_with_another_number_of_outputs_is_refused(own_nlu, task, outputs, message):
    edit_config(own_nlu.model.path("expert", task), **labels_of(outputs))
    with pytest.raises(InputError, match=message):
        dict(domain.score(own_nlu, task, {}, CPU))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if "classifier" not in n}, r"the head in .*/model: class\S+: missing"),
        (lambda t: t | {"classifier.out_proj.bias": torch.ones(3)}, r"classifier.out_proj.bias: \(3,\) against \(2,\)"),
        (lambda t: t | {"classifier.out_proj.bias": torch.full((2,), torch.nan)}, "classifier.out_proj.bias holds NaN"),
    ],
    ids=["missing", "shape", "nan"],
)  # fmt: skip
def test_an_expert_without_a_whole_head_is_refused(own_nlu, edit, message):
    rewrite(own_nlu.model.path("expert", "CoLA") / "model.safetensors", edit)
    with pytest.raises(InputError, match=message):
        dict(domain.score(own_nlu, "CoLA", {}, CPU))


def test_an_encoder_whose_answers_are_not_finite_is_named(own_nlu):
    def overflow(tensors):
        tensors["roberta.encoder.layer.1.output.LayerNorm.weight"].fill_(3e38)

    expert = own_nlu.model.path("expert", "MNLI")
    rewrite(expert / "model.safetensors", overflow)
    with pytest.raises(InputError, match="mnli/model answers task MNLI with NaN or Inf"):
        dict(domain.score(own_nlu, "MNLI", {"x": expert}, CPU))


def test_a_tokenizer_that_does_not_fit_is_refused_the_bases_stands_in(own_nlu):
    with pytest.raises(InputError, match="cola/model knows 44 tokens, the encoder embeds 43"):
        scoring.open_tokenizer(own_nlu.model, "CoLA", 43)
    for which in ("expert", "base"):
        for file in own_nlu.model.path(which, "CoLA").glob("tokenizer*"):
            file.unlink()
        if which == "expert":
            assert len(scoring.open_tokenizer(own_nlu.model, "CoLA", 50)) == 44
    with pytest.raises(InputError, match=r"no tokenizer: neither .*cola/model nor .*base holds one of tokenizer.json"):
        scoring.open_tokenizer(own_nlu.model, "CoLA", 50)


def test_data_with_missing_columns_or_strange_labels_is_refused_by_name(own_nlu):
    for columns, message in (
        ({"sentence": ["w1"], "target": [0]}, "task CoLA lacks the column label; it has sentence, target"),
        ({"text": ["w1"]}, "task CoLA lacks the columns sentence, label; it has text"),
        ({"sentence": ["w1", "w2"], "label": [-1, 2]}, "task CoLA has labels -1 to 2; the task has 0 to 1"),
    ):
        shutil.rmtree(f"{own_nlu.eval.data}/CoLA")
        datasets.DatasetDict({"validation": datasets.Dataset.from_dict(columns)}).save_to_disk(
            f"{own_nlu.eval.data}/CoLA"
        )
        with pytest.raises(InputError, match=message):
            batches_of(own_nlu, "CoLA")


@pytest.mark.parametrize(
    ("task", "text", "column", "number", "found"),
    [
        ("CoLA", "sentence,label\nw1,0\n,1\nw3,1", "sentence", 2, "nothing .*, where a text is needed"),
        ("CoLA", "sentence,label\nw1,0\nw2,1\nNA,1", "sentence", 3, "nothing .*the word NA, is read as nothing"),
        ("CoLA", "sentence,label\n1,1\n2,0", "sentence", 1, r"\d, where a text is needed"),
        ("CoLA", "sentence,label\nw1,0\nw2,", "label", 2, "nothing .*, where the number of a class is needed"),
        ("CoLA", "sentence,label\nw1,no\nw2,no", "label", 1, "'no', where the number of a class is needed"),
        ("STS-B", "sentence1,sentence2,label\nw1,w2,3\nw1,w2,", "label", 2, "nothing .*, where a number is needed"),
        ("STS-B", "sentence1,sentence2,label\nw1,w2,3\nw1,,2", "sentence2", 2, "nothing"),
    ],
)
def test_an_example_without_text_or_label_is_named(own_nlu, task, text, column, number, found):
    """By its number among those that are read; a sample is in an order of its own."""
    folder = Path(own_nlu.eval.data) / task
    shutil.rmtree(folder)
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text(text + "\n")
    count = text.count("\n")
    for which, ask in (
        (number, lambda: dict(domain.score(own_nlu, task, {}, CPU))),
        (r"\d", lambda: domain.labelled_task(own_nlu, task, Sample("test", None, 4), CPU)),
    ):
        said = f"the data of task {task}, column {column}: example {which} of the {count} that are read has {found}"
        with pytest.raises(InputError, match=said):
            ask()


def test_classes_written_as_real_numbers_are_classes(own_nlu):
    write_examples(own_nlu, "CoLA", {"sentence": ["w1", "w2"], "label": [1.0, 0.0]})
    assert sorted(int(i) for _, labels in batches_of(own_nlu, "CoLA") for i in labels) == [0, 1]
    labelled = domain.labelled_task(own_nlu, "CoLA", Sample("test", 2, 2), CPU)
    theta = open_experiment(own_nlu, domain).experts["CoLA"]
    assert labelled.loss(theta.read(theta.names()), labelled.batch([0, 1])).isfinite()


@pytest.mark.parametrize("n", [1, 3])
def test_a_correlation_with_labels_that_are_alike_is_said_to_be_undefined(own_nlu, n, capsys):
    write_examples(own_nlu, "STS-B", {"sentence1": ["w1"] * n, "sentence2": ["w2"] * n, "label": [3] * n})
    expert = own_nlu.model.path("expert", "STS-B")
    assert dict(domain.score(own_nlu, "STS-B", {"x": expert}, CPU))["x"][:2] == (0, n)
    said = f"all {n} labels of task STS-B are alike: its Pearson and Spearman is undefined and stands as 0"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{text: [sentence], labels: 2}", "task X lacks metric"),
        (
            "{text: [sentence], labels: 2, metric: bleu}",
            "task X: unknown metric 'bleu'; choose from accuracy, Matthews",
        ),
        ("{text: [sentence], labels: 1, metric: accuracy}", "task X: accuracy does not fit labels: 1"),
        ("{text: [a], labels: 5, metric: Pearson and Spearman}", "task X: Pearson and Spearman does not fit labels: 5"),
    ],
)
def test_a_row_of_tasks_that_cannot_be_scored_is_refused(tmp_path, row, message):
    (tmp_path / "tasks.yaml").write_text(f"X: {row}\n")
    with pytest.raises(InputError, match=message):
        tasks.read_tasks(tmp_path / "tasks.yaml")
