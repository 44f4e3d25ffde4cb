"""The machine: device, precision, determinism, work in the background, and what a run notes of itself."""

import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from common.checkpoints import write_text
from common.config import Config, as_dict
from common.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
PARTS = ("torch", "open_clip_torch", "transformers", "datasets", "safetensors", "numpy")
NOTES, FINISHED = "run.json", "finished"
PROCESS = Path("/proc/self/status")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def prepare(device: str) -> torch.device:
    """Choose the device and make arithmetic repeatable: full float32, deterministic kernels, no inference fast path."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("run.device is cuda, but torch sees no CUDA device here; run.device cpu or auto would do")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every kernel here writes what it allocates
    torch.set_float32_matmul_precision("highest")
    torch.backends.mha.set_fastpath_enabled(False)  # picked in eval mode, has no derivative
    keep_freed_memory()
    return torch.device(device)


def keep_freed_memory() -> None:
    """Let glibc keep what tensors of up to 32 MiB leave behind: given back, every step gets it anew, page by page."""
    with suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest it takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def read_ahead(items: Iterable[T]) -> Iterator[T]:
    """The items in order, each made in a background thread while the caller works on the one before it.

    What goes wrong in making one is raised when its turn comes.
    """
    source = iter(items)
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, source, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, source, end)
            yield item


@contextmanager
def written_behind() -> Iterator[Callable[..., None]]:
    """write(function, *arguments) calls the function in a background thread while the caller works on.

    What goes wrong is raised by the next write, which waits for the one before, or at the end.
    """
    last: Future | None = None

    def write(function: Callable[..., None], *arguments: Any) -> None:
        nonlocal last
        if last:
            last.result()
        last = thread.submit(function, *arguments)

    with ThreadPoolExecutor(1) as thread:
        yield write
        if last:
            last.result()


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


def certificate() -> dict[str, Any]:
    """Commit, versions, machine and time: what a number needs to be believed."""

    def version_of(part: str) -> str:
        try:
            return version(part)
        except PackageNotFoundError:
            return "absent"

    return {
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {part: version_of(part) for part in PARTS},
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


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
def recorded(config: Config, stage: str, units: "Units | None" = None) -> Iterator[None]:
    """Note in the run's run.json when and where a stage was done, from which config and commit, how it ended, and its
    seconds and peak memory in GiB.

    A stage that keeps units adds to what was noted of the session that did them: that they are of the same settings is
    known from their provenance. Where all is kept the note stays as it is.
    """
    device = prepare(config.run.device)
    reset_peak(device)
    began, ended = time.monotonic(), FINISHED
    try:
        yield
    except BaseException as error:
        ended = type(error).__name__
        raise
    finally:
        session = {"seconds": time.monotonic() - began, "peak_gib": peak_gib(device), "ended": ended}
        done, kept = (units.done, units.kept) if units else (1, 0)
        note(config, stage, session | {"device": str(device)}, done, kept)


def note(config: Config, stage: str, session: dict[str, Any], done: int, kept: int) -> None:
    """Put one session of a stage, which did some units and kept others, into run.json."""
    notes = read_notes(config.run.dir)
    before = notes.get(stage, {})
    last = before.get("ended", FINISHED) if before else session["ended"]
    if not done and last == FINISHED:
        return  # there was nothing left to do
    counted = before if kept else {}
    session["seconds"] = round(session["seconds"] + counted.get("seconds", 0), 3)
    session["peak_gib"] = round(max(session["peak_gib"], counted.get("peak_gib", 0)), 3)
    session |= {"units": done + counted.get("units", 0), "units_of": done + kept}
    notes[stage] = session | certificate() | {"config": as_dict(config)}
    write_text(config.run.dir / NOTES, json.dumps(notes, indent=2, sort_keys=True) + "\n")


def read_notes(run_dir: Path) -> dict[str, Any]:
    """What run.json says of each stage; empty if there is none."""
    file = run_dir / NOTES
    return json.loads(file.read_text()) if file.is_file() else {}


def spent(run_dir: Path, stages: Sequence[str]) -> dict[str, Any]:
    """What stages of a run took together: {"seconds", "peak_gib", "hardware"}.

    Empty if there are none, or if run.json does not know all of one: it was cut off, or done in part elsewhere.
    """
    notes = [read_notes(run_dir).get(stage, {}) for stage in stages]
    whole = (n.get("ended") == FINISHED and n["units"] >= n["units_of"] for n in notes)
    if not notes or not all(whole) or any(n["config"]["run"]["blocks"] for n in notes):
        return {}
    machines = (f"{n['gpu'] if n['device'] != 'cpu' else 'CPU'}, {n['threads']} threads, {n['machine']}" for n in notes)
    return {
        "seconds": round(sum(n["seconds"] for n in notes), 3),
        "peak_gib": max(n["peak_gib"] for n in notes),
        "hardware": "; ".join(dict.fromkeys(machines)),
    }


@dataclass
class Units:
    """How much of a stage this session did, and how much it found done."""

    done: int = 0
    kept: int = 0


class UnitBar(Units):
    """A progress bar over units of work, each of which moves it on in fractions and shows its loss."""

    def __init__(self, stage: str, units: int):
        layout = "{desc} |{bar:20}| {n:.1f}/{total} units [{elapsed} gone, {remaining} left{postfix}]"
        self.bar = tqdm(total=units, desc=stage, bar_format=layout, mininterval=0.5, smoothing=0.05)
        super().__init__()
        self.stage = stage

    @contextmanager
    def unit(self, name: str, count: int = 1) -> Iterator[None]:
        """One unit of work, or `count`; a loss that is not finite inside becomes an InputError that names it."""
        self.bar.set_description_str(f"{self.stage}: {name}", refresh=False)
        kept = self.kept
        try:
            yield
        except FloatingPointError as error:
            raise InputError(f"{self.stage}: {name}: {error}") from error
        if self.kept == kept:
            self.done += count
            self.bar.update(self.done - self.bar.n)

    def advance(self, fraction: float, loss: float) -> None:
        """Say how many units are done of what is being worked on, and how large its loss is."""
        self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self.bar.update(self.done + fraction - self.bar.n)

    def keep(self, count: int = 1) -> None:
        """The work was done before: it takes no time and shall not count in the estimate of what is left."""
        self.kept += count
        self.bar.total -= count
        self.bar.refresh()

    def __enter__(self) -> "UnitBar":
        return self

    def __exit__(self, *failure: object) -> None:
        self.bar.set_description_str(self.stage + (f" ({self.kept} kept)" if self.kept else ""))
        self.bar.close()
