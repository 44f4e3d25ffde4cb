"""Turn published pickled checkpoints into safetensors files. Nothing that the files name is imported or executed.

    python scripts/convert_checkpoint.py checkpoints/ViT-B-32 --out checkpoints/safe/ViT-B-32

The source is one file, or a folder such as the published one: zeroshot.pt, <DATASET>/finetuned.pt, head_<DATASET>.pt,
merged_*.pt, ViT-B-32.pt. Every *.pt below it becomes the .safetensors of the same name below --out, with tensor names
as open_clip's own state dict has them. The fine-tuned files lack the text tower's `transformer.*`, as published.
In a Hugging Face folder pytorch_model.bin becomes model.safetensors (--out may be the folder itself). A target
that is already there is kept; remove it to have it made anew.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from common.core.errors import InputError
from common.io.checkpoints import write_tensors
from common.io.headers import opened
from common.io.pickles import read_tensors

# the mask follows from the context length; the numbers describe OpenAI's archive and are in open_clip's config
LEFT_OUT = {"attn_mask", "input_resolution", "context_length", "vocab_size"}


def open_clip_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the `model.` of the released ImageEncoder and without what open_clip keeps out of its state dict."""
    wrapped = any(name.startswith("model.visual.") for name in tensors)
    return {
        name.removeprefix("model.") if wrapped else name: tensor
        for name, tensor in tensors.items()
        if name.rpartition(".")[2] not in LEFT_OUT
    }


def is_made(target: Path, float32: bool) -> bool:
    """Whether the target is there, whole, and in float32 if that is asked for."""
    try:
        with opened(target) as handle:
            kinds = {handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118 (no dict)
    except InputError:
        return False
    return not float32 or kinds.isdisjoint({"F16", "BF16", "F64"})


def convert(source: Path, target: Path, float32: bool) -> str:
    """Convert one file unless its target is made already, and say which of the two happened."""
    if is_made(target, float32):
        return f"kept {target}"
    tensors = open_clip_names(read_tensors(source))
    if float32:
        tensors = {n: t.to(torch.float32) if t.is_floating_point() else t for n, t in tensors.items()}
    write_tensors(target, tensors)
    return f"converted {source} to {target}: {len(tensors)} tensors, {target.stat().st_size / 1e6:.1f} MB"


def targets_of(source: Path, out: Path) -> dict[Path, Path]:
    """{file to read: file to write}, in order of names. InputError if there is nothing to read."""
    if source.is_file():
        return {source: target_of(out / source.name)}
    files = sorted(file for file in source.rglob("*") if file.suffix in (".pt", ".bin"))
    if not files:
        raise InputError(f"{source} is neither a file nor a folder that holds .pt or .bin files")
    return {file: target_of(out / file.relative_to(source)) for file in files}


def target_of(file: Path) -> Path:
    """The same name with the suffix .safetensors; Hugging Face's pytorch_model.bin becomes its model.safetensors."""
    return file.with_name(file.stem.removeprefix("pytorch_") + ".safetensors")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC", help="a file, or a folder of .pt or .bin files")
    parser.add_argument("--out", type=Path, required=True, metavar="DST", help="the folder to write to")
    parser.add_argument("--float32", action="store_true", help="widen float16 (else numbers stay as they are stored)")
    args = parser.parse_args(arguments)
    try:
        for source, target in targets_of(args.source, args.out).items():
            print(convert(source, target, args.float32), flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
