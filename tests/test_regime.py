"""The regime of models: their norms and the three conditions, with and without a validation cut."""

import json
from collections import Counter

import pytest

import regime
from common.io.checkpoints import Checkpoint
from helpers import change
from NLG import domain as nlg
from pico_grid import by_split, counting
from pico_nlg import pico_config as pico_nlg_config

pytestmark = pytest.mark.usefixtures("no_figures")


def test_norms_are_those_of_all_blocks_and_conditions_are_judged(pico_config, monkeypatch, capsys):
    monkeypatch.setattr(regime, "SEARCH", {"ta": {"scale": [0.1, 0.5]}, "ties": {"scale": [0.5, 1.0]}})
    regime.regime(pico_config, counting(Counter(), by_split))
    made = json.loads((pico_config.run.dir / "regime/regime.json").read_text())
    base = Checkpoint(pico_config.model.path("base")).read_under("visual.transformer.resblocks.")
    for task, norm in made["norms"].items():
        expert = Checkpoint(pico_config.model.path("expert", task)).read_under("visual.transformer.resblocks.")
        apart = sum(float((expert[n].double() - p.double()).square().sum()) for n, p in base.items())
        assert norm == pytest.approx((apart / sum(float(p.double().square().sum()) for p in base.values())) ** 0.5)
    said = capsys.readouterr().out
    assert (
        "search ta" in said
        and "search ties" in said
        and all(c["says"] in said for c in made["conditions"])
        and len(made["conditions"]) == 3
    )
    assert set(made["averages"]) == {"Pretrained", "Individual", "TA", "TSV", "TIES"}  # what is searched for too
    assert not list((pico_config.run.dir / "regime").glob("anchors"))


@pytest.mark.parametrize(
    ("norm", "averages", "met"),
    [
        (0.02, (0.45, 0.81, 0.55, 0.60), [True, True, True]),
        (0.04, (0.45, 0.81, 0.55, 0.60), [False, True, True]),
        (0.02, (0.61, 0.81, 0.70, 0.75), [True, False, True]),
        (0.02, (0.45, 0.79, 0.55, 0.60), [True, False, True]),
        (0.02, (0.45, 0.81, 0.51, 0.60), [True, True, False]),
        (0.02, (0.45, 0.81, 0.55, 0.55), [True, True, False]),
    ],
)
def test_each_condition_can_fail_alone(norm, averages, met):
    named = dict(zip(("Pretrained", "Individual", "TA", "TSV"), averages, strict=True))
    assert [c["met"] for c in regime.conditions({"a": norm, "b": 0.01}, named)] == met


def test_without_a_training_set_the_coefficient_is_the_config_s(nlg_inputs, tmp_path, capsys):
    config = change(pico_nlg_config(nlg_inputs, tmp_path), "eval", limit=1, allow_code_execution=True)
    regime.regime(config, nlg)
    assert "search" not in capsys.readouterr().out
    merged = json.loads((config.run.dir / "regime/merged/ta/provenance.json").read_text())
    assert merged["start"]["hyper"] == {"scale": config.start.hyper.get("ta", {"scale": 0.3})["scale"]}
