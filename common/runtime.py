"""The machine: device, precision, determinism, work in the background, and the birth certificate of a run."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from common.checkpoints import write_text
from common.config import Config, as_dict
from common.errors import InputError
from common.matching import Block
from common.task_vectors import Params

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
PARTS = ("torch", "open_clip_torch", "transformers", "datasets", "safetensors", "numpy")


def prepare(device: str) -> torch.device:
    """Choose the device and make arithmetic repeatable: full float32, deterministic kernels, no inference fast path."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("run.device is cuda, but torch sees no CUDA device here; run.device cpu or auto would do")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.mha.set_fastpath_enabled(False)  # picked in eval mode, has no derivative
    return torch.device(device)


@contextmanager
def in_precision(block: Block, precision: str, device: torch.device) -> Iterator[Block]:
    """The block with its matrix products in float32, tf32 (on CUDA; elsewhere float32) or bf16.

    Derivatives are to be taken inside the context as well. Parameters, their gradients and outputs stay float32.
    """

    def autocast(params: Params, x_ATD: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return block(params, x_ATD).to(x_ATD.dtype)

    if precision == "tf32" and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield autocast if precision == "bf16" else block
    finally:
        torch.set_float32_matmul_precision("highest")


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


@contextmanager
def recorded(config: Config, stage: str) -> Iterator[None]:
    """Note in the run's run.json when and where a stage was done, from which config and commit, and its seconds."""
    began = time.monotonic()
    yield
    file = config.run.dir / "run.json"
    stages = json.loads(file.read_text()) if file.is_file() else {}
    seconds = round(time.monotonic() - began, 1)
    stages[stage] = {"seconds": seconds, **certificate(), "config": as_dict(config)}
    write_text(file, json.dumps(stages, indent=2, sort_keys=True) + "\n")


class UnitBar:
    """A progress bar over units of work, each of which moves it on in fractions and shows its loss."""

    def __init__(self, stage: str, units: int):
        layout = "{desc} |{bar:20}| {n:.1f}/{total} units [{elapsed} gone, {remaining} left{postfix}]"
        self.bar = tqdm(total=units, desc=stage, bar_format=layout, mininterval=0.5, smoothing=0.05)
        self.stage, self.done, self.kept = stage, 0, 0

    @contextmanager
    def unit(self, name: str) -> Iterator[None]:
        """One unit of work; a loss that is not finite inside it becomes an InputError that names the unit."""
        self.bar.set_description_str(f"{self.stage}: {name}", refresh=False)
        kept = self.kept
        try:
            yield
        except FloatingPointError as error:
            raise InputError(f"{self.stage}: {name}: {error}") from error
        if self.kept == kept:
            self.done += 1
            self.bar.update(self.done - self.bar.n)

    def advance(self, fraction: float, loss: float) -> None:
        """Say how much of the unit is done and how large its loss is."""
        self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self.bar.update(self.done + fraction - self.bar.n)

    def keep(self) -> None:
        """The unit was done before: it takes no time and shall not count in the estimate of what is left."""
        self.kept += 1
        self.bar.total -= 1
        self.bar.refresh()

    def __enter__(self) -> "UnitBar":
        return self

    def __exit__(self, *failure: object) -> None:
        self.bar.set_description_str(self.stage + (f" ({self.kept} kept)" if self.kept else ""))
        self.bar.close()
