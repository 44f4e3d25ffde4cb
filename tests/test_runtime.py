"""Device choice, the progress bar's bookkeeping, run.json, and what the commands say when something is wrong."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

from common.config import as_dict
from common.errors import InputError
from common.runtime import ROOT, UnitBar, prepare, recorded


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="run.device is cuda"):
        prepare("cuda")
    assert prepare("auto") == torch.device("cpu")


def test_the_bar_counts_fractions_and_forgets_what_was_kept(capsys):
    with UnitBar("construct", 3) as bar:
        with bar.unit("one"):
            bar.keep()
        with bar.unit("two"):
            bar.advance(0.5, 0.25)
            assert (bar.bar.n, bar.bar.total) == (0.5, 2)
        assert bar.bar.n == 1
    assert "construct (1 kept)" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_names_stage_and_unit():
    with (
        pytest.raises(InputError, match="construct: DTD, block 3: boom"),
        UnitBar("construct", 1) as bar,
        bar.unit("DTD, block 3"),
    ):
        raise FloatingPointError("boom")


def test_every_stage_leaves_its_certificate(pico_config):
    for stage in ("construct weight", "adapt"):
        with recorded(pico_config, stage):
            pass
    stages = json.loads((pico_config.run.dir / "run.json").read_text())
    assert list(stages) == ["adapt", "construct weight"]
    assert {"seconds", "commit", "versions", "machine", "time", "config"} <= set(stages["adapt"])
    assert stages["adapt"]["config"]["anchors"]["steps"] == 5


def test_a_command_says_what_is_wrong_in_one_sentence(pico_config, tmp_path):
    settings = {k: v for k, v in as_dict(pico_config).items() if k != "dry_run"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    recipe = [sys.executable, str(ROOT / "Vision" / "adapt.py"), "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(recipe, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no file ") and done.stderr.count("\n") == 1
