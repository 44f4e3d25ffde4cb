"""Processes of this machine that do units of work, each one at a time."""

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from tqdm import tqdm

from common.core.errors import InputError
from common.core.notices import warn
from common.run.engine import Files, Outcome, Work, outcome_of

LOSSES = 3  # of its worker that a unit may cost before it is given up
_POOLS: list["Pool"] = []


def pool_of(size: int, threads: int, gpus: int, libraries: Sequence[str]) -> "Pool":
    """So many processes of so many threads each, kept from stage to stage: their beginning takes seconds.

    Args:
        gpus: They take turns in getting one of so many; 0: they get none.
        libraries: Modules that are imported once for all.
    """
    wanted = (size, threads, gpus, os.getcwd())
    for pool in [pool for pool in _POOLS if pool.settings != wanted]:
        pool.stop()
        _POOLS.remove(pool)
    if not _POOLS:
        _POOLS.append(Pool(wanted, libraries))
    return _POOLS[0]


class Pool:
    """Workers that begin when they are needed, and end with this process, however it ends."""

    def __init__(self, settings: tuple[int, int, int, str], libraries: Sequence[str]):
        self.settings, (self.size, threads, _, _) = settings, settings
        self.said = f"{self.size} processes of {threads} thread{'s' if threads > 1 else ''} each"
        # A forked child begins with what its server has imported; a server whose imports look for GPUs spoils them.
        forked = "forkserver" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
        self.context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
        if forked:
            self.context.set_forkserver_preload(list(libraries))
            with uninterrupted():
                forkserver.ensure_running()
        self.workers: dict[Connection, Any] = {}
        atexit.register(self.stop)

    def hire(self, number: int) -> None:
        """Have so many workers."""
        while len(self.workers) < number:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=serve, args=(theirs, len(self.workers), self.settings))
            process.start()
            theirs.close()
            self.workers[ours] = process

    root = ""

    def outcomes(self, work: Work, units: Sequence[Any], files: Files) -> Generator[tuple[Any, Outcome]]:
        """Units with their outcomes, as they come; a unit whose worker is lost is begun again by another."""
        pending, busy, lost = list(units), dict[Connection, Any](), Counter[Any]()
        try:
            while pending or busy:
                self.hire(min(self.size, len(pending) + len(busy)))
                for pipe in [pipe for pipe in self.workers if pipe not in busy][: len(pending)]:
                    busy[pipe] = pending.pop(0)
                    with contextlib.suppress(OSError):  # it is gone: read below
                        pipe.send((work, busy[pipe]))
                for pipe in wait(list(busy)):
                    assert isinstance(pipe, Connection)
                    unit = busy.pop(pipe)
                    try:
                        outcome = pipe.recv()
                    except (EOFError, OSError):
                        lost[unit] += 1
                        self.replace(pipe, unit, lost[unit])
                        pending.insert(0, unit)
                    else:
                        yield unit, outcome
        finally:
            if busy:
                self.stop()

    def replace(self, pipe: Connection, unit: Any, losses: int) -> None:
        """Forget a worker that is gone. Raises: InputError at the last loss that a unit may cost."""
        process = self.workers.pop(pipe)
        pipe.close()
        process.join()
        if losses == LOSSES:
            raise InputError(
                f"{losses} processes were lost at the unit {unit}, the last with status {process.exitcode} (-9 where "
                "memory ran out); a smaller run.workers takes less"
            )
        warn(
            f"a process was lost at the unit {unit}, with status {process.exitcode} (-9 where memory ran out); "
            "another begins that unit again"
        )

    def stop(self) -> None:
        """End all workers, whatever they do: what they finished is on disk."""
        for pipe, process in self.workers.items():
            process.kill()
            pipe.close()
        for process in self.workers.values():
            process.join()
        self.workers.clear()


def serve(pipe: Connection, number: int, settings: tuple[int, int, int, str]) -> None:
    """What a worker does: a unit at a time, until the one who sends them is gone."""
    _, threads, gpus, folder = settings
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all; who sends the units ends this process
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    os.chdir(folder)
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which stop() would leave behind
    if gpus:
        torch.cuda.set_device(number % gpus)
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(outcome_of(*pipe.recv()))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """What is started in this block is not interrupted from the terminal: the one who started it ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(parent: Any) -> None:
    """End this process, in the middle of its work, when another is gone."""
    wait([parent.sentinel])
    os._exit(1)
