"""Device choice, the progress bar's bookkeeping, run.json, and what the commands say when something is wrong."""

import json
import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from socket import gethostname

import pytest
import torch
import yaml

from common.config import ROOT, as_dict
from common.core.errors import InputError
from common.opening import open_experiment
from common.run.background import read_ahead, write_behind
from common.run.device import WORTH_THREADS, prepare, threads_for
from common.run.progress import UnitBar, Units
from common.run.run_log import processor, read_notes, record_stage, total_cost
from common.validation import check_choices
from helpers import change
from Vision import domain as vision


@pytest.mark.parametrize("device", ["gpu", "cpu:3", "cuda:one", ""])
def test_a_device_that_is_none_is_named(device, pico_config):
    with pytest.raises(
        InputError, match=f"run.device is '{device}'; choose from auto, cpu, cuda or, of several, cuda:"
    ):
        prepare(device)
    with pytest.raises(InputError, match="run.device"):
        check_choices(change(pico_config, "run", device=device), vision)


def test_a_device_beyond_those_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="run.device is cuda:2, but torch sees 2 CUDA devices here"):
        prepare("cuda:2")


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="run.device is cuda"):
        prepare("cuda")
    assert prepare("auto") == torch.device("cpu")


def test_small_products_have_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads_for(WORTH_THREADS - 1):
            assert torch.get_num_threads() == 1
        with threads_for(WORTH_THREADS):
            assert torch.get_num_threads() == 2
        with pytest.raises(ValueError), threads_for(0):
            raise ValueError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_waiting_threads_sleep():
    code = "import common, os; print(os.environ['OMP_WAIT_POLICY'])"
    for told, policy in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        rest = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        done = subprocess.run([sys.executable, "-c", code], env=rest | told, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.strip() == policy


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
        with record_stage(pico_config, stage):
            pass
    stages = json.loads((pico_config.run.dir / "run.json").read_text())
    assert list(stages) == ["adapt", "construct weight"]
    assert {"seconds", "commit", "versions", "machine", "time", "config"} <= set(stages["adapt"])
    assert stages["adapt"]["config"]["anchors"]["steps"] == 5


@pytest.fixture
def session(pico_config, monkeypatch):
    """session(seconds, done, kept) records a stage "work" by a clock of ours and returns what run.json then says."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def run(seconds, done=0, kept=0, error=None, config=pico_config):
        with pytest.raises(error) if error else nullcontext(), record_stage(config, "work", Units(done, kept)):
            now[0] += seconds
            if error:
                raise error
        return read_notes(config.run.dir).get("work")

    return run


def test_sessions_of_one_stage_add_up_and_a_repeat_changes_nothing(session, pico_config):
    first = session(10, done=3, error=KeyboardInterrupt)
    assert (first["seconds"], first["ended"]) == (10, "KeyboardInterrupt")
    assert total_cost(pico_config.run.dir, ["work"]) == {}
    whole = session(5, done=1, kept=3)
    assert (whole["seconds"], whole["ended"], whole["units"], whole["units_of"]) == (15, "finished", 4, 4)
    assert whole["peak_gib"] >= first["peak_gib"] > 0.1
    assert session(0.5, kept=4) == whole
    assert session(0.5, error=InputError) == whole  # another config, refused at its first unit
    found = total_cost(pico_config.run.dir, ["work"])
    assert (found["seconds"], found["peak_gib"]) == (15, whole["peak_gib"]) and found["hardware"].startswith(
        f"{processor()}, "
    )
    assert total_cost(pico_config.run.dir, ["work", "other"]) == total_cost(pico_config.run.dir, []) == {}
    assert session(7, done=4)["seconds"] == 7  # made anew


def test_processor_seconds_are_told_only_where_all_were_counted(session, pico_config):
    """Notes of an older version have none: a sum would leave theirs out."""
    session(10, done=3, error=KeyboardInterrupt)
    file = pico_config.run.dir / "run.json"
    notes = json.loads(file.read_text())
    assert notes["work"].pop("cpu_seconds") >= 0
    file.write_text(json.dumps(notes))
    assert "cpu_seconds" not in session(5, done=1, kept=3)
    found = total_cost(pico_config.run.dir, ["work"])
    assert found["seconds"] == 15 and "cpu_seconds" not in found
    session(7, done=4)
    assert total_cost(pico_config.run.dir, ["work"])["cpu_seconds"] >= 0


def test_units_that_nobody_timed_leave_the_time_unknown(session, pico_config):
    """After a power cut three units are there and no note; blocks done by themselves are a part of the work."""
    assert session(0.5, kept=3) is None
    assert session(5, done=1, kept=3)["seconds"] == 5 and total_cost(pico_config.run.dir, ["work"]) == {}
    session(5, done=4, config=replace(pico_config, run=replace(pico_config.run, blocks=[1])))
    assert total_cost(pico_config.run.dir, ["work"]) == {}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is reset on Linux alone")
def test_the_peak_is_that_of_the_stage(pico_config):
    def peak(mib):
        with record_stage(pico_config, "work"):
            torch.ones(mib * 2**18).sum()
        return read_notes(pico_config.run.dir)["work"]["peak_gib"]

    before, large, after = peak(1), peak(512), peak(1)
    assert large - before == pytest.approx(0.5, abs=0.05) and after < large - 0.4


def test_a_command_says_what_is_wrong_in_one_sentence(pico_config, tmp_path):
    settings = {k: v for k, v in as_dict(pico_config).items() if k != "dry_run"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    recipe = [sys.executable, str(ROOT / "Vision" / "adapt.py"), "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(recipe, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there are no anchors at ") and done.stderr.count("\n") == 1


def test_what_a_kill_left_goes_and_what_others_write_stays(pico_config):
    pico_config.run.dir.mkdir(parents=True)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, live, foreign = (
        pico_config.run.dir / f".run.json.{host}.{pid}.tmp"
        for host, pid in ((gethostname(), ended.pid), (gethostname(), os.getppid()), ("elsewhere.lan", ended.pid))
    )
    for file in (left, live, foreign):
        file.write_text("{")
    open_experiment(pico_config, vision)  # which every command begins with, also where nothing is left to do
    assert not left.exists() and live.exists() and foreign.exists()


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
    with write_behind() as write:
        for i in range(5):
            write(done.append, i)
    assert done == [0, 1, 2, 3, 4]


def test_what_goes_wrong_in_writing_behind_is_raised():
    def fails():
        raise InputError("cannot write x")

    done = []
    with pytest.raises(InputError, match="cannot write x"), write_behind() as write:
        write(fails)
    with pytest.raises(InputError, match="cannot write x"), write_behind() as write:
        write(fails)
        write(done.append, 1)
    assert done == []


def test_what_was_written_behind_stays_when_the_work_is_interrupted():
    done = []
    with pytest.raises(KeyboardInterrupt), write_behind() as write:
        write(done.append, 1)
        raise KeyboardInterrupt
    assert done == [1]
