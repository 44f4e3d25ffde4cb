"""Choosing the device, and making its arithmetic repeatable."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch

from common.core.errors import InputError

WORTH_THREADS = (
    2**27
)  # multiplications: the matrix products of a block that has no larger one gain nothing from threads
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def check_device(device: str) -> None:
    """InputError unless a device is auto or one that torch knows, whether or not it is here."""
    try:
        known = device == "auto" or str(torch.device(device)) == device
    except RuntimeError:
        known = False
    if not known or device.startswith("cpu:"):
        raise InputError(f"run.device is {device!r}; choose from auto, cpu, cuda or, of several, cuda:N")


def gpus_of(device: str) -> int:
    """How many GPUs of this machine run.device means."""
    return torch.cuda.device_count() if device in ("auto", "cuda") else int(device != "cpu")


def prepare(device: str) -> torch.device:
    """Choose the device and make arithmetic repeatable: full float32, deterministic kernels, no inference fast path."""
    check_device(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("run.device is cuda, but torch sees no CUDA device here; run.device cpu or auto would do")
    if device.startswith("cuda:") and int(device.partition(":")[2]) >= (there := torch.cuda.device_count()):
        raise InputError(f"run.device is {device}, but torch sees {there} CUDA devices here, numbered from 0")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Every kernel here writes what it allocates. The name is made when torch is imported, so checkers do not know it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_float32_matmul_precision("highest")
    torch.backends.mha.set_fastpath_enabled(False)  # picked in eval mode, has no derivative
    keep_freed_memory()
    return torch.device(device)


@contextmanager
def own_settings() -> Iterator[None]:
    """Torch as a process has it that does nothing else, whatever a program that calls us has set: float32, on the CPU
    unless said, with gradients, without autocast. What it has set is set again afterwards, what `prepare` sets as well.
    """
    repeatable = torch.are_deterministic_algorithms_enabled()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        warned = torch.is_deterministic_algorithms_warn_only_enabled()
        stack.callback(torch.use_deterministic_algorithms, repeatable, warn_only=warned)
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        filled = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
        stack.callback(setattr, torch.utils.deterministic, "fill_uninitialized_memory", filled)
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def keep_freed_memory() -> None:
    """Let glibc keep what tensors of up to 32 MiB leave behind: given back, every step gets it anew, page by page."""
    with suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest it takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def threads_for(multiplications: int) -> Iterator[None]:
    """Work on one thread meanwhile if the largest matrix product of the work has so few multiplications.

    Threads that share a small product wait for each other longer than they work, most of all beside another busy
    process. A product of enough multiplications has all threads that torch was given.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if multiplications >= WORTH_THREADS else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
