"""One unit of construction by the engine and by plain code; the rest is in benchmark.py."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmark_blocks import TOY_BLOCK, Case
from benchmark_clock import Clock, matmul_ceiling, peak_memory, ratios
from benchmark_reference import PAPER_STEPS, Reference, preset
from common.core.blocks import nonzero_tensors
from common.core.seeding import seeded
from common.core.task_vectors import Params, subtract
from common.fda.anchors import initial_anchors
from common.fda.batching import batched_matching_gradient
from common.fda.construction import OptimisedAnchors, SearchSettings, optimise_anchors
from common.fda.matching import MatchingProblem, matching_gradient, matching_value
from common.fda.precision import effective_precision, forward_in, in_precision
from common.io.checkpoints import Checkpoint
from common.planning.cost import Ledger

SIDES = ("reference", "engine")
Clocks = dict[str, dict[str, Clock]]
"""{side: {what: clock}}; what is load, step or run."""


def construct(of: Case, base: Path, expert: Path, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Compare one unit of construction; `base` and `expert` are whole checkpoints."""
    clocks = {side: {what: Clock(device) for what in ("load", "step", "run")} for side in SIDES}
    theta_0, theta_t = load_both(of, (base, expert), clocks, device)
    # rounding has no direction to match
    tau = nonzero_tensors(of.family.without_null_gradients(subtract(theta_t, theta_0)))
    x_init = initial_anchors("weight", of.shape, theta_t=theta_t, scale=1.0, generator=seeded(0)).to(device)
    precision = effective_precision(preset("run")["precision"], device, theta_0, x_init)
    problem = MatchingProblem(of.block, theta_0, theta_t, tau)
    reference = partial(Reference, of.block, theta_0, theta_t, x_init)
    settings = search_settings(args)
    with sdpa_kernel(SDPBackend.MATH):
        steps = compare_steps(reference, problem, x_init, precision, args.repeats, clocks)
        plain = reference()
        for _ in range(args.reference_steps):
            clocks["reference"]["run"](plain.step)
        target = matching_value(problem, plain.x).mean().item()
    search = SearchSettings(**settings | {"stop_loss": target}, precision=precision)
    found = clocks["engine"]["run"](optimise_anchors, problem, x_init, search)
    share = tasks_together(problem, x_init, precision, args) if args.together else None
    return (
        told(clocks, found, target, args.reference_steps, settings["steps"])
        | steps
        | {
            "tasks_together": share,
            "matmul_tflops": matmul_ceiling(precision, device) / 1e12,
            "engine_settings": settings | {"precision": precision},
        }
    )


def search_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fast preset's settings of the engine, with fewer steps where the reference has fewer."""
    given = preset("anchors")
    settings = {field.name: given[field.name] for field in fields(SearchSettings) if field.name in given}
    planned = max(20, round(settings["steps"] * args.reference_steps / PAPER_STEPS))
    return settings | {"steps": args.steps or planned}


def load_both(of: Case, models: tuple[Path, Path], clocks: Clocks, device: torch.device) -> list[Params]:
    """θ₀ and θᵢ of the block: plain code loads whole models for it, the engine the block alone."""
    prefix = of.prefixes[min(TOY_BLOCK, len(of.prefixes) - 1)]

    def load_whole() -> list[Params]:
        files = [model if model.is_file() else next(model.glob("*.safetensors")) for model in models]
        return [{n: p.to(device) for n, p in load_file(file).items()} for file in files]

    def load_block() -> list[Params]:
        blocks = (Checkpoint(model, of.family.names).read_under(prefix) for model in models)
        return [{n: p.to(device) for n, p in block.items()} for block in blocks]

    clocks["reference"]["load"](load_whole)
    return clocks["engine"]["load"](load_block)


def compare_steps(
    reference: Callable[[], Reference],
    problem: MatchingProblem,
    x_init: Tensor,
    precision: str,
    repeats: int,
    clocks: Clocks,
) -> dict[str, Any]:
    """Take steps of both in turns, after one of each that shows its memory; and how fast the engine computes."""
    device, forward, plain = x_init.device, forward_in(precision), reference()

    def engine_step() -> None:
        with in_precision(precision, device):
            matching_gradient(problem, x_init, forward=forward)

    memory = {"reference": peak_memory(reference().step, device)}  # which is gone before the engine's step
    memory["engine"] = peak_memory(engine_step, device)
    with Ledger() as ledger:
        engine_step()
    for _ in range(repeats):
        clocks["reference"]["step"](plain.step)
        clocks["engine"]["step"](engine_step)
    speed = ledger.operations * repeats / clocks["engine"]["step"].seconds
    return {"peak_memory_gib": memory, "engine_tflops": speed / 1e12}


def told(clocks: Clocks, found: OptimisedAnchors, target: float, reference_steps: int, planned: int) -> dict[str, Any]:
    """What the clocks and losses of both come to; the ratios to an equal loss are null where the engine did not get
    there in its steps."""
    reached = sum(found.losses.values()) / len(found.losses)
    totals = [of_side["load"] + of_side["run"] for of_side in clocks.values()]
    equal = reached <= target
    return {
        "step_time_ratio": ratios(*(of_side["step"] for of_side in clocks.values())),
        "time_to_equal_loss_ratio": ratios(*(of_side["run"] for of_side in clocks.values())) if equal else None,
        "end_to_end_ratio": ratios(*totals) if equal else None,
        "loss": {"reference": target, "engine": reached},
        "steps": {"reference": reference_steps, "engine": len(found.trace) - 1, "engine_planned": planned},
        "target_is_the_papers": reference_steps == PAPER_STEPS,
        "seconds": {
            side: {what: clock.seconds for what, clock in of_side.items()} | {"total": total.seconds}
            for (side, of_side), total in zip(clocks.items(), totals, strict=True)
        },
    }


def tasks_together(
    problem: MatchingProblem, x_init: Tensor, precision: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Compare steps of several tasks in one go, as anchors.together takes them, with steps of one after the other."""
    how = {"distance": "cos", "precision": precision}
    alone, joint = Clock(x_init.device), Clock(x_init.device)
    one, all_of_them = (
        batched_matching_gradient([problem] * number, **how, compiler=compiler)
        for number, compiler in ((1, "eager"), (args.together, args.compiler))
    )
    first = Clock(x_init.device)
    one([x_init])
    first(all_of_them, [x_init] * args.together)  # written down, and compiled
    for _ in range(args.repeats):
        for _ in range(args.together):
            alone(one, [x_init])
        joint(all_of_them, [x_init] * args.together)
    named = {"tasks": args.together, "compiler": args.compiler, "seconds_to_the_first_step": first.seconds}
    return named | {"step_time_ratio": ratios(alone, joint)}
