"""Checkpoints of a real size with random weights: a CLIP base and experts perturbed from it, to try memory and speed.

python scripts/make_random.py --arch ViT-B-32-quickgelu --tasks MNIST DTD --out checkpoints/random
python Vision/construct_fda.py --config configs/vision/vit_b32.yaml --model.root checkpoints/random \\
    --tasks [MNIST,DTD] --run.blocks [0] --anchors.steps 2 --run.name random --run.device cpu
"""

import argparse
from pathlib import Path

import torch

from common.config import Model
from common.io.checkpoints import write_tensors
from Vision import domain
from Vision.open_clip_models import IMAGE_TOWER


def make(arch: str, tasks: list[str], out: Path, spread: float) -> None:
    """Write zeroshot.safetensors (the whole CLIP) and <task>/finetuned.safetensors (the image tower) under `out`."""
    torch.manual_seed(0)
    base = domain.skeleton(Model(arch=arch), "cpu").state_dict()
    write_tensors(out / "zeroshot.safetensors", base)
    for task in tasks:
        tower = {n: t + spread * torch.randn_like(t) for n, t in base.items() if n.startswith(IMAGE_TOWER)}
        write_tensors(out / task / "finetuned.safetensors", tower)
        print(out / task)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="ViT-B-32-quickgelu", help="open_clip model name")
    parser.add_argument("--tasks", nargs="+", default=["MNIST"], help="one expert each")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--spread", type=float, default=1e-3, help="standard deviation of an expert's difference")
    given = parser.parse_args()
    make(given.arch, given.tasks, given.out, given.spread)
