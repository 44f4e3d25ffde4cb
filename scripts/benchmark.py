"""Time the engine against plain reference code, side by side in one process, on a block of a real size.

python scripts/benchmark.py construct --arch ViT-B-32 --reference-steps 1200
python scripts/benchmark.py construct --toy vision   (trained weights; scripts/make_toy.py vision --out toy/vision)
python scripts/benchmark.py adapt --arch roberta-base --device cuda --out adapt.json
python scripts/benchmark.py scaling --toy vision
python scripts/benchmark.py merge --mergekit PYTHON   (of an environment that has mergekit)

Weights are random otherwise: an expert is the base and low-rank and Gaussian noise of 1 % of its norm. Ratios are
reference / engine, of seconds of the clock and of the processor: the latter say more where programs share a CPU.
"""

import argparse
import json
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmark_blocks import ARCHS, TOY_BLOCK, TOYS, Case, random_block, random_expert, toy, write_whole
from benchmark_clock import Clock, matmul_ceiling, peak_memory, ratios
from benchmark_merge import RECIPES, merges
from benchmark_reference import Reference, plain_fit
from benchmark_scaling import scaling
from common.config import PRESETS
from common.core.blocks import nonzero_tensors
from common.core.seeding import seeded
from common.core.task_vectors import Params, subtract
from common.fda.adaptation import FitSettings, coefficients, fit_block, own_weights
from common.fda.anchors import initial_anchors
from common.fda.batching import batched_matching_gradient
from common.fda.construction import OptimisedAnchors, SearchSettings, optimise_anchors
from common.fda.matching import DISTANCES, MatchingProblem, matching_gradient, matching_value
from common.fda.precision import effective_precision, forward_in, in_precision
from common.io.checkpoints import Checkpoint
from common.io.yaml_files import read_yaml_file
from common.planning.cost import Ledger
from common.run.device import prepare
from common.run.run_log import environment_info

PAPER_STEPS = 1200
RATES = {"pretrained": 1e-5, "ta": 1e-2}  # the paper's, in adaptation
TA_SCALE = 0.3


def preset(section: str) -> dict[str, Any]:
    """A section of the fast preset."""
    return read_yaml_file(PRESETS / "fast.yaml")[section]


def construct(of: Case, base: Path, expert: Path, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Compare one unit of construction; `base` and `expert` are whole checkpoints."""
    given = preset("anchors")
    settings = {field.name: given[field.name] for field in fields(SearchSettings) if field.name in given}
    settings["steps"] = args.steps or max(20, round(settings["steps"] * args.reference_steps / PAPER_STEPS))
    prefix = of.prefixes[min(TOY_BLOCK, len(of.prefixes) - 1)]
    clocks = {who: {what: Clock(device) for what in ("load", "step", "run")} for who in ("reference", "engine")}

    def load_whole() -> list[Params]:
        files = [file if file.is_file() else next(file.glob("*.safetensors")) for file in (base, expert)]
        return [{n: p.to(device) for n, p in load_file(file).items()} for file in files]

    def load_block() -> list[Params]:
        blocks = (Checkpoint(file, of.family.names).read_under(prefix) for file in (base, expert))
        return [{n: p.to(device) for n, p in block.items()} for block in blocks]

    clocks["reference"]["load"](load_whole)
    theta_0, theta_t = clocks["engine"]["load"](load_block)
    tau = nonzero_tensors(
        of.family.without_null_gradients(subtract(theta_t, theta_0))
    )  # rounding has no direction to match
    x_init = initial_anchors("weight", of.shape, theta_t=theta_t, scale=1.0, generator=seeded(0)).to(device)
    precision = effective_precision(preset("run")["precision"], device, theta_0, x_init)
    problem, forward = MatchingProblem(of.block, theta_0, theta_t, tau), forward_in(precision)
    plain, warm_up = (Reference(of.block, theta_0, theta_t, x_init) for _ in range(2))

    def engine_step() -> None:
        with in_precision(precision, device):
            matching_gradient(problem, x_init, forward=forward)

    def run_engine(stop_loss: float) -> OptimisedAnchors:
        search = SearchSettings(**settings | {"stop_loss": stop_loss}, precision=precision)
        return optimise_anchors(problem, x_init, search)

    with sdpa_kernel(SDPBackend.MATH):
        memory = {"reference": peak_memory(warm_up.step, device)}
        del warm_up
        memory["engine"] = peak_memory(engine_step, device)
        with Ledger() as ledger:
            engine_step()
        for _ in range(args.repeats):
            clocks["reference"]["step"](plain.step)
            clocks["engine"]["step"](engine_step)
        plain = Reference(of.block, theta_0, theta_t, x_init)
        for _ in range(args.reference_steps):
            clocks["reference"]["run"](plain.step)
        target = matching_value(problem, plain.x).mean().item()
    found = clocks["engine"]["run"](run_engine, stop_loss=target)
    reached = sum(found.losses.values()) / len(found.losses)
    for who in clocks:
        total = clocks[who]["total"] = Clock(device)
        for what in ("load", "run"):
            total.seconds += clocks[who][what].seconds
            total.cpu_seconds += clocks[who][what].cpu_seconds
    share = tasks_together(problem, x_init, precision, args) if args.together else None
    speed = ledger.operations * args.repeats / clocks["engine"]["step"].seconds
    return {
        "step_time_ratio": ratios(*(by["step"] for by in clocks.values())),
        # null: the engine did not get there in its steps
        "time_to_equal_loss_ratio": ratios(*(by["run"] for by in clocks.values())) if reached <= target else None,
        "end_to_end_ratio": ratios(*(by["total"] for by in clocks.values())) if reached <= target else None,
        "loss": {"reference": target, "engine": reached},
        "steps": {
            "reference": args.reference_steps,
            "engine": len(found.trace) - 1,
            "engine_planned": settings["steps"],
        },
        "target_is_the_papers": args.reference_steps == PAPER_STEPS,
        "tasks_together": share,
        "peak_memory_gib": memory,
        "engine_tflops": speed / 1e12,
        "matmul_tflops": matmul_ceiling(precision, device) / 1e12,
        "seconds": {w: {k: c.seconds for k, c in by.items()} for w, by in clocks.items()},
        "engine_settings": settings | {"precision": precision},
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


def adapt(
    of: Case, thetas: list[Params], rates: dict[str, float], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Compare the fit of one block to experts thetas[1:] with a plain loop, from the pretrained weights and from TA.

    rates: learning rate of each start. Twice: with the same epochs, where both do the same sums; and with the speedup
    of the fast preset, where the loss at the end says what that costs.
    """
    theta_0, experts = thetas[0], thetas[1:]
    deltas = [subtract(theta_t, theta_0) for theta_t in experts]
    inputs, targets = [], []
    with torch.no_grad():
        for i, theta_t in enumerate(experts):
            x = initial_anchors("weight", of.shape, theta_t=theta_t, scale=1.0, generator=seeded(0, i)).to(device)
            inputs.append(x)
            targets.append(of.block(theta_t, x))
    x, y = torch.cat(inputs), torch.cat(targets)
    epochs, batch = args.epochs, min(128, len(x))

    def fit(start: str, speedup: float = 1) -> Params:
        trained = (
            own_weights(theta_0) if start == "pretrained" else coefficients(theta_0, deltas, [TA_SCALE] * len(deltas))
        )
        settings = FitSettings("cos", lr=rates[start], epochs=epochs, batch_size=batch, speedup=speedup)
        return fit_block(of.block, trained, x, y, settings, generator=seeded(0))[0]

    @torch.no_grad()
    def loss(theta: Params) -> float:
        return DISTANCES["cos"](of.block(theta, x), y).item() / len(x)

    def apart(theta: Params, expected: Params) -> float:
        """How far two results lie apart, in parts of how far the expected one moved."""
        far, moved_by = (sum((p - other[n]).square().sum() for n, p in expected.items()) for other in (theta, theta_0))
        return (far / moved_by).sqrt().item()

    report: dict[str, Any] = {}
    for start in rates:
        plain, engine, fast = Clock(device), Clock(device), Clock(device)
        given = deltas if start == "ta" else []
        for _ in range(args.repeats):  # in turns: what else the machine does meanwhile slows all alike
            expected = plain(plain_fit, of.block, theta_0, given, x, y, rates[start], epochs, batch, TA_SCALE)
            found, sooner = engine(fit, start), fast(fit, start, preset("adapt")["speedup"])
        report[start] = {
            "ratio": ratios(plain, engine),
            "difference_of_result": apart(found, expected),
            "fast_difference_of_result": apart(sooner, expected),
            "fast_ratio": ratios(plain, fast),
            "loss": {"base": loss(theta_0), "reference": loss(expected), "engine": loss(found), "fast": loss(sooner)},
            "seconds": {"reference": plain.seconds, "engine": engine.seconds, "fast": fast.seconds},
        }
    sizes = {"steps": epochs * -(-len(x) // batch), "tasks": len(experts), "batch": batch}
    return report | sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["construct", "adapt", "scaling", "merge"])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--arch", choices=list(ARCHS))
    size.add_argument("--toy", choices=list(TOYS), help="trained weights in toy/")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--anchors", type=int, help="unset: the paper's")
    parser.add_argument("--steps", type=int, help="of the engine; unset: the preset's, in proportion")
    parser.add_argument("--reference-steps", type=int, default=PAPER_STEPS, help="fewer set an easier loss to reach")
    parser.add_argument(
        "--repeats", type=int, default=3, help="steps of each side by side, for the ratio of step times; adapt: fits"
    )
    parser.add_argument("--together", type=int, default=0, help="construct: measure so many tasks in one go, too")
    parser.add_argument("--compiler", default="eager", help="of those: eager, inductor or cudagraphs")
    parser.add_argument("--tasks", type=int, default=8, help="adapt: experts")
    parser.add_argument("--epochs", type=int, default=2, help="adapt: passes over the anchors")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="merge: those to be timed")
    parser.add_argument("--mergekit", type=Path, help="merge: a python that has mergekit, which is timed beside ours")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    args = parser.parse_args()
    if args.what == "scaling" and not args.toy:
        parser.error("scaling takes --toy")
    if (args.what == "merge") == bool(args.arch or args.toy) or (args.mergekit and args.what != "merge"):
        parser.error("construct and adapt take --arch or --toy, merge neither; --mergekit is for merge")
    device = prepare(args.device)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, device, Path(folder))
    told = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    text = json.dumps({"command": told, **environment_info(), "result": result}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """Make or open the weights, and compare."""
    if args.what == "merge":
        return merges(args.mergekit, folder, args.repeats, args.recipes)
    if args.what == "scaling":
        return scaling(args.toy, folder, device)
    if args.toy:
        case, base, experts, rates = toy(args.toy, Path("toy"), args.anchors or 64)
        if args.what == "construct":
            return construct(case, base, experts[0], args, device)
        prefix = case.prefixes[min(TOY_BLOCK, len(case.prefixes) - 1)]
        blocks = [Checkpoint(path, case.family.names).read_under(prefix) for path in (base, *experts)]
        return adapt(case, [{n: p.to(device) for n, p in b.items()} for b in blocks], RATES | rates, args, device)
    make, anchors = ARCHS[args.arch]
    of, generator = make(args.anchors or anchors), seeded(0)
    theta_0 = random_block(of.module, generator)
    if args.what == "adapt":
        thetas = [theta_0, *(random_expert(theta_0, generator) for _ in range(args.tasks))]
        return adapt(of, [{n: p.to(device) for n, p in theta.items()} for theta in thetas], RATES, args, device)
    files = folder / "base.safetensors", folder / "expert.safetensors"
    for file, theta in zip(files, (theta_0, random_expert(theta_0, generator)), strict=True):
        write_whole(file, of, theta)
    return construct(of, *files, args, device)


if __name__ == "__main__":
    main()
