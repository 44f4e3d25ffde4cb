"""The studies: points are whole experiments, and scaled experts are what they say."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import study
from common.core.errors import InputError
from common.evaluation import studies
from common.evaluation.studies import split_of
from common.io.checkpoints import Checkpoint
from common.io.examples import Sample
from helpers import change
from NLU import domain as nlu
from pico_grid import counting
from pico_vision import PICO_TASKS
from Vision import domain

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def quick(pico_config):
    return change(change(pico_config, "compare", starts=["ta"], inits=["weight"]), "anchors", steps=2)


def test_more_tasks_are_the_first_ones(quick, monkeypatch, capsys):
    monkeypatch.setattr(study, "SIZES", (1, 2, 4))
    study.study("tasks", quick, domain)
    folder = quick.run.dir / "study/tasks"
    rows = json.loads((folder / "rows.json").read_text())
    assert [row["at"] for row in rows] == [1, 2] and {row["start"] for row in rows} == {"ta"}
    results = json.loads((folder / "1/results.json").read_text())
    assert results["tasks"] == PICO_TASKS[:1]
    values = {(r["method"], r["label"]): r["value"] for r in results["rows"]}
    assert rows[0]["avg"] == pytest.approx(values["ta", ""]) and rows[0]["fda"] == pytest.approx(values["fda", ""])
    assert rows[0]["gain"][0] == pytest.approx(values["fda", ""] - values["ta", ""])
    assert (folder / "table.md").read_text() in capsys.readouterr().out


def test_scaled_experts_are_so_far_from_the_base(quick, monkeypatch):
    monkeypatch.setattr(study, "SCALES", (0.5, 2.0))
    study.study("scale", quick, domain)
    folder, base = quick.run.dir / "study/scale", Checkpoint(quick.model.path("base"))
    rows = json.loads((folder / "rows.json").read_text())
    assert rows[1]["norm"] == pytest.approx(4 * rows[0]["norm"], rel=1e-3)
    assert (folder / "figure.png").stat().st_size > 1000
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    tau = Checkpoint(quick.model.path("expert", "MNIST")).read([name])[name] - base.read([name])[name]
    made = Checkpoint(folder / "2/experts/MNIST/merged/ta").read([name])[name] - base.read([name])[name]
    torch.testing.assert_close(made, 2 * tau, rtol=0, atol=1e-5)


def test_rates_are_folders_beside_the_toy_s(quick, monkeypatch):
    monkeypatch.setattr(study, "RATES", ("1e-4", "2e-4"))
    monkeypatch.setattr(study, "TA_SCALES", [0.2, 0.4])
    root = Path(quick.model.root).resolve()
    quick = change(quick, "model", root=str(root / "toy/checkpoints"))
    shutil.copytree(root, root / "toy-1e-4/checkpoints")
    scored = counting(Counter(), lambda config, *of: domain.score(change(config, "eval", split="test"), *of))
    with pytest.raises(InputError, match=r"toy-2e-4/checkpoints: python scripts/make_toy.py vision .* --rate 2e-4"):
        study.study("rates", quick, scored)
    shutil.copytree(root / "toy-1e-4", root / "toy-2e-4")
    study.study("rates", quick, scored)
    folder = quick.run.dir / "study/rates"
    rows = json.loads((folder / "rows.json").read_text())
    assert [row["at"] for row in rows] == [1e-4, 2e-4] and (folder / "figure.png").is_file()
    assert (folder / "1e-4/merged/ta/provenance.json").is_file()


def test_ablations_change_one_thing_at_a_time(quick, monkeypatch):
    quick = change(change(quick, "anchors", number=4, steps=5, init="gauss"), "adapt", epochs=4)
    points = {(what, at): point for what, at, point in study.of_ablations(quick, domain)}
    own = points.pop(("as configured", ""))
    plain, trained = own.anchors, own.adapt.for_start("pretrained")
    for (what, at), point in points.items():
        new, adapt = point.anchors, point.adapt.for_start("pretrained")
        (init,) = point.compare.inits
        changed = {
            "init": (init, new.scale) != (plain.init, plain.scale),
            "anchors": new.number != plain.number,
            "tokens": new.tokens != plain.tokens,
            "steps": new.steps != plain.steps,
            "weights": new.weights != plain.weights,
            "distance": (new.distance, adapt.distance) != (plain.distance, trained.distance),
            "epochs": adapt.epochs != trained.epochs,
        }
        assert [key for key, differs in changed.items() if differs] == [what], at
        assert (point.run.name == own.run.name) == (what == "epochs" or at.startswith("cos")), "anchors are made once"
    assert {at for what, at in points if what == "init"} == {"σ 0.0001", "σ 0.01", "σ 1", "σ 10", "weight"}
    assert len([at for what, at in points if what == "distance"]) == 8


def test_ablations_are_told_against_the_config_s_own(quick, monkeypatch):
    for name, few in {"SIGMAS": (10.0,), "NUMBERS": (), "TOKENS": (), "STEPS": (), "EPOCHS": (0.5,)}.items():
        monkeypatch.setattr(study, name, few)
    monkeypatch.setattr(study, "DISTANCES", ("cos", "mse"))
    monkeypatch.setattr(study, "WEIGHTS", ("equal", "size"))
    study.study("ablations", change(quick, "adapt", epochs=4), domain)
    folder = quick.run.dir / "study/ablations"
    rows = json.loads((folder / "rows.json").read_text())
    assert [(row["what"], row["at"]) for row in rows] == [
        ("as configured", ""),
        ("init", "σ 10"),
        ("weights", "size"),
        ("distance", "cos, mse"),
        ("distance", "mse, cos"),
        ("distance", "mse, mse"),
        ("epochs", "2"),
    ]
    assert rows[0]["gain"] == [0, 0, 0]
    assert all(row["gain"][0] == pytest.approx(row["fda"] - rows[0]["fda"]) for row in rows)
    results = json.loads((folder / "own/results.json").read_text())["rows"]
    assert {row["label"] for row in results if row["method"] == "fda"} == {"", "distance cos, mse", "epochs 2"}


def test_cost_is_that_of_the_start_and_of_both_stages(quick, capsys):
    study.study("cost", change(quick, "compare", starts=["pretrained", "ta"]), domain)
    folder = quick.run.dir / "study/cost"
    rows = {row["name"]: row for row in json.loads((folder / "rows.json").read_text())}
    assert list(rows) == ["TA", "FDA (Pretrained, Weight)", "FDA (TA, Weight)"]
    notes = json.loads((quick.run.dir / "run.json").read_text())
    stages = ["construct weight", "adapt fda-ta-weight"]
    for clock in ("seconds", "cpu_seconds"):
        own = sum(notes[stage][clock] for stage in stages)
        assert own > 0 and rows["FDA (TA, Weight)"][f"step_{clock}"] == pytest.approx(own)
        assert rows["FDA (TA, Weight)"][clock] == pytest.approx(own + notes["merge ta"][clock])
    assert rows["TA"]["step"] == rows["TA"]["gain"]
    assert "Processor seconds" in capsys.readouterr().out


def test_methods_have_a_line_for_each_start_the_best_first(quick, capsys):
    study.study("methods", change(quick, "compare", starts=["pretrained", "ta", "average"]), domain)
    folder = quick.run.dir / "study/methods"
    rows = {row["name"]: row for row in json.loads((folder / "rows.json").read_text())}
    lines = [line.split("|")[1:-1] for line in (folder / "table.md").read_text().splitlines()[2:]]
    table = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    assert set(table) == {"Pretrained", "TA", "Average"}
    assert [float(cells[1]) for cells in table.values()] == sorted((float(c[1]) for c in table.values()), reverse=True)
    for start, (data, own, _, fda, seconds, gain) in table.items():
        row = rows[f"FDA ({start}, Weight)"]
        assert float(fda) - float(own) == pytest.approx(100 * row["step"][0], abs=0.011)
        assert (
            not data and float(seconds) == round(row["cpu_seconds"]) and gain.startswith(f"{100 * row['step'][0]:+.2f}")
        )
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_of_starts_says_which_of_them_see_data_of_the_tasks():
    named = {"WUDI": "", "RegMean": "train", "AdaMerging": "test", "RegMean + SVC": "train", "Pretrained": ""}
    assert {start: split_of(start) for start in named} == named


def test_a_model_that_was_scored_in_part_has_no_line(quick):
    """Its start was given up while it was scored, and its rows of some test sets are left."""
    asked = change(quick, "compare", starts=["ta"])
    study.study("methods", asked, domain)
    folder, file = quick.run.dir / "study/methods", quick.run.dir / "results.json"
    before = (folder / "rows.json").read_bytes()
    kept = json.loads(file.read_text())
    one = next(row for row in kept["rows"] if row["method"] == "ta")
    file.write_text(json.dumps(kept | {"rows": [*kept["rows"], one | {"method": "tsv"}]}))
    study.study("methods", asked, domain)
    assert (folder / "rows.json").read_bytes() == before
    assert "tsv" in file.read_text()


def test_a_merge_that_a_cheaper_one_equals_is_beaten():
    row = {"cpu_seconds": 2.0, "avg": 0.5}
    cheaper, better, same = row | {"cpu_seconds": 1.0}, row | {"avg": 0.6}, dict(row)
    assert studies.beats(cheaper, row) and studies.beats(better, row)
    assert not studies.beats(same, row) and not studies.beats(row, better)
    assert not studies.beats(cheaper | {"avg": 0.4}, row)


def test_real_inputs_are_what_reaches_each_block_of_the_expert(quick, monkeypatch, tmp_path):
    """By a forward pass of the whole expert, with a hook on its second block."""
    monkeypatch.setattr(study, "REAL", (3,))
    data = tmp_path / "with_train"
    shutil.copytree(quick.eval.data, data)
    for file in data.glob("*/*test*"):
        shutil.copy(file, file.with_name(file.name.replace("test", "train")))
    quick = change(quick, "eval", data=str(data))
    study.study("real", quick, domain)
    folder = quick.run.dir / "study/real"
    (row,) = json.loads((folder / "rows.json").read_text())
    assert row["at"] == 3 and not (folder / "3/anchors").exists(), "nothing was constructed"
    expert = Checkpoint(quick.model.path("expert", "SVHN"))
    model = domain.skeleton(quick.model)
    model.load_state_dict(expert.read(expert.shapes), strict=False, assign=True)
    task = domain.calibration_task(quick, "SVHN", Sample("train", 3, 3), torch.device("cpu"))
    (batch,), seen = task.batches, []
    model.visual.transformer.resblocks[1].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    model.encode_image(*batch.values())
    kept = torch.from_numpy(np.load(folder / "3/inputs/SVHN/dual_anchors_layer_2.npy"))
    torch.testing.assert_close(kept.transpose(0, 1), seen[0], rtol=1e-4, atol=1e-5)


def test_without_a_test_set_of_a_task_there_are_no_real_inputs(quick):
    with pytest.raises(InputError, match="needs data of every task, and there is no test set for plants"):
        study.study("real", replace(quick, tasks=["MNIST", "plants"]), domain)


def test_experts_with_heads_are_not_scaled(nlu_config):
    with pytest.raises(InputError, match=r"study\.py scale is for vision"):
        study.study("scale", nlu_config, nlu)
