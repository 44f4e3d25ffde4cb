"""Turn pickled checkpoints into safetensors files. Nothing that the files name is imported or executed.

    python scripts/convert_checkpoint.py checkpoints/ViT-B-32 --out checkpoints/safe/ViT-B-32

The source is one file, or a folder such as the published one: zeroshot.pt, <DATASET>/finetuned.pt, head_<DATASET>.pt,
merged_*.pt, ViT-B-32.pt. Every pickled file below it becomes the .safetensors of the same name below --out, with tensor
names as stock libraries have them. The fine-tuned files lack the text tower's `transformer.*`, as published.
In a Hugging Face folder pytorch_model.bin becomes model.safetensors (--out may be the folder itself).
Of a trainer's checkpoint the model alone is taken: not the optimiser's state beside it, nor the prefixes (module.,
_orig_mod., model.) that training tools put before the names. A target that holds the same model already is kept; one
that holds another is never overwritten.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from common.core.errors import InputError
from common.io.containers import TRAINER_FILE
from common.io.conversion import convert, target_of
from common.io.model_files import PICKLED_INDEX

SUFFIXES = (".pt", ".bin", ".pth", ".ckpt")


def targets_of(source: Path, out: Path) -> dict[Path, Path]:
    """{file to read: file to write}, in order of names. InputError if there is nothing to read, or two have one target.

    In a folder the files of trainers that hold no model are passed over.
    """
    if source.is_file():
        return {source: target_of(out / source.name)}
    indices = sorted(source.rglob(PICKLED_INDEX))
    if indices:
        raise InputError(f"{indices[0]}: NLG/split_model.py {indices[0].parent} makes safetensors of a model in shards")
    files = sorted(file for file in source.rglob("*") if file.suffix in SUFFIXES and not is_training_state(file))
    if not files:
        raise InputError(f"{source} is neither a file nor a folder that holds .pt or .bin files")
    targets = {file: target_of(out / file.relative_to(source)) for file in files}
    first: dict[Path, Path] = {}
    for file, target in targets.items():
        if first.setdefault(target, file) != file:
            raise InputError(f"{first[target]} and {file} would both become {target}; convert the one that is meant")
    return targets


def is_training_state(file: Path) -> bool:
    """Whether a file is one in which trainers keep what is no model: optimizer.pt, rng_state.pth, training_args.bin."""
    return bool(TRAINER_FILE.fullmatch(file.name))


def passed_over(source: Path) -> list[str]:
    """Paths, below a folder, of the files of trainers that hold no model."""
    files = source.rglob("*") if source.is_dir() else ()
    return sorted(str(file.relative_to(source)) for file in files if file.is_file() and is_training_state(file))


def convert_all(targets: Mapping[Path, Path], float32: bool, entry: str) -> None:
    """Convert files one after another and print a line for each."""
    for source, target in targets.items():
        print(convert(source, target, float32, entry), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="a file, or a folder of .pt, .bin, .pth or .ckpt files"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DST", help="the folder to write to")
    parser.add_argument("--float32", action="store_true", help="widen float16 (else numbers stay as they are stored)")
    parser.add_argument("--entry", default="", metavar="KEY", help="what holds the model, where a file has several")
    args = parser.parse_args(arguments)
    try:
        targets = targets_of(args.source, args.out)
        for file in passed_over(args.source):
            print(f"left out {file}: a trainer's state, no model")
        convert_all(targets, args.float32, args.entry)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
