"""What a run notes of itself in run.json: config, commit, versions, machine, seconds and memory of every stage."""

import json
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from common.config import ROOT, Config, as_dict
from common.core.errors import InputError
from common.io.checkpoints import write_text
from common.io.json_files import interpreted, read_object
from common.io.locks import locked
from common.run.device import prepare
from common.run.stages import current
from common.run.units import Units

PARTS = ("torch", "open_clip_torch", "transformers", "datasets", "safetensors", "numpy")


NOTES, FINISHED = "run.json", "finished"
WHAT = "record of a run; remove it to begin a new one"
CLOCKS = ("seconds", "cpu_seconds")
NUMBERS = (*CLOCKS, "peak_gib", "units", "units_of")
PROCESS = Path("/proc/self/status")


def commit() -> str:
    """The project's git commit, with "+" behind it if the tree differs from it; "unknown" outside a checkout."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version_of(part: str) -> str:
    """The version of an installed library."""
    try:
        return version(part)
    except PackageNotFoundError:
        return "absent"


def environment_info() -> dict[str, Any]:
    """Commit, versions, machine and time: what a number needs to be believed."""
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {part: version_of(part) for part in PARTS},
        **machine_info(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def machine_info() -> dict[str, Any]:
    """What this process computes on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"machine": platform.platform(), "processor": processor(), "threads": torch.get_num_threads(), "gpu": gpu}


@cache
def processor() -> str:
    """The processor, and the widest instructions that torch finds on it: sums are rounded otherwise by others."""
    said = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in said if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def computed_on(device: torch.device) -> str:
    """The GPU of a device, or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def hardware(noted: Mapping[str, Any]) -> str:
    """What a stage was computed on, as noted: in a line."""
    if noted.get("workers"):
        kinds = Counter(worker["hardware"] for worker in noted["workers"].values())
        return "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    name = noted["gpu"] if noted["device"] != "cpu" else noted.get("processor", "CPU")  # which older notes lack
    return f"{name}, {noted['threads']} threads, {noted['machine']}"


def reset_peak(device: torch.device) -> None:
    """Begin anew to watch the peak of memory; where the system cannot, it goes on counting from the process's start."""
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> float:
    """The most memory taken since `reset_peak`, in GiB: by tensors on a CUDA device, or on a CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if PROCESS.is_file():
        return int(PROCESS.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


@contextmanager
def record_stage(config: Config, stage: str, units: "Units | None" = None) -> Iterator[None]:
    """Note in the run's run.json when and where a stage was done, from which config and commit, how it ended, its
    seconds by the clock and of the processors, and its peak memory in GiB.

    A stage that keeps units adds to what was noted of the session that did them: that they are of the same settings is
    known from their provenance. Where all is kept the note stays as it is. The processor seconds of workers in other
    processes are counted too, the peak is the largest of one process, and "workers" says what each did.
    """
    device = prepare(config.run.device)
    read_notes(config.run.dir)  # damaged notes are refused before the work, not when it is done
    reset_peak(device)
    began, ended = (time.monotonic(), time.process_time()), FINISHED
    try:
        with current().stage(config.run.name, stage, units):
            yield
    except BaseException as error:
        ended = type(error).__name__
        raise
    finally:
        session: dict[str, Any] = {
            "seconds": time.monotonic() - began[0],
            "cpu_seconds": time.process_time() - began[1],
        }
        session |= {"peak_gib": peak_gib(device), "ended": ended}
        if units and units.workers:
            workers = units.workers.values()
            session["cpu_seconds"] += sum(worker["cpu_seconds"] for worker in workers)
            session["peak_gib"] = max(session["peak_gib"], *(worker["peak_gib"] for worker in workers))
            session["workers"] = units.workers
        done, kept = (units.done, units.kept) if units else (1, 0)
        left = units.wanted - units.done if units and ended != FINISHED else 0
        if ended != InputError.__name__ or (units and done):  # what is refused at the door leaves nothing on disk
            with locked(config.run.dir / NOTES):  # other processes of the run note their stages there
                note(config, stage, session | {"device": str(device)}, done, kept, left)


def note(config: Config, stage: str, session: dict[str, Any], done: int, kept: int, left: int = 0) -> None:
    """Put one session of a stage, which did some units, kept others and left others to do, into run.json."""
    notes = read_notes(config.run.dir)
    before = notes.get(stage, {})
    last = before.get("ended", FINISHED) if before else session["ended"]
    if not done and last == FINISHED:
        return  # there was nothing left to do
    counted = before if kept else {}
    if counted and "cpu_seconds" not in counted:  # notes of an older version: the sum would leave theirs out
        del session["cpu_seconds"]
    for clock in filter(session.__contains__, CLOCKS):
        session[clock] = round(session[clock] + counted.get(clock, 0), 3)
    session["peak_gib"] = round(max(session["peak_gib"], counted.get("peak_gib", 0)), 3)
    if workers := counted.get("workers", {}) | session.get("workers", {}):
        session["workers"] = workers
    session |= {"units": done + counted.get("units", 0), "units_of": done + kept + left}
    notes[stage] = session | environment_info() | {"config": as_dict(config)}
    write_text(config.run.dir / NOTES, json.dumps(notes, indent=2, sort_keys=True) + "\n")


def read_notes(run_dir: Path) -> dict[str, Any]:
    """What run.json says of each stage; empty if there is none. InputError if it is damaged."""
    file = run_dir / NOTES
    notes = read_object(file, WHAT) if file.is_file() else {}
    with interpreted(file, WHAT):
        for noted in notes.values():
            if not isinstance(noted.get("ended", ""), str) or sum(noted.get(n, 0) for n in NUMBERS) < 0:
                raise ValueError("a stage that took less than nothing")
    return notes


def total_cost(run_dir: Path, stages: Sequence[str]) -> dict[str, Any]:
    """What stages of a run took together: {"seconds", "cpu_seconds" if all counted them, "peak_gib", "hardware"}.

    Empty if there are none, or if run.json does not know all of one: it was cut off, or done in part elsewhere.
    """
    notes = [read_notes(run_dir).get(stage, {}) for stage in stages]
    whole = (n.get("ended") == FINISHED and n["units"] >= n["units_of"] for n in notes)
    with interpreted(run_dir / NOTES, WHAT):
        if not notes or not all(whole) or any(n["config"]["run"]["blocks"] for n in notes):
            return {}
        machines = [hardware(n) for n in notes]
    clocks = [clock for clock in CLOCKS if all(clock in n for n in notes)]
    return {clock: round(sum(n[clock] for n in notes), 3) for clock in clocks} | {
        "peak_gib": max(n["peak_gib"] for n in notes),
        "hardware": "; ".join(dict.fromkeys(machines)),
    }
