"""Units of work as tasks of a Ray cluster: Ray places them, starts them, and begins them again where one was lost.

Where all machines see the run's folder, workers write there. Elsewhere the files of the run that a unit reads go to the
machine through Ray's object store, and those that it writes come back for the driver to write. Weights are read where
the work is done.
"""

import logging
import os
import shutil
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname
from typing import Any
from uuid import uuid4

from common.config import Run
from common.core.errors import InputError
from common.io.checkpoints import replacing
from common.run.at_node import Home, code_version, gpu_memory, sees, unit_at_node
from common.run.engine import LIBRARIES, Demand, Files, Outcome, Work
from common.run.run_log import NOTES

RETRIES = 10  # times that a unit may lose its worker or its machine
SHARES = 4  # units on a GPU at most, where it has memory for more
QUEUED = 2  # units handed out for each that a machine has room for, so that none waits for the driver
Resources = Mapping[str, float]
"""What a machine has, or a unit takes, by Ray's names: CPU, GPU, memory in bytes."""


def connect(run: Run) -> Any:
    """Ray, connected to the cluster of run.address, or to one of this machine alone; InputError if there is none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    os.environ.setdefault("RAY_agent_register_timeout_ms", "300000")  # a busy machine takes longer than Ray expects
    import ray

    if ray.is_initialized():  # by the stage before
        return ray
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    heeds = signal.getsignal(signal.SIGTERM)
    try:
        if run.address:
            ray.init(address=run.address, **quiet)
        else:
            cpus = max(run.workers or 1, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    except Exception as error:  # Ray raises no type of its own
        what = f"no Ray cluster answers at run.address {run.address}" if run.address else "Ray did not start"
        raise InputError(f"{what}: {' '.join(str(error).split())}") from error
    if callable(heeds) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, heeds)  # Ray's own would end the command without a word
    return ray


class Cluster:
    """The machines of a Ray cluster, where the units of one stage are done."""

    def __init__(self, run: Run, demand: Demand):
        self.ray, self.run = connect(run), run
        nodes = self.nodes()
        self.needs = self.needs_of(demand, nodes)
        room = sum(room_in(has, self.needs) for has in nodes.values())
        words = f"{self.needs['CPU']:g} CPU, {self.needs['GPU']:g} GPU and {self.needs['memory'] / 2**30:.1f} GiB"
        if not room:
            raise InputError(f"no machine of the Ray cluster has what a unit takes: {words}")
        self.token = run.dir / f".{NOTES}.{gethostname()}.{os.getpid()}.tmp"  # a name that is tidied up after a kill
        with shown(self.token):
            shared = all(self.on_each(nodes, sees, self.token.absolute()))
        self.root = "" if shared else f"/tmp/fda-{uuid4().hex}"
        where = "" if shared else ", which send back what they make"
        self.said = f"Ray, {len(nodes)} machine(s){where}, with room for {room} units of {words} each"

    def nodes(self) -> dict[str, Resources]:
        """{id: resources} of the machines that are there."""
        return {node["NodeID"]: node["Resources"] for node in self.ray.nodes() if node["Alive"]}

    def needs_of(self, demand: Demand, nodes: Mapping[str, Resources]) -> dict[str, float]:
        """What Ray keeps free for a unit: a core for small products, else a share of all or a whole machine; the memory
        that the dry run forecasts; where there are GPUs, run.gpus_per_unit of them or the share whose memory does.
        """
        memory, run, share = demand.memory(), self.run, 0.0
        with_gpus = {node: has for node, has in nodes.items() if has.get("GPU")}
        if run.device != "cpu" and with_gpus:
            if run.gpus_per_unit is None:
                smallest = min(self.on_each(with_gpus, gpu_memory, num_gpus=0.01))
                share = 1 / max(1, min(SHARES, smallest // (LIBRARIES + memory.gpu)))
            else:
                share = run.gpus_per_unit
        cores = [int(has["CPU"]) for has in nodes.values() if has.get("CPU", 0) >= 1]
        cpus = (
            1 if share or demand.small else max(1, sum(cores) // run.workers if run.workers else min(cores, default=1))
        )
        cpus = min(cpus, min(cores, default=1))
        return {"CPU": cpus, "GPU": share, "memory": LIBRARIES + int(memory.host if share else memory.alone)}

    def on_each(self, nodes: Iterable[str], function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        """What a function returns on each of some machines, without those that are lost meanwhile."""
        remote = self.ray.remote(num_cpus=0, max_retries=0, **options)(function)
        asked = {n: remote.options(scheduling_strategy=at(n, soft=False)).remote(*arguments) for n in nodes}
        answers, failure = [], None
        for node, task in asked.items():
            try:
                answers.append(self.ray.get(task))
            except self.ray.exceptions.RayError as error:
                failure = error
                if node in self.nodes():
                    break
        else:
            if answers:
                return answers
        said = " ".join(str(failure).split())
        raise InputError(f"a machine of the Ray cluster did not answer: {said}") from failure

    def outcomes(self, work: Work, units: Sequence[Any], files: Files) -> Generator[tuple[Any, Outcome]]:
        """Units with their outcomes, as they come. Ray begins a unit again that was lost with its worker or machine."""
        threads = int(self.needs["CPU"])
        home = Home(os.getcwd(), code_version(), threads, self.token.absolute(), self.run.root, self.root)
        takes = {"num_cpus": self.needs["CPU"], "num_gpus": self.needs["GPU"], "memory": self.needs["memory"]}
        remote = self.ray.remote(max_retries=RETRIES, **takes)(unit_at_node)
        pending, running, readers = list(units), dict[Any, tuple[Any, str]](), defaultdict[Any, set[str]](set)
        sent = Sent(self.ray, files) if self.root else None
        with shown(self.token):
            try:
                while pending or running:
                    nodes = self.nodes()
                    while pending and (node := roomy(nodes, self.needs, running.values(), self.run.workers)):
                        unit = pending.pop(chosen(pending, node, readers))
                        readers[block_of(unit)].add(node)
                        bound = (sent.read_by(unit), sent.names(files.writes(unit))) if sent else ({}, [])
                        task = remote.options(name=str(unit), scheduling_strategy=at(node, soft=True))
                        running[task.remote(work, unit, home, *bound)] = unit, node
                    for done in self.ray.wait(list(running), timeout=1)[0]:
                        unit, _ = running.pop(done)
                        yield unit, self.received(done, unit, sent)
            finally:
                for reference in running:
                    self.ray.cancel(reference, force=True)
                if sent:
                    self.on_each(self.nodes(), shutil.rmtree, self.root, True)

    def received(self, reference: Any, unit: Any, sent: "Sent | None") -> Outcome:
        """The outcome of a unit, once its files are written. Raises: InputError if it was lost again and again."""
        try:
            outcome, made = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            said = " ".join(str(error).split())
            raise InputError(f"the unit {unit} lost its worker {RETRIES + 1} times, the last by: {said}") from error
        for name, data in made.items():
            assert sent
            with replacing(sent.root / name) as temporary:
                temporary.write_bytes(data)
        return outcome


class Sent:
    """The files of a run in Ray's object store, each put there when it is first read."""

    def __init__(self, ray: Any, files: Files):
        self.ray, self.files, self.root = ray, files, files.root
        self.stored: dict[str, Any] = {}

    def names(self, paths: Iterable[Path]) -> list[str]:
        """What files are called below the root of all runs."""
        return [str(path.relative_to(self.root)) for path in paths]

    def read_by(self, unit: Any) -> dict[str, Any]:
        """{name: reference} of what a unit reads, and of what it is to write and is there."""
        for name in (names := self.names([*self.files.reads(unit), *self.files.writes(unit)])):
            if name not in self.stored and (self.root / name).is_file():
                self.stored[name] = self.ray.put((self.root / name).read_bytes())
        return {name: self.stored[name] for name in names if name in self.stored}


@contextmanager
def shown(token: Path) -> Iterator[None]:
    """While the block runs there is a file by which a machine sees whether it sees the run's folder."""
    token.parent.mkdir(parents=True, exist_ok=True)
    token.touch()
    try:
        yield
    finally:
        token.unlink(missing_ok=True)


def at(node: str, soft: bool) -> Any:
    """The wish for a machine; soft: another will do when it is gone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=soft)


def block_of(unit: Any) -> Any:
    """The block that a unit reads."""
    return unit[0] if isinstance(unit, tuple) else unit


def room_in(has: Resources, needs: Resources) -> int:
    """How many units a machine has room for."""
    return int(min(has.get(what, 0) // much for what, much in needs.items() if much))


def roomy(
    nodes: Mapping[str, Resources], needs: Resources, running: Iterable[tuple[Any, str]], workers: int | None
) -> str | None:
    """The machine that has least to do for the room that it has; None if all have enough, or `workers` units run."""
    given = Counter(node for _, node in running)
    load = {node: given[node] / room for node, has in nodes.items() if (room := room_in(has, needs))}
    node = min(load, key=load.__getitem__, default=None)
    full = sum(given.values()) >= workers if workers else node and load[node] >= QUEUED
    return None if full else node


def chosen(pending: Sequence[Any], node: str, readers: Mapping[Any, set[str]]) -> int:
    """Which unit a machine gets: one of a block that it has read, else of one that nobody has, else the next."""
    order = [0 if node in (who := readers.get(block_of(unit), set())) else 1 + bool(who) for unit in pending]
    return order.index(min(order))
