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
from pathlib import Path
from typing import Any

import torch

from benchmark_adapt import RATES, adapt
from benchmark_blocks import ARCHS, TOY_BLOCK, TOYS, random_block, random_expert, toy, write_whole
from benchmark_construct import construct
from benchmark_merge import RECIPES, merges
from benchmark_reference import PAPER_STEPS
from benchmark_scaling import scaling
from common.core.seeding import seeded
from common.io.checkpoints import Checkpoint
from common.run.device import prepare
from common.run.run_log import environment_info


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
