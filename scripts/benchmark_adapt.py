"""The fit of one block by the engine and by a plain loop; the rest is in benchmark.py."""

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmark_blocks import Case
from benchmark_clock import Clock, ratios
from benchmark_reference import plain_fit, preset
from common.core.blocks import Block
from common.core.seeding import seeded
from common.core.task_vectors import Params, subtract
from common.fda.adaptation import FitSettings, coefficients, fit_block, own_weights
from common.fda.anchors import initial_anchors
from common.fda.matching import DISTANCES

RATES = {"pretrained": 1e-5, "ta": 1e-2}  # the paper's
TA_SCALE = 0.3


def adapt(
    of: Case, thetas: list[Params], rates: dict[str, float], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Compare the fit of one block to experts thetas[1:] with a plain loop, from the pretrained weights and from TA.

    rates: learning rate of each start. Twice: with the same epochs, where both do the same sums; and with the speedup
    of the fast preset, where the loss at the end says what that costs.
    """
    theta_0, experts = thetas[0], thetas[1:]
    deltas, (x, y) = [subtract(theta_t, theta_0) for theta_t in experts], examples_of(of, experts, device)
    batch = min(128, len(x))

    def fit(start: str, speedup: float = 1) -> Params:
        ta = coefficients(theta_0, deltas, [TA_SCALE] * len(deltas)) if start == "ta" else None
        settings = FitSettings("cos", lr=rates[start], epochs=args.epochs, batch_size=batch, speedup=speedup)
        return fit_block(of.block, ta or own_weights(theta_0), x, y, settings, generator=seeded(0))[0]

    report: dict[str, Any] = {}
    for start in rates:
        plain, engine, fast = Clock(device), Clock(device), Clock(device)
        given = deltas if start == "ta" else []
        for _ in range(args.repeats):  # in turns: what else the machine does meanwhile slows all alike
            expected = plain(plain_fit, of.block, theta_0, given, x, y, rates[start], args.epochs, batch, TA_SCALE)
            found, sooner = engine(fit, start), fast(fit, start, preset("adapt")["speedup"])
        fitted = {"base": theta_0, "reference": expected, "engine": found, "fast": sooner}
        report[start] = {
            "ratio": ratios(plain, engine),
            "difference_of_result": apart(found, expected, theta_0),
            "fast_difference_of_result": apart(sooner, expected, theta_0),
            "fast_ratio": ratios(plain, fast),
            "loss": {whose: mean_distance(of.block, theta, x, y) for whose, theta in fitted.items()},
            "seconds": {"reference": plain.seconds, "engine": engine.seconds, "fast": fast.seconds},
        }
    sizes = {"steps": args.epochs * -(-len(x) // batch), "tasks": len(experts), "batch": batch}
    return report | sizes


@torch.no_grad()
def examples_of(of: Case, experts: list[Params], device: torch.device) -> tuple[Tensor, Tensor]:
    """Anchors of all experts, and what each expert makes of its own."""
    inputs = [
        initial_anchors("weight", of.shape, theta_t=theta_t, scale=1.0, generator=seeded(0, i)).to(device)
        for i, theta_t in enumerate(experts)
    ]
    targets = [of.block(theta_t, x) for theta_t, x in zip(experts, inputs, strict=True)]
    return torch.cat(inputs), torch.cat(targets)


@torch.no_grad()
def mean_distance(block: Block, theta: Params, x: Tensor, y: Tensor) -> float:
    """The loss of adaptation per anchor."""
    return DISTANCES["cos"](block(theta, x), y).item() / len(x)


def apart(theta: Params, expected: Params, theta_0: Params) -> float:
    """How far two results lie apart, in parts of how far the expected one moved from θ₀."""
    far, moved_by = (sum((p - other[n]).square().sum() for n, p in expected.items()) for other in (theta, theta_0))
    return (far / moved_by).sqrt().item()
