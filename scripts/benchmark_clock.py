"""What scripts/benchmark.py measures with: seconds, memory, and how fast a machine multiplies matrices."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from common.fda.precision import in_precision
from common.run.run_log import peak_gib, reset_peak


@dataclass
class Clock:
    """Adds up the seconds, of the clock and of the processor, that what it calls takes."""

    device: torch.device
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __call__(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        self.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(*arguments, **named)
        self.synchronize()
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        return result

    def __add__(self, other: "Clock") -> "Clock":
        return Clock(self.device, self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def ratios(reference: Clock, engine: Clock) -> dict[str, float]:
    """reference / engine, to three digits, of both kinds of seconds."""
    wall, cpu = reference.seconds / engine.seconds, reference.cpu_seconds / engine.cpu_seconds
    return {"clock": float(f"{wall:.3g}"), "cpu": float(f"{cpu:.3g}")}


def peak_memory(function: Callable[[], Any], device: torch.device) -> float:
    """GiB that a call needs at most: of the device, or on a CPU of the whole process while it runs."""
    reset_peak(device)
    function()
    return peak_gib(device)


def matmul_ceiling(precision: str, device: torch.device) -> float:
    """FLOP/s of a large product of matrices in this precision, the best of six."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)

    best = 0.0
    with in_precision(precision, device):
        for _ in range(6):
            clock = Clock(device)
            clock(torch.matmul, a, a)
            best = max(best, 2 * n**3 / clock.seconds)
    return best
