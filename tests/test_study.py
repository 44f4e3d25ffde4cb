"""The studies: points are whole experiments, and scaled experts are what they say."""

import json

import pytest
import torch

import study
from common.core.errors import InputError
from common.io.checkpoints import Checkpoint
from helpers import change
from NLU import domain as nlu
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


def test_experts_with_heads_are_not_scaled(nlu_config):
    with pytest.raises(InputError, match=r"study\.py scale is for vision"):
        study.study("scale", nlu_config, nlu)
