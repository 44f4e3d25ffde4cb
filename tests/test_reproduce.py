"""Tables made again: which are known, and what is said of ours beside the published and the committed ones."""

import subprocess
import sys

import numpy as np
import pytest

import reproduce
from common.config import ROOT
from common.evaluation.answers import scored
from common.evaluation.rows import write_results
from helpers import change
from Vision import domain

PUBLISHED = {"title": "t", "source": "s", "unit": "percent", "tasks": ["MNIST", "SVHN"]}


def row(method, task, right, n=400, **more):
    answers = np.arange(n) < right
    made = {"method": method, "start": None, "init": None, "label": "", "task": task, "split": "test"}
    made |= {
        "metric": "accuracy",
        "n": n,
        "value": right / n,
        "answers": scored(answers).answers,
        "config": "c",
        "commit": "d",
    }
    return made | more


def test_every_table_has_a_config_and_the_paper_s_rows():
    for name, table in reproduce.PAPER.items():
        (config,) = reproduce.configs_of(name, "own", [])
        assert reproduce.paper_table(config)["source"].startswith(f"paper table {name.removeprefix('table')}"), name
        if table.released:
            both = [c for c in reproduce.configs_of(name, "published", [])]
            assert [c.compare.inits for c in both] == [["weight"], ["gauss"]]
            assert all(c.anchors.source.startswith("hf://datasets/SphereLab/FDA_for_") for c in both)
    assert set(reproduce.SETS["toys"]) < set(reproduce.OURS)
    for name in reproduce.OURS:
        assert (ROOT / name).is_file() and list(reproduce.configs_of(name, "own", []))


def test_a_row_is_judged_by_the_standard_error_of_its_test_sets(pico_config, monkeypatch):
    """400 examples of two sets at 1/2: the error of their mean is sqrt(2 · (1/4)/400)/2 = 1.77 points."""
    rows = [row("ta", "MNIST", 200), row("ta", "SVHN", 200), row("tsv", "MNIST", 200), row("tsv", "SVHN", 200)]
    published = PUBLISHED | {"rows": {"TA": [51, 52, 51.5], "TSV": [52, 52, 52.0], "WUDI": [1, 1, 1]}}
    monkeypatch.setattr(reproduce, "paper_table", lambda config: published)
    config = change(change(pico_config, "run", name="judged"), "eval", paper_table="any")
    write_results(config.run.dir / "results.json", rows, ["MNIST", "SVHN"])
    reproduce.verdict("table5", config)
    lines = [line.split("|")[1:-1] for line in (config.run.dir / "reproduced.md").read_text().splitlines()[2:]]
    said = {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in lines}
    assert set(said) - {"Avg", ":---"} >= {"TA", "TSV"} and "WUDI" not in said
    assert said["TA"][:3] == ["50.00", "51.50", "-1.50"] and said["TA"][4] == "within"
    assert said["TSV"][2] == "-2.00" and said["TSV"][4] == "beyond"
    assert float(said["TA"][3]) == pytest.approx(100 * np.sqrt(2 * 0.25 / 400) / 2, rel=0.1)


def test_a_cell_that_moved_is_named(tmp_path, pico_config, monkeypatch):
    rows = [row("ta", "MNIST", 200), row("ta", "SVHN", 200)]
    write_results(tmp_path / "committed.json", rows, ["MNIST", "SVHN"])
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    write_results(pico_config.run.dir / "results.json", rows, ["MNIST", "SVHN"])
    assert reproduce.beside_committed("committed.json", pico_config) == "2 cells are committed, 0 moved\n"
    write_results(pico_config.run.dir / "results.json", [rows[0], row("ta", "SVHN", 201)], ["MNIST", "SVHN"])
    said = reproduce.beside_committed("committed.json", pico_config)
    assert said == "2 cells are committed, 1 moved\n- TA SVHN: 0.5, now 0.5025\n"


def test_a_run_is_compare_s_and_resumes(pico_config, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(reproduce, "compare", lambda config, of: made.append((config, of)))
    monkeypatch.setattr(reproduce, "make_inputs", lambda name: made.append(name))
    assert reproduce.reproduce("Vision/results/demo.json", pico_config, dry=False) == []
    assert made == ["Vision/results/demo.json", (pico_config, domain)]
    refused = reproduce.reproduce("table5", change(pico_config, "model", base="nowhere"), dry=True)
    assert len(made) == 2 and refused and all(sentence.startswith("table5: ") for sentence in refused)
    assert "Inputs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel5"], "no table is called 'tabel5'; choose from table1, table2"),
        (
            ["table1", "--anchors", "published"],
            "--anchors published: none are known for table1, only for table2",
        ),
        (["toys", "--anchors", "published"], "none are known for Vision/results/demo.json"),
        (["table5", "--nonsense", "3"], "unrecognized arguments: --nonsense 3"),
    ],
)
def test_what_cannot_be_made_is_refused_at_once(arguments, message):
    command = [sys.executable, str(ROOT / "scripts/reproduce.py"), *arguments, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and message in done.stderr
