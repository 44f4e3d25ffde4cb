"""A Ray cluster of two machines, played by two raylets on this one: the same bytes, and losses cost what they hit."""

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from common import opening
from common.core.errors import InputError
from common.layout import RunLayout
from common.pipeline import adapt, construct, construct_each
from common.run.engine import Memory
from common.run.progress import UnitBar
from common.run.run_log import read_notes
from helpers import change, files_of
from pico_vision import PICO_CLIP, pico_config, write_pico_clip
from Vision import domain

pytestmark = pytest.mark.slow
LOSSES = 20
NODE = {"num_cpus": 1, "object_store_memory": 2**28}


@pytest.fixture(scope="module")
def cluster():
    """A head without work and two machines for one unit each, which ask for a token of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", uuid4().hex)
        patch.setenv("RAY_agent_register_timeout_ms", "300000")  # a busy machine takes its time
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        import ray
        from ray.cluster_utils import Cluster

        made = Cluster(True, head_node_args=NODE | {"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            made.add_node(**NODE)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def deep(tmp_path, cluster):
    """An experiment of sixteen units, on the cluster, and the same in one process."""
    write_pico_clip(tmp_path / "clip", fields=PICO_CLIP | {"vision_cfg": PICO_CLIP["vision_cfg"] | {"layers": 8}})
    alone = change(pico_config(tmp_path, tmp_path), "run", name="alone", score=False)
    return alone, change(alone, "run", name="cluster", engine="ray", address=cluster.address)


@pytest.mark.parametrize("shared", [True, False])
def test_two_machines_make_the_bytes_of_one_process(deep, shared, monkeypatch):
    """With snapshots, and from a merged start, which machines that do not see the run's folder are sent."""
    monkeypatch.setattr("common.run.cluster.sees", Path.is_file if shared else Path.is_dir)
    alone, many = (change(change(config, "start", method="ta"), "anchors", snapshots=[0, 2]) for config in deep)
    for config in (alone, many):
        construct(config, domain)
        adapt(config, domain)
    for folder in ("anchors", "merged"):
        assert files_of(alone.run.dir / folder) == files_of(many.run.dir / folder)
    assert len(list(many.run.dir.rglob("snapshots_*"))) == 16
    assert not list(many.run.dir.glob(".*")), "the file by which machines see the folder is left"
    workers = read_notes(many.run.dir)["construct weight"]["workers"]
    blocks = [{name.split("block ")[1] for name in worker["units"]} for worker in workers.values()]
    assert sum(len(worker["units"]) for worker in workers.values()) == 16
    assert sum(map(len, blocks)) <= 8 + 2, "a block is read by one machine, but for the last ones"


def test_what_no_machine_has_is_refused(deep):
    with pytest.raises(InputError, match="has what a unit takes: 1 CPU, 0 GPU and 1048577"):
        opening.carry_out(
            construct_each,
            opening.open_experiment(deep[1], domain),
            [(0, ("MNIST",))],
            UnitBar("construct", 1),
            writes=RunLayout(deep[1]).anchor_files,
            seconds=1.0,
            memory=lambda: Memory(0, 0, 2**50),
        )


def begun_each(experiment, units, bar):
    """Construction that leaves a file at the beginning of each unit, and takes a second or so for it."""
    for index, tasks in units:
        folder = Path(experiment.config.run.root) / "begun"
        folder.mkdir(exist_ok=True)
        (folder / f"{index} {tasks[0]} {os.getpid()} {uuid4().hex}").touch()
        time.sleep(random.Random(index).uniform(0.5, 2))
    construct_each(experiment, units, bar)


def test_twenty_losses_change_no_byte_and_cost_what_they_hit(deep, cluster, tmp_path):
    """Machines are removed and workers killed at random moments; each loss costs one unit at most."""
    alone, many = deep
    construct(alone, domain)
    bars: list[UnitBar] = []

    def construct_begun(config):
        experiment = opening.open_experiment(config, domain)
        forecast = {"memory": lambda: Memory(0, 0, 2**20), "seconds": 2.0}
        with UnitBar("construct", 16) as bar:
            writes = RunLayout(config).anchor_files
            opening.carry_out(begun_each, experiment, experiment.units, bar, writes=writes, **forecast)
        bars.append(bar)

    moments, lost, seen = random.Random(), [], 0
    with ThreadPoolExecutor(1) as thread:
        while len(lost) < LOSSES:
            config = change(many, "run", name=f"cluster{len(bars)}")
            running = thread.submit(construct_begun, config)
            while not running.done():
                time.sleep(moments.uniform(2, 8))
                begun = len(list((tmp_path / "begun").glob("*")))
                if len(lost) < LOSSES and begun > seen and not running.done():  # a busy machine begins none for long
                    seen = begun
                    lost += lose(cluster, tmp_path / "begun", moments, "machine" if len(lost) % 2 else "worker")
            running.result()
            assert files_of(alone.run.dir / "anchors") == files_of(config.run.dir / "anchors")
    attempts, units = len(list((tmp_path / "begun").iterdir())), 16 * len(bars)
    print(f"{len(lost)} losses in {len(bars)} runs of 16 units: {attempts} attempts of {units} units")
    assert all(bar.done + bar.kept == 16 for bar in bars) and sum(bar.kept for bar in bars) <= LOSSES
    assert units <= attempts <= units + LOSSES


def lose(cluster, begun, moments, what):
    """Lose a machine, which another replaces, or the worker that began a unit last; [] if none has of late."""
    if what == "machine":
        cluster.remove_node(moments.choice(list(cluster.worker_nodes)), allow_graceful=False)
        while len(cluster.worker_nodes) < 2:
            with suppress(Exception):  # Ray gives a machine 30 seconds to begin, which a busy one does not keep
                cluster.add_node(**NODE)
        return [what]
    newest = max(begun.glob("*"), key=lambda file: file.stat().st_mtime, default=None)
    if newest and newest.stat().st_mtime > time.time() - 8:
        with suppress(ProcessLookupError):
            os.kill(int(newest.name.split()[2]), signal.SIGKILL)
            return [what]
    return []
