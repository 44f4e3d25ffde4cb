"""How far a command is: stages that are counted, time that is left, lines without a terminal, interrupts."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml

import common.run.progress as progress
import common.run.stages as stages_of
from common.config import ROOT, as_dict
from common.core.errors import InputError
from common.core.notices import warn
from common.pipeline import construct, merge_alone
from common.run.plain_log import told
from common.run.progress import UnitBar, counted
from common.run.stages import command_stages, current, seconds_in_words
from common.run.units import Units
from compare import compare
from compare import stages_of as grid_of
from helpers import change, heeding_interrupts
from Vision import domain


@pytest.fixture
def clock(monkeypatch):
    """A clock of ours: clock[0] is the time."""
    now = [0.0]
    monkeypatch.setattr(stages_of.time, "monotonic", lambda: now[0])
    return now


def test_time_left_is_what_units_of_each_kind_took(clock):
    """Four units of 10 s each, then adapt; of the second grid all is known: 4 x 10 s and 2 x 3 s."""
    with command_stages() as stages:
        stages.expect([f"{run}: {stage}" for run in "ab" for stage in ("construct weight", "adapt x")])
        assert stages.left == "" and stages.where == ""
        bar = UnitBar("construct", 4)
        with stages.stage("a", "construct weight", bar), bar:
            for _ in range(2):
                with bar.unit("u"):
                    clock[0] += 10
            assert stages.where == "stage 1 of 4" and stages.seconds_left() == (20 + 40, False)
            assert stages.left == "more than 60.0 s left in all"
            for _ in range(2):
                with bar.unit("u"):
                    clock[0] += 10
        bar = UnitBar("adapt x", 3)
        with stages.stage("a", "adapt x", bar), bar:
            bar.keep()
            with bar.unit("u"):
                clock[0] += 3
            assert stages.seconds_left() == (3 + 40 + 3 * 3, True), "kept ones took no time; the next has all three"
            assert stages.said == "stage 2 of 4, adapt x, 1 of 2 units, about 52.0 s left in all"


def test_the_end_of_a_stage_within_another_is_not_that_of_the_other(clock):
    lines = []
    with command_stages() as stages:
        stages.listeners.append(lines.append)
        stages.expect(["r: search ta"])
        bar = UnitBar("search ta", 2)
        with stages.stage("r", "search ta", bar), bar, bar.unit("0.3"), stages.stage("r/0", "merge ta"):
            clock[0] += 5
    assert lines[0] == "stage 1 of 1, search ta, 0 of 2 units, merge ta done in 5.0 s"
    assert lines[-1] == "stage 1 of 1, search ta, 1 of 2 units, done in 5.0 s"


def test_long_work_within_a_stage_is_told_twice_a_minute(clock, monkeypatch):
    lines = []
    with command_stages() as stages:
        stages.listeners.append(lines.append)
        stages.expect(["r: merge fisher"])
        with stages.stage("r", "merge fisher"):
            for step in counted(range(100), "steps"):
                assert len(lines) == step // 30
                clock[0] += 1
            for _ in counted(iter("ab"), "rounds"):
                clock[0] += 40
            assert list(counted([], "batches")) == []
    assert lines == [
        *(f"stage 1 of 1, merge fisher, steps, {done} of 100" for done in (30, 60, 90)),
        "stage 1 of 1, merge fisher, rounds, 1",
        "stage 1 of 1, merge fisher, rounds, 2",
        "stage 1 of 1, merge fisher, done in 3.0 min",
    ]


def test_a_merge_in_one_process_tells_how_far_it_is(pico_config, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0)
    lines = []
    with command_stages() as stages:
        stages.listeners.append(lines.append)
        merge_alone(change(change(pico_config, "start", method="pcb"), "run", score=False), domain)
    parts = [line for line in lines if "merge pcb, parts" in line]
    assert [line for line in lines if "merge pcb, survey" in line]
    assert parts[0].startswith("merge pcb, parts, 1 of ") and len(parts) == int(parts[0].split()[-1]) - 1


def test_stages_that_had_nothing_left_are_passed_over(clock):
    with command_stages() as stages:
        stages.expect(["r: construct weight", "r: merge ta", "r: adapt x", "r: score"])
        with stages.stage("r", "adapt x"):
            assert stages.where == "stage 3 of 4"
            with stages.stage("r/search", "merge ta"):  # of something else, within it
                assert stages.where == "stage 3 of 4" and stages.reached == "stage 3 of 4, adapt x"
        assert current() is stages
    assert current() is not stages


@pytest.mark.parametrize(("seconds", "words"), [(3, "3.0 s"), (119, "119.0 s"), (150, "2.5 min"), (9000, "2.5 h")])
def test_a_time_has_the_unit_that_is_worth_reading(seconds, words):
    assert seconds_in_words(seconds) == words


def test_the_grid_goes_through_the_stages_that_it_said(pico_config, no_figures, monkeypatch):
    """With a search and two seeds: every stage is one of those that were announced, in their order."""
    grid = change(
        pico_config, "compare", starts=["pretrained", "ta"], inits=["weight", "gauss"], seeds=[0, 1],
        search={"ta": {"scale": [0.1, 0.2]}},
    )  # fmt: skip
    seen, score = [], domain.score

    def on_the_test_set(config, task, checkpoints, device):  # the pico tasks have no training set to cut
        return score(change(config, "eval", split="test"), task, checkpoints, device)

    monkeypatch.setattr(domain, "score", on_the_test_set)
    with command_stages() as stages:
        stages.watchers.append(lambda: None if stages.going else seen.append(stages.place))
        compare(grid, domain)
    assert stages.expected == grid_of(grid) and seen == list(range(len(stages.expected)))
    assert stages.expected[0] == "pico: search ta" and stages.expected[1:5] == [
        f"pico/seed_0: {stage}"
        for stage in ("construct weight", "adapt fda-pretrained-weight", "merge ta", "adapt fda-ta-weight")
    ]
    assert "pico/seed_1: merge ta" not in stages.expected  # it draws nothing, so it is that of seed 0


def test_without_a_terminal_there_is_a_line_a_unit_and_no_bar(pico_config, capsys, tmp_path):
    log = tmp_path / "logs" / "run.txt"
    quiet = change(pico_config, "run", score=False)
    with command_stages() as stages, told(stages, str(log)):
        construct(quiet, domain)
        warn(f"a warning of {tmp_path}")
    said = capsys.readouterr().err
    lines = [line.split(" ", 2)[2] for line in log.read_text().splitlines()]
    assert "|" not in said and [line for line in said.splitlines() if " units, " in line]
    assert lines[0].startswith("begins: ") and lines[-1] == "finished"
    assert [line.split(",")[:3] for line in lines[1:5]] == [
        ["construct weight", f" {i + 1} of 4 units", f" {task}"]
        for i, task in enumerate(["MNIST", "SVHN", "MNIST", "SVHN"])
    ]
    assert all("loss 0." in line for line in lines[1:5]) and "4 of 4 units, done in" in lines[5]
    assert lines[6] == f"warning: a warning of {tmp_path}"
    assert [line.split(" ", 2)[2] for line in said.splitlines()][:5] == lines[1:6]
    stopped = pytest.raises(KeyboardInterrupt)
    with stopped, command_stages() as stages, told(stages, str(log)), stages.stage("x", "work", Units(2)):
        raise KeyboardInterrupt
    assert log.read_text().splitlines()[len(lines) + 1].endswith("interrupted: work, 2 of 2 units"), "lines are added"


def test_in_a_terminal_the_bar_says_which_stage_of_how_many(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with command_stages() as stages, told(stages, ""):
        stages.expect(["r: construct weight", "r: score"])
        bar = UnitBar("construct", 2)
        with stages.stage("r", "construct weight", bar), bar:
            with bar.unit("one"):
                bar.advance(0.5, 0.25)
            with bar.unit("two"):
                bar.advance(0.5, 0.25)
    said = capsys.readouterr().err
    assert "stage 1 of 2 construct |" in said and "left in all" in said and " 1 of 2 units" not in said


def test_a_log_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(InputError, match=r"run.log is .*file/x.log, which cannot be written")
    with refused, command_stages() as stages, told(stages, str(tmp_path / "file" / "x.log")):
        raise AssertionError("it went on")


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_soon_and_says_what_is_kept(pico_config, tmp_path, sent, status):
    """Ctrl-C, and what batch systems send before they kill. Three units are left; how long the end may take
    is bounded loosely, for busy machines."""
    log, file = tmp_path / "log", tmp_path / "config.yaml"
    config = replace(change(pico_config, "anchors", steps=600), run=replace(pico_config.run, log=str(log)))
    file.write_text(yaml.safe_dump({k: v for k, v in as_dict(config).items() if k != "dry_run"}))
    command = [sys.executable, ROOT / "Vision" / "construct_fda.py", "--config", file]
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=heeding_interrupts
    )
    while process.poll() is None and not (log.is_file() and "1 of 4 units" in log.read_text()):
        time.sleep(0.02)
    began = time.monotonic()
    process.send_signal(sent)
    said = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == status and time.monotonic() - began < 20
    assert said == (
        f"interrupted in construct weight, 1 of 4 units; what was done is kept in {pico_config.run.dir}; "
        "the same command goes on from here"
    )
    assert len(list(pico_config.run.dir.glob("anchors/weight/*/*.safetensors"))) == 1
    assert (
        "Not finished: interrupted in construct weight, 1 of 4 units." in (config.run.dir / "report.html").read_text()
    )
    assert log.read_text().splitlines()[-1].endswith(" interrupted: construct weight, 1 of 4 units")
    noted = json.loads((config.run.dir / "run.json").read_text())["construct weight"]
    assert (noted["ended"], noted["units"], noted["units_of"]) == ("KeyboardInterrupt", 1, 4)
    assert not list(config.run.dir.rglob("*.tmp"))
