"""Device choice, the progress bar's bookkeeping, run.json, and what the commands say when something is wrong."""

import json
import subprocess
import sys
import threading

import pytest
import torch
import yaml

from common.config import as_dict
from common.errors import InputError
from common.runtime import ROOT, UnitBar, in_precision, prepare, read_ahead, recorded, written_behind


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


def test_the_next_item_is_read_while_the_caller_works():
    read = [threading.Event() for _ in range(3)]

    def items():
        for i in range(3):
            read[i].set()
            yield i

    for i in (ahead := read_ahead(items())):
        assert i == 2 or read[i + 1].wait(5)
    assert list(ahead) == []


def test_what_goes_wrong_in_reading_ahead_is_raised_in_its_turn():
    def items():
        yield 1
        raise InputError("there is no file x")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(InputError, match="there is no file x"):
        next(ahead)


def test_what_is_written_behind_is_there_at_the_end_in_order():
    done = []
    with written_behind() as write:
        for i in range(5):
            write(done.append, i)
    assert done == [0, 1, 2, 3, 4]


def test_what_goes_wrong_in_writing_behind_is_raised():
    def fails():
        raise InputError("cannot write x")

    done = []
    with pytest.raises(InputError, match="cannot write x"), written_behind() as write:
        write(fails)
    with pytest.raises(InputError, match="cannot write x"), written_behind() as write:
        write(fails)
        write(done.append, 1)
    assert done == []


def test_what_was_written_behind_stays_when_the_work_is_interrupted():
    done = []
    with pytest.raises(KeyboardInterrupt), written_behind() as write:
        write(done.append, 1)
        raise KeyboardInterrupt
    assert done == [1]


def test_bf16_rounds_products_and_nothing_else():
    """2⁻⁸ is lost beside 1 in bfloat16: the product sees 1, the sum that is no product sees all."""
    x, weight = torch.tensor([[[1 + 2**-9]]]), {"weight": torch.ones(1, 1)}
    with in_precision(lambda params, x: x @ params["weight"].T, "bf16", x.device) as block:
        assert block(weight, x).item() == 1 and block(weight, x).dtype == torch.float32
    with in_precision(lambda params, x: x + params["weight"], "bf16", x.device) as block:
        assert block(weight, x).item() == 2 + 2**-9
    with in_precision(lambda params, x: x @ params["weight"].T, "float32", x.device) as block:
        assert block(weight, x).item() == 1 + 2**-9
    assert torch.get_float32_matmul_precision() == "highest"
