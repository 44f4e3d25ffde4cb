"""Where units of work are done: in this process, in several of this machine, or on the machines of a Ray cluster.

A unit goes in, its outcome comes out. No unit hangs on one before it, so places differ in time alone.
"""

import os
import pickle
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Any, NamedTuple, Protocol

import torch

from common.config import Run
from common.run.device import gpus_of
from common.run.run_log import hardware, machine_info, peak_gib, reset_peak

Work = Callable[[Any], Any]
"""work(unit) -> what came of it. Both are pickled: a function of a module, its arguments bound by functools.partial."""
WORTH_WORKERS = 20.0  # seconds of work on one core: a worker takes 7 of them to import the libraries
LIBRARIES = 2**30  # bytes that a process holds besides its tensors
MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Outcome:
    """What came of a unit, or the error that came instead with the text of its traceback; who did it, and what it took:
    {"seconds", "cpu_seconds", "peak_gib", "node", "hardware"}."""

    value: Any
    error: Exception | None
    trace: str
    who: str
    took: dict[str, Any]


class Memory(NamedTuple):
    """Bytes that a unit takes: on a GPU, of the host of one, or on a CPU alone."""

    gpu: float
    host: float
    alone: float


@dataclass(frozen=True)
class Files:
    """Which files below the root of all runs a unit reads and writes."""

    root: Path
    reads: Callable[[Any], Sequence[Path]]
    writes: Callable[[Any], Sequence[Path]]


class Place(Protocol):
    """Where several units are worked on side by side."""

    said: str
    """It, in a few words, for the user."""
    root: str
    """The run.root of those who work there; empty: the run's own."""

    def outcomes(self, work: Work, units: Sequence[Any], files: Files) -> Generator[tuple[Any, Outcome]]:
        """Units with their outcomes, as they come. When it is closed or fails, what is in work is given up.

        Raises: InputError at a unit whose worker was lost again and again.
        """
        ...


@dataclass(frozen=True)
class Demand:
    """What a stage asks for: units that are still to do, the seconds of one on one core, roughly, whether products are
    too small to gain from threads, and a forecast of memory."""

    units: int
    seconds: float
    small: bool
    memory: Callable[[], Memory]


def outcome_of(work: Work, unit: Any) -> Outcome:
    """Do a unit here, and tell what came of it; all but the end of the process is an outcome."""
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    reset_peak(device)
    began, value, failure, trace = (time.monotonic(), time.process_time()), None, None, ""
    try:
        value = work(unit)
    except Exception as error:
        failure, trace = picklable(error), traceback.format_exc()
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    took = {"seconds": time.monotonic() - began[0], "cpu_seconds": time.process_time() - began[1]}
    took |= {"peak_gib": peak_gib(device), "node": gethostname()}
    took |= {"hardware": hardware({"device": str(device)} | machine_info())}
    return Outcome(value, failure, trace, f"{gethostname()} {os.getpid()}", took)


def picklable(error: Exception) -> Exception:
    """The error, or one that says the same, if it does not come through a pickle."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        other = RuntimeError(f"{type(error).__name__}: {error}")
        other.__notes__ = list(getattr(error, "__notes__", []))
        return other


def value_of(outcome: Outcome) -> Any:
    """What came of a unit. Raises: the error that came instead, with the worker's traceback as its cause."""
    if outcome.error:
        raise outcome.error from RuntimeError(f"in {outcome.who}:\n{outcome.trace}")
    return outcome.value


def place_for(run: Run, demand: Demand, libraries: Sequence[str]) -> Place | None:
    """Where the units of a stage are to be done; None: in this process. Its workers begin with these libraries."""
    if run.engine == "ray" and demand.units:
        from common.run.cluster import Cluster

        return Cluster(run, demand)
    workers = workers_for(run, demand)
    if workers < 2:
        return None
    from common.run.processes import pool_of

    threads = 1 if demand.small else max(1, torch.get_num_threads() // workers)
    return pool_of(workers, threads, gpus_of(run.device) if run.device in ("auto", "cuda") else 0, libraries)


def asks_for_workers(run: Run) -> bool:
    """Whether the config names workers, so that work is shared whose size no forecast tells."""
    return run.engine == "ray" or (run.workers or 1) > 1


def workers_for(run: Run, demand: Demand) -> int:
    """How many processes of this machine shall work: run.workers, or one a GPU, or one a core where products are too
    small for threads, if there is enough to do and memory for all. A second for 20 of work is left to one process.
    """
    if run.workers is not None:
        return min(run.workers, demand.units)
    if gpus_of(run.device):
        return min(gpus_of(run.device), demand.units)
    workers = min(torch.get_num_threads(), demand.units) if demand.small else 1
    if workers < 2 or demand.units * demand.seconds < WORTH_WORKERS:
        return 1
    return min(workers, int(available_memory() // (LIBRARIES + demand.memory().alone)))


def available_memory() -> int:
    """Bytes that processes can still take on this machine; where the system does not tell, more than there can be."""
    if not MEMORY.is_file():
        return 2**60
    return int(MEMORY.read_text().split("MemAvailable:")[1].split()[0]) * 1024
