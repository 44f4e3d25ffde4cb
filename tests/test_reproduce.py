"""Tables and figures made again: which are known, and what is said of ours beside the published and the committed."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml

import our_tables
import reproduce
import reproduce_figures as figures
import reproduce_ours as ours
import reproduce_tables as tables
from common.analysis.registry import ANALYSES
from common.config import ROOT
from common.core.errors import InputError
from common.evaluation.answers import scored
from common.evaluation.rows import write_results
from common.run.stages import current
from common.run.units import Units
from common.validation import check_choices
from helpers import change
from pico_vision import PICO_TASKS
from study import KINDS
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
    for name, table in tables.PAPER.items():
        (config,) = tables.configs_of(name, [])
        assert tables.paper_table(config.eval.paper_table)["source"].startswith(
            f"paper table {name.removeprefix('table')}"
        ), name
        if table.released:
            both = tables.configs_of(name, [], published=True)
            assert [c.compare.inits for c in both] == [["weight"], ["gauss"]]
            assert all(c.anchors.source.startswith("hf://datasets/SphereLab/FDA_for_") for c in both)


def test_an_unknown_table_of_the_paper_is_refused_before_anything_is_read(pico_config):
    with pytest.raises(
        InputError, match="eval.paper_table: unknown table 'ViT-B'; choose from RoBERTa-large, ViT-B-16"
    ):
        check_choices(change(pico_config, "eval", paper_table="ViT-B"), domain)
    check_choices(change(pico_config, "eval", paper_table="ViT-B-16"), domain)


def test_a_row_is_judged_by_the_standard_error_of_its_test_sets(pico_config, monkeypatch):
    """400 examples of two sets at 1/2: the error of their mean is sqrt(2 · (1/4)/400)/2 = 1.77 points."""
    rows = [row("ta", "MNIST", 200), row("ta", "SVHN", 200), row("tsv", "MNIST", 200), row("tsv", "SVHN", 200)]
    published = PUBLISHED | {"rows": {"TA": [51, 52, 51.5], "TSV": [52, 52, 52.0], "WUDI": [1, 1, 1]}}
    monkeypatch.setattr(tables, "paper_table", lambda name: published)
    config = change(change(pico_config, "run", name="judged"), "eval", paper_table="any")
    monkeypatch.setattr(tables, "config_of", lambda *_: config)
    write_results(config.run.dir / "results.json", rows, ["MNIST", "SVHN"])
    tables.verdict("table5", [])
    lines = [line.split("|")[1:-1] for line in (config.run.dir / "reproduced.md").read_text().splitlines()[2:]]
    said = {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in lines}
    assert set(said) - {"Avg", ":---"} >= {"TA", "TSV"} and "WUDI" not in said
    assert said["TA"][:3] == ["50.00", "51.50", "-1.50"] and said["TA"][4] == "within"
    assert said["TSV"][2] == "-2.00" and said["TSV"][4] == "within two"
    assert float(said["TA"][3]) == pytest.approx(100 * np.sqrt(2 * 0.25 / 400) / 2, rel=0.1)


def test_a_table_is_compare_s_and_resumes(pico_config, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(tables, "compare", lambda config, of: made.append((config, of)))
    monkeypatch.setattr(tables, "config_of", lambda file, options: pico_config)
    tables.make("table5", [])
    assert made == [(pico_config, domain)]
    monkeypatch.setattr(tables, "config_of", lambda file, options: change(pico_config, "model", base="nowhere"))
    assert len(tables.describe("table5", [])) >= 1 and len(made) == 1
    assert "Inputs" in capsys.readouterr().out


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_every_figure_has_an_analysis_and_readings_of_what_it_shows():
    assert set(figures.paper_figures()) <= set(figures.FIGURES) and set(figures.FIGURES) <= set(reproduce.SETS["all"])
    for name, figure in figures.FIGURES.items():
        assert figure.analysis in ANALYSES
        config = figures.config_of_figure(name, [])
        assert set(figure.tasks) <= set(config.tasks)
        runs = figures.runs_of(name, config)
        assert bool(runs) != bool(figure.starts) and len({run.run.dir for run in runs.values()}) == len(runs)
        for init, run in runs.items():
            assert run.anchors.snapshots == list(figures.STEPS)
            assert (run.anchors.init, run.anchors.scale) == (
                ("weight", None) if init == "weight" else ("gauss", float(init[2:]))
            )
        for panel, curves in figures.paper_figures().get(name, {}).get("values", {}).items():
            shown = {*figure.inits, "expert", "step 0", "step 1200", "Pretrained", "TA", "FDA (Pretrained, Gauss)"}
            assert set(curves) <= shown and panel.split(",")[0].split(" from")[0] in (*figure.tasks, "Avg")
    assert figures.config_of_figure("figure5", []).run.blocks == [11]
    assert figures.config_of_figure("appendix_matching", []).run.blocks == [2, 5, 11]


@pytest.fixture
def pico_figures(pico_config, monkeypatch):
    """The figures on two blocks of pico models."""
    config = change(change(pico_config, "run", score=False), "anchors", steps=3)
    monkeypatch.setattr(figures, "config_of", lambda file, options: config)
    monkeypatch.setattr(figures, "DEPTH", 2)
    return config


def train_on_tests(monkeypatch):
    """Training sets are the test sets."""
    of = domain.labelled_task

    def tested(config, test, sample, device):
        return of(config, test, replace(sample, split="test"), device)

    monkeypatch.setattr(domain, "labelled_task", tested)


def test_a_figure_is_made_of_a_run_for_each_initialisation(pico_figures, monkeypatch, no_figures):
    figure = figures.Figure("subspace", ("weight", "σ 0.01", "σ 10"), ("SVHN",))
    monkeypatch.setitem(figures.FIGURES, "figure5", figure)
    figures.make("figure5", [])
    folder = pico_figures.run.dir / "figures"
    (panel,) = json.loads((folder / "analysis/subspace.json").read_text())["panels"]
    assert panel["title"] == "SVHN" and list(panel["curves"]) == list(figure.inits)
    assert all(list(curve) == ["0", "3"] for curve in panel["curves"].values())
    files = sorted(str(f.relative_to(folder)) for f in folder.rglob("block_*.safetensors"))
    names = ("gauss_0.01/anchors/gauss", "gauss_10/anchors/gauss", "weight/anchors/weight")
    assert files == [f"{name}/SVHN/block_01.safetensors" for name in names]
    said = figures.verdict("figure5", [])
    line = next(line for line in said.splitlines() if line.startswith("| SVHN") and "σ 10" in line)
    value = panel["curves"]["σ 10"]["3"]
    assert [cell.strip() for cell in line.split("|")[3:6]] == [f"{value:.3f}", "0.229", f"{value - 0.229:+.3f}"]
    assert "| MNIST |" in said and "–" in said, "what was not made here has no number of ours"
    assert (folder / "analysis/figure5.md").read_text() == said


def test_a_figure_of_models_is_made_of_the_table_s_run(pico_figures, monkeypatch, no_figures):
    monkeypatch.setattr("common.analysis.landscape.POINTS", 3)
    figures.make("figure2", [])
    assert (pico_figures.run.dir / "merged/fda-pretrained-gauss/provenance.json").is_file()
    assert (pico_figures.run.dir / "analysis/landscape.png").is_file()


def test_projections_of_two_tasks_start_from_the_merge_of_all(pico_figures, monkeypatch, no_figures):
    monkeypatch.setattr("common.analysis.projection.UPDATES", 4)
    monkeypatch.setitem(figures.FIGURES, "figure6", figures.Figure("projection", ("weight", "σ 1"), ("SVHN",)))
    train_on_tests(monkeypatch)
    figures.make("figure6", [])
    folder = pico_figures.run.dir / "figures"
    merged = json.loads((folder / "merged/ta/provenance.json").read_text())
    assert [task for task, _ in merged["inputs"]["experts"]] == PICO_TASKS
    numbers = json.loads((folder / "analysis/projection.json").read_text())
    ours_of = figures.projections(numbers, pico_figures)
    assert {panel: set(curves) for panel, curves in ours_of.items()} == {
        f"SVHN from {start}": {"expert", "weight", "σ 1"} for start in ("Pretrained", "TA")
    }


def test_a_dry_run_of_a_figure_says_what_it_takes(pico_figures, capsys):
    assert figures.describe("appendix_tsne", []) == []
    said = capsys.readouterr().out
    assert (
        "tsne: t-SNE of tokens" in said and "Weight, σ 0.01: 2 times 1 units" in said and "1 units of 3 steps" in said
    )
    assert figures.describe("figure2", []) == []
    assert "pretrained x gauss, ta x gauss" in capsys.readouterr().out


# ---- our own pages ---------------------------------------------------------------------------------------------------


def flat(text):
    """A command as words, however it is broken over lines and quoted."""
    text = re.sub(r"[\\`'\"]", "", text.replace("=", " "))
    return re.sub(r",\s+", ",", " ".join(text.split()))


def test_every_kept_file_can_be_made_again_by_the_commands_of_its_page():
    kept = {str(f.relative_to(ROOT)) for f in ROOT.glob("[VN]*/results/**/*.json")}
    assert set(our_tables.OURS) == kept == set(reproduce.SETS["toys"]) and set(our_tables.DEMOS) < kept
    assert set(yaml.safe_load(ours.TIMES.read_text())) == kept
    for name, table in our_tables.OURS.items():
        assert table.by in ("compare", "regime", *KINDS, *ANALYSES)
        assert len(ours.configs_of(name, [])) == len(table.commands)
        page = flat((ROOT / name.split("/")[0] / "README.md").read_text(encoding="utf-8"))
        if name in our_tables.DEMOS:
            assert "sh scripts/demo.sh" in page
            continue
        for command in table.commands:
            for script in ours.scripts_of(table.by):
                assert f"scripts/{script} --config configs/{table.config}.yaml" in page, name
            assert all(flat(option) in page for option in command), (name, command)


SHIFTED = "- Avg of TA, now against committed: +0.0012 (+0.0000 to +0.0038), not told apart\n"


def test_a_cell_that_moved_is_named(tmp_path, pico_config, monkeypatch):
    name = "Vision/results/demo.json"
    monkeypatch.setattr(ours, "ROOT", tmp_path)
    monkeypatch.setattr(ours, "configs_of", lambda name, options: [pico_config])
    rows = [row("ta", "MNIST", 200), row("ta", "SVHN", 200)]
    write_results(tmp_path / name, rows, ["MNIST", "SVHN"])
    write_results(pico_config.run.dir / "results.json", rows, ["MNIST", "SVHN"])
    assert ours.verdict(name, []) == f"{name}\n\n2 cells are committed, 0 moved\n"
    write_results(pico_config.run.dir / "results.json", [rows[0], row("ta", "SVHN", 201)], ["MNIST", "SVHN"])
    assert ours.verdict(name, []) == f"{name}\n\n2 cells are committed, 1 moved\n- TA SVHN: 0.5, now 0.5025\n{SHIFTED}"
    elsewhere = [each | {"made_on": "AMD EPYC (AVX2)"} for each in rows]
    write_results(pico_config.run.dir / "results.json", elsewhere, ["MNIST", "SVHN"])
    assert "were made on what their rows do not say, these on AMD EPYC (AVX2), where" in ours.verdict(name, [])
    write_results(pico_config.run.dir / "results.json", [rows[0], row("tsv", "SVHN", 200)], ["MNIST", "SVHN"])
    said = "2 cells are committed, 1 moved, 1 not committed are there\n- TA SVHN: 0.5, now –\n"
    assert ours.verdict(name, []) == f"{name}\n\n{said}"


def test_seconds_of_a_study_are_no_cells(tmp_path, pico_config, monkeypatch):
    name = "Vision/results/studies/cost.json"
    monkeypatch.setattr(ours, "ROOT", tmp_path)
    monkeypatch.setattr(ours, "configs_of", lambda name, options: [pico_config])
    known = {
        "name": "TA",
        "avg": 0.5,
        "gain": [0.1, 0.0, 0.2],
        "seconds": 1.0,
        "step_cpu_seconds": 2.0,
        "hardware": "a",
    }
    now = known | {
        "avg": 0.25,
        "gain": [0.1, 0.0, 0.2 + 1e-12],
        "seconds": 3.0,
        "step_cpu_seconds": 3.0,
        "hardware": "b",
    }
    for file, rows in {tmp_path / name: [known], pico_config.run.dir / "study/cost/rows.json": [now]}.items():
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(rows))
    assert ours.verdict(name, []) == f"{name}\n\n3 cells are committed, 1 moved\n- TA avg: 0.5, now 0.25\n"


def test_an_analysis_comes_after_its_models_and_its_numbers_are_cells(tmp_path, pico_config, monkeypatch):
    name, made = "Vision/results/analyses/residual.json", []
    monkeypatch.setattr(ours, "ROOT", tmp_path)
    monkeypatch.setattr(ours, "configs_of", lambda name, options: [pico_config])
    monkeypatch.setattr(ours, "OURS", {name: our_tables.Ours((), "vision/toy", by="residual")})
    monkeypatch.setattr(ours, "compare", lambda config, of: made.append("compare"))
    monkeypatch.setattr(ours, "analyse", lambda name, config, of: made.append(name))
    ours.make(name, [])
    assert made == ["compare", "residual"] and ours.scripts_of("residual") == ["compare.py", "analyse.py residual"]
    known = {"models": {"TA": {"residual": {"MNIST": 0.5, "SVHN": 0.7}, "mean": 0.6}}, "commit": "one"}
    now = {"models": {"TA": {"residual": {"MNIST": 0.5, "SVHN": 0.9}, "mean": 0.6 + 1e-12}}, "commit": "other"}
    for file, numbers in {tmp_path / name: known, pico_config.run.dir / "analysis/residual.json": now}.items():
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(numbers))
    assert ours.verdict(name, []) == f"{name}\n\n3 cells are committed, 1 moved\n- TA residual SVHN: 0.7, now 0.9\n"


def test_a_table_of_ours_is_made_by_its_commands(pico_config, monkeypatch):
    made = []
    monkeypatch.setattr(
        ours.subprocess, "run", lambda command: made.append(command) or subprocess.CompletedProcess([], 0)
    )
    monkeypatch.setattr(ours, "compare", lambda config, of: made.append(config))
    ours.make("Vision/results/cut.json", ["--run.seed=3"])
    toy, plain, cut = made
    assert toy[-3:] == ["vision", "--out", "toy/vision"]
    assert plain.run.seed == cut.run.seed == 3 and plain.compare.search == {} and list(cut.compare.search) == ["fda"]
    monkeypatch.setattr(ours.subprocess, "run", lambda command: subprocess.CompletedProcess([], 1))
    with pytest.raises(InputError, match="the toy toy/vision of Vision/results/cut.json could not be made"):
        ours.make("Vision/results/cut.json", [])


def test_each_verdict_is_told_when_it_is_known_and_all_in_the_end(monkeypatch, capsys):
    names = ["NLU/results/demo.json", "NLG/results/demo.json"]
    monkeypatch.setattr(ours, "make", lambda name, options: print(f"made {name}"))
    monkeypatch.setattr(ours, "verdict", lambda name, options: f"{name}: 0 moved")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *names])
    reproduce.main()
    first, second = (f"{name}: 0 moved" for name in names)
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    assert said[:3] == [f"==== {names[0]}, 1 of 2 ====", f"made {names[0]}", first]
    assert said[3:] == [
        f"==== {names[1]}, 2 of 2 ====",
        f"made {names[1]}",
        second,
        f"==== {first}",
        f"==== {second}",
    ]


def test_what_is_made_again_tells_of_its_progress(tmp_path, monkeypatch, capsys):
    """As a command of its own does: in the log, line by line where there is no terminal, and where it was stopped."""
    log, name = tmp_path / "log.txt", "NLU/results/demo.json"

    def compared(config, of):
        with (stages := current()).stage("x", "work", Units(2)):
            stages.unit_done("the second")
            raise KeyboardInterrupt

    monkeypatch.setattr(ours.subprocess, "run", lambda command: subprocess.CompletedProcess([], 0))
    monkeypatch.setattr(ours, "compare", compared)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", name, f"--run.log={log}", f"--run.root={tmp_path}"])
    monkeypatch.setattr("common.command.leave", sys.exit)
    with pytest.raises(SystemExit) as ended:
        reproduce.main()
    said = capsys.readouterr().err
    lines = log.read_text().splitlines()
    assert ended.value.code == 130 and "work, 2 of 2 units, the second" in said and "|" not in said
    assert "work, 2 of 2 units, the second" in lines[1] and lines[-1].endswith("interrupted: work, 2 of 2 units")
    where = f"in work, 2 of 2 units; what was done is kept in {tmp_path / 'demo_nlu'}"
    assert said.splitlines()[-1] == f"interrupted {where}; the same command goes on from here"


def test_the_hours_of_a_fine_tuning_are_those_of_its_products():
    """Six multiplications and additions of each weight for each token, at 40 % of 67 TFLOP/s."""
    config = tables.not_fetched(figures.config_of_figure("figure6", []))
    said = figures.fine_tuning_of(4, config, domain)
    expected = 4 * 512 * 6 * (32 * 50) * (12 * 12 * 768**2) / (0.4 * 67e12) / 3600
    found = float(re.search(r"on an H100 ([\d.]+) GPU hours in float32, bounded by arithmetic", said)[1])
    assert said.startswith("fine-tunes 4 times, 512 updates of 32 ") and found == pytest.approx(expected, rel=0.03)


def test_a_dry_run_of_ours_says_commands_and_minutes(capsys):
    assert ours.describe("Vision/results/long.json", []) == []
    said = capsys.readouterr().out
    assert said.count("python scripts/compare.py --config configs/vision/toy.yaml --run.name=long") == 4
    assert re.search(r"\d+ minutes of one core, at best half as long on two: ", said)
    assert ours.in_minutes(0.5) == "30 seconds" and ours.in_minutes(300) == "5 hours"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel5"], "no table or figure is called 'tabel5'; choose from table1, table2"),
        (
            ["table1", "--anchors", "published"],
            "--anchors published: none are known for table1, only for table2",
        ),
        (["figure5", "--anchors", "published"], "none are known for figure5"),
        (["toys", "--anchors", "published"], "none are known for Vision/results/demo.json"),
        (["table5", "--nonsense", "3"], "unrecognized arguments: --nonsense 3"),
    ],
)
def test_what_cannot_be_made_is_refused_at_once(arguments, message):
    command = [sys.executable, str(ROOT / "scripts/reproduce.py"), *arguments, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and message in done.stderr
