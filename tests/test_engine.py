"""Units of work in other processes: the same bytes, the same sentences, and a lost worker costs its unit alone."""

import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from common import start
from common.config import ROOT
from common.core import notices
from common.core.errors import InputError
from common.evaluation.scoring import is_ours, score_run
from common.evaluation.tuning import choose_hyperparameters, read_search
from common.io.checkpoints import write_text
from common.layout import RunLayout
from common.opening import open_experiment
from common.pipeline import adapt, construct, merge_alone
from common.provenance import merge_provenance
from common.run.cluster import chosen, room_in, roomy
from common.run.engine import Demand, Files, Memory, outcome_of, picklable, place_for, value_of, workers_for
from common.run.processes import Pool, pool_of
from common.run.progress import UnitBar, Units
from common.run.run_log import processor, read_notes, record_stage, total_cost
from common.start import merge_each, merge_groups, survey_of
from common.validation import check_engine
from helpers import change, files_of, heeding_interrupts
from Vision import domain

NO_FILES = Files(Path(), lambda unit: (), lambda unit: ())
GIB = 2**30


@pytest.fixture
def pool() -> Pool:
    """Two workers, which the tests of this file share."""
    return pool_of(2, 1, 0, ["common.pipeline", "Vision.domain"])


def noted(folder: str, what: str, unit: int) -> int:
    """What the unit does: it leaves a file that says that it was begun. The first time unit 2 ends its process, in
    `kill`, or unit 1 raises, in `raise`."""
    first = not list(Path(folder).glob(f"{unit}-*"))
    Path(folder, f"{unit}-{os.getpid()}-{time.monotonic_ns()}").touch()
    if what == "kill" and unit == 2 and first:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "always" and unit == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise" and unit == 1:
        with Units(stage="construct").unit("DTD, block 3"):
            raise ZeroDivisionError("by nothing")
    return unit**2


def begun(folder: Path) -> Counter[int]:
    return Counter(int(file.name.split("-")[0]) for file in folder.iterdir())


def test_a_lost_worker_costs_its_unit_and_no_other_and_is_told(pool, tmp_path, capsys):
    outcomes = pool.outcomes(partial(noted, str(tmp_path), "kill"), range(6), NO_FILES)
    assert {unit: value_of(outcome) for unit, outcome in outcomes} == {unit: unit**2 for unit in range(6)}
    assert begun(tmp_path) == {0: 1, 1: 1, 2: 2, 3: 1, 4: 1, 5: 1}
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert said == [
        "warning: a process was lost at the unit 2, with status -9 (-9 where memory ran out); another begins that unit "
        "again"
    ]


def test_a_unit_that_always_loses_its_worker_is_refused_by_name(pool, tmp_path):
    with pytest.raises(InputError, match=r"3 processes were lost at the unit 2, the last with status -9 .*run.workers"):
        list(pool.outcomes(partial(noted, str(tmp_path), "always"), [2], NO_FILES))


def locked_by_threads(unit: int) -> bool:
    return isinstance(tqdm.get_lock(), type(threading.RLock()))


def test_bars_of_workers_take_no_semaphores_that_a_killed_one_leaves(pool):
    outcomes = pool.outcomes(locked_by_threads, [0, 1], NO_FILES)
    assert [value_of(outcome) for _, outcome in outcomes] == [True, True]


def test_an_error_of_a_worker_is_that_of_one_process(pool, tmp_path):
    """Its type, its words and its notes; the traceback is its cause."""
    with pytest.raises(ZeroDivisionError, match="by nothing") as raised:
        for _, outcome in pool.outcomes(partial(noted, str(tmp_path), "raise"), [1], NO_FILES):
            value_of(outcome)
    assert raised.value.__notes__ == ["construct, DTD, block 3"]
    assert "in noted" in str(raised.value.__cause__)


def test_an_error_that_no_pickle_holds_keeps_its_words():
    class Local(Exception):
        """Of no module."""

    error = Local("boom")
    error.add_note("adapt, block 1")
    other = picklable(error)
    assert str(other) == "Local: boom" and other.__notes__ == ["adapt, block 1"]
    assert type(pickle.loads(pickle.dumps(other))) is RuntimeError
    assert outcome_of(int, "x").error.args == ("invalid literal for int() with base 10: 'x'",)


def test_two_workers_make_the_bytes_of_one_process(pico_config, pool):
    one = change(pico_config, "run", name="one", score=False)
    two = change(one, "run", name="two", workers=2)
    for config in (one, two):
        construct(config, domain)
        adapt(config, domain)
    for folder in ("anchors", "merged"):
        assert files_of(one.run.dir / folder) == files_of(two.run.dir / folder)
    notes = read_notes(two.run.dir)
    for stage, names in (
        ("construct weight", {f"{task}, block {i}" for task in one.tasks for i in (0, 1)}),
        ("adapt fda-pretrained-weight", {"block 0", "block 1"}),
    ):
        workers = notes[stage]["workers"].values()
        assert sorted(name for worker in workers for name in worker["units"]) == sorted(names)
        assert all(worker["peak_gib"] > 0.1 and worker["seconds"] > 0 for worker in workers)
        assert (notes[stage]["units"], notes[stage]["ended"]) == (len(names), "finished")
    assert total_cost(two.run.dir, list(notes))["hardware"].count(f"{processor()}, 1 threads") >= 1
    construct(two, domain)  # nothing is left to do, so no worker is asked and no note changes
    assert read_notes(two.run.dir) == notes


@pytest.mark.parametrize("method", ["ta", "ties", "tsv", "wudi"])
def test_a_merge_in_parts_is_the_merge(pico_config, pool, method):
    """Also one that was cut off after some parts."""
    one = change(change(pico_config, "start", method=method), "run", name="one", score=False)
    two = change(one, "run", name="two", workers=2)
    merge_alone(one, domain)
    experiment = open_experiment(two, domain)
    parts = [part for part in enumerate(merge_groups(experiment)) if part[0] in (1, 3)]
    merge_each(experiment, parts, Units(), merge_provenance(experiment, domain), survey_of(experiment, method))
    merge_alone(two, domain)
    assert files_of(one.run.dir / "merged") == files_of(two.run.dir / "merged")
    note = read_notes(two.run.dir)[f"merge {method}"]
    assert note["units_of"] == note["units"] + 2 == len(merge_groups(experiment))


def test_parts_that_a_kill_left_do_not_stay_in_the_model(pico_config):
    """Nor do those of a merge that was killed when all was done but their removal."""
    config = change(change(pico_config, "start", method="ta"), "run", score=False)
    experiment = open_experiment(config, domain)
    for _ in range(2):
        provenance, units = merge_provenance(experiment, domain), Units()
        merge_each(experiment, [(0, merge_groups(experiment)[0])], units, provenance, survey_of(experiment, "ta"))
        assert RunLayout(config).part_file(0).is_file()
        merge_alone(config, domain)
        assert not [path for path in (config.run.dir / "merged/ta").iterdir() if path.is_dir()]


def test_candidates_of_a_search_are_those_of_one_process(pico_config, pico_inputs, pool, tmp_path):
    shutil.copytree(pico_inputs / "data", tmp_path / "data")
    for file in (tmp_path / "data").rglob("test-*"):
        shutil.copy(file, file.with_name(file.name.replace("test", "train")))
    found = []
    for name, workers in (("one", None), ("two", 2)):
        config = change(change(pico_config, "run", name=name, workers=workers), "eval", data=str(tmp_path / "data"))
        config = change(config, "compare", starts=["ta"], search={"ta": {"scale": [0.5, 0.1, 0.3]}})
        found.append((choose_hyperparameters(config, domain).start.hyper, read_search(config)))
        assert not (config.run.dir / "search").exists()
    for of_row in ("hyper", "scores", "avg", "id"):
        assert [row[of_row] for row in found[0][1]["candidates"]] == [row[of_row] for row in found[1][1]["candidates"]]
    assert found[0][0] == found[1][0] and len(found[0][1]["candidates"]) == 3


def test_test_sets_scored_side_by_side_come_to_the_same_results(pico_config, pool):
    one, two = (change(pico_config, "run", name=f"scored-{n}", workers=n) for n in (1, 2))
    for config in (one, two):
        score_run(config, domain)
    alone, together = (json.loads((config.run.dir / "results.json").read_text())["rows"] for config in (one, two))
    assert [row | {"config": ""} for row in alone] == [row | {"config": ""} for row in together]
    took = read_notes(two.run.dir)["score"]
    assert took["units"] == len(alone) == 4 and len(took["workers"]) in (1, 2)
    assert sorted(name for of in took["workers"].values() for name in of["units"]) == [
        "MNIST, 2 models",
        "SVHN, 2 models",
    ]
    assert not (two.run.dir / "scores").exists()


def test_a_merge_that_another_process_makes_is_waited_for(pico_config, monkeypatch, capsys):
    """Two that wrote one folder at once left a part of the tensors under an index that knew no others."""
    monkeypatch.setattr(notices, "_said", set())
    config = change(change(pico_config, "run", score=False), "start", method="ta")
    made = merge_alone(change(config, "run", name="made"), domain)
    folder = RunLayout(config).start
    folder.parent.mkdir(parents=True)
    other = os.open(folder.with_name(f".{folder.name}.lock"), os.O_CREAT | os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)

    def finishes():
        while "another process works on" not in capsys.readouterr().err:
            time.sleep(0.1)
        shutil.copytree(made, folder)
        os.close(other)

    thread = threading.Thread(target=finishes, daemon=True)
    thread.start()
    monkeypatch.setattr(start, "finish", None)
    assert merge_alone(config, domain) == folder
    thread.join()


def test_rows_that_another_process_writes_are_left_to_it(pico_config):
    config = change(pico_config, "run", workers=1)
    scores = RunLayout(config).scores
    write_text(scores / "MNIST.part", "half a row, which the other is writing")
    other = os.open(scores.with_name(".scores.lock"), os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        score_run(config, domain)
    finally:
        os.close(other)
    assert len(json.loads((config.run.dir / "results.json").read_text())["rows"]) == 4
    assert (scores / "MNIST.part").read_text().startswith("half a row")
    with ExitStack() as held:
        assert is_ours(scores, held, wait=True)
        assert (scores.parent / ".scores.lock").exists()
    assert not (scores.parent / ".scores.lock").exists()


def test_rows_that_an_interruption_left_are_not_scored_again(pico_config, monkeypatch):
    config = change(pico_config, "run", workers=2)
    layout = RunLayout(config)

    def in_this_process(each, experiment, units, bar, *arguments, writes, done, **forecast):
        """The first test set is whole, the second has a model when it stops."""
        each(experiment, units[:1], bar, *arguments)
        monkeypatch.setattr(domain, "score", stopping)
        each(experiment, units[1:], bar, *arguments)

    def stopping(config, test, paths, device):
        yield next(scored_as_ever(config, test, paths, device))
        raise KeyboardInterrupt

    def counting(config, test, paths, device):
        asked.extend((test, name) for name in paths)
        yield from scored_as_ever(config, test, paths, device)

    scored_as_ever, asked = domain.score, []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("common.evaluation.scoring.carry_out", in_this_process)
        score_run(config, domain)
    assert sorted(file.name for file in layout.scores.iterdir()) == ["MNIST.json", "SVHN.part"]
    monkeypatch.setattr(domain, "score", counting)
    score_run(config, domain)
    assert asked == [("SVHN", "Individual")] and not layout.scores.exists()
    assert len(json.loads((config.run.dir / "results.json").read_text())["rows"]) == 4


def test_an_interruption_ends_the_workers_and_loses_no_unit(pico_config, pool, monkeypatch):
    config = change(change(pico_config, "run", score=False, workers=2), "anchors", steps=60)
    with monkeypatch.context() as patch:
        patch.setattr(UnitBar, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            construct(config, domain)
    assert not pool.workers
    found = files_of(config.run.dir / "anchors")
    saved = {name: contents for name, contents in found.items() if not name.endswith("tmp")}  # a worker can be writing
    assert 1 <= len(saved) < 4
    construct(config, domain)
    alone = change(config, "run", name="alone", workers=1)
    construct(alone, domain)
    assert files_of(config.run.dir / "anchors") == files_of(alone.run.dir / "anchors")
    assert saved.items() <= files_of(config.run.dir / "anchors").items()


def interrupted(self, fraction, loss):
    raise KeyboardInterrupt


def test_what_workers_took_is_added_up(pico_config):
    """Processor seconds of all, the peak of the largest, what each did; and over sessions."""
    took = {"seconds": 2.0, "cpu_seconds": 1.5, "peak_gib": 300.0, "node": "n", "hardware": "CPU, 1 threads, Linux"}
    for _ in range(2):
        units = Units(kept=1)
        with record_stage(pico_config, "work", units):
            units.add(Units(done=1, names=["DTD, block 0"]), "n 1", took)
            units.add(Units(done=1, names=["DTD, block 1"]), "n 1", took | {"peak_gib": 100.0})
            units.add(Units(done=1, names=["SVHN, block 0"], loss=0.5), "n 2", took)
    noted = read_notes(pico_config.run.dir)["work"]
    assert noted["cpu_seconds"] == pytest.approx(9, abs=0.5) and noted["peak_gib"] == 300
    assert noted["workers"]["n 1"]["units"] == ["DTD, block 0", "DTD, block 1"]
    assert (noted["workers"]["n 1"]["seconds"], noted["workers"]["n 2"]["peak_gib"]) == (4, 300)
    assert (units.done, units.kept, units.loss) == (3, 1, 0.5)
    assert total_cost(pico_config.run.dir, ["work"])["hardware"] == "2 x CPU, 1 threads, Linux"


def demand(units=32, seconds=4.0, small=True, gib=0.5):
    return Demand(units, seconds, small, lambda: Memory(0, 0, gib * GIB))


@pytest.mark.parametrize(
    ("asked", "workers"),
    [
        (demand(), 4),
        (demand(units=3, seconds=40.0), 3),
        (demand(units=3), 1),  # 12 seconds: not worth the beginning
        (demand(small=False), 1),  # its threads are better
        (demand(gib=2), 3),  # of 10 GiB each takes 2, and 1 for the libraries
        (demand(gib=20), 0),
    ],
)
def test_the_engine_chooses_by_products_work_and_memory(pico_config, monkeypatch, asked, workers):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr("common.run.engine.available_memory", lambda: 10 * GIB)
    assert workers_for(pico_config.run, asked) == workers
    assert workers_for(replace(pico_config.run, workers=7), asked) == min(7, asked.units)
    if workers < 2:
        assert place_for(pico_config.run, asked, []) is None


def test_tests_and_small_runs_stay_in_one_process(pico_config, monkeypatch):
    """A run of milliseconds is over before a worker has begun, however many cores there are."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # or 64 would be given back to this process
    monkeypatch.setattr("common.run.processes.pool_of", None)
    construct(pico_config, domain)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workers": 0}, "run.workers is 0"),
        ({"address": "auto"}, "run.address is for run.engine ray, not for local"),
        ({"gpus_per_unit": 0.5}, "run.gpus_per_unit is for run.engine ray, not for local"),
        ({"engine": "ray", "gpus_per_unit": 1.5}, "run.gpus_per_unit is 1.5; it must be"),
    ],
)
def test_engine_options_are_used_or_refused(pico_config, monkeypatch, fields, message):
    monkeypatch.setattr("common.validation.find_spec", lambda name: object())
    with pytest.raises(InputError, match=message):
        check_engine(replace(pico_config.run, **fields))


def test_ray_is_refused_where_it_is_not_installed(pico_config, monkeypatch):
    monkeypatch.setattr("common.validation.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[cluster\]'"):
        check_engine(replace(pico_config.run, engine="ray"))


def test_machines_get_units_of_blocks_that_they_have_read():
    """Two machines, three blocks of two tasks: each block is read by one machine, until blocks run out."""
    pending = [(block, (task,)) for block in range(3) for task in "ab"]
    readers: dict = {}
    given = {"x": [], "y": []}
    for node in "xyxyxy":
        unit = pending.pop(chosen(pending, node, readers))
        readers.setdefault(unit[0], set()).add(node)
        given[node].append(unit[0])
    assert given == {"x": [0, 0, 2], "y": [1, 1, 2]}


def test_machines_are_filled_by_the_room_that_they_have():
    needs = {"CPU": 2, "GPU": 0, "memory": 10}
    nodes = {"large": {"CPU": 9, "memory": 45}, "small": {"CPU": 4, "memory": 19}, "head": {"CPU": 0, "memory": 99}}
    assert {node: room_in(has, needs) for node, has in nodes.items()} == {"large": 4, "small": 1, "head": 0}
    running: list = []
    while node := roomy(nodes, needs, running, None):
        running.append((len(running), node))
    assert Counter(node for _, node in running) == {"large": 8, "small": 2}  # one waits for each that is worked on
    assert roomy(nodes, needs, running[:3], 3) is None and roomy(nodes, needs, running[:2], 3)


SLEEPER = """
import sys
from functools import partial
from common.run.processes import pool_of
from test_engine import NO_FILES, asleep
if __name__ == "__main__":
    list(pool_of(2, 1, 0, []).outcomes(partial(asleep, sys.argv[1]), [0, 1], NO_FILES))
"""


def asleep(folder: str, unit: int) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_driver_however_it_ends(tmp_path, blow):
    """Also in the middle of a unit: nobody is left who would read what they make."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    (tmp_path / "pids").mkdir()
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    run = [sys.executable, str(tmp_path / "sleeper.py"), str(tmp_path / "pids")]
    driver = subprocess.Popen(
        run, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL, preexec_fn=heeding_interrupts
    )
    while len(pids := [int(file.name) for file in (tmp_path / "pids").iterdir()]) < 2:
        assert driver.poll() is None
        time.sleep(0.1)
    driver.send_signal(blow)
    driver.wait(30)
    until = time.monotonic() + 30
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < until, f"left behind: {alive}"
        time.sleep(0.05)


def test_a_merge_in_one_process_has_the_threads_of_a_worker(pico_config, monkeypatch):
    """With other threads the same decomposition is rounded otherwise."""

    def noting(*of, **more):
        seen.append(torch.get_num_threads())
        return as_ever(*of, **more)

    seen, as_ever = [], start.merge
    monkeypatch.setattr(start, "merge", noting)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        merge_alone(change(change(pico_config, "start", method="tsv"), "run", score=False), domain)
        assert set(seen) == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_engine_sees_all_threads_though_a_unit_takes_one(pico_config, monkeypatch):
    """Small products are worked on by one thread; how many processes that is, all threads of the machine decide."""
    seen, config = [], change(pico_config, "run", score=False)
    monkeypatch.setattr("common.opening.place_for", lambda run, demand, libraries: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        construct(config, domain)
        adapt(config, domain)
    finally:
        torch.set_num_threads(before)
    assert seen == [3, 3]
