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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.core.errors import InputError
from common.io.checkpoints import write_tensors
from common.io.containers import TRAINER_FILE, Contents, model_in
from common.io.headers import mistaken_for, opened
from common.io.model_files import PICKLED_INDEX
from common.io.pickles import Pickled, lazy_tensors
from common.io.quantised import require_weights
from common.io.shards import DTYPES

SUFFIXES = (".pt", ".bin", ".pth", ".ckpt")
TARGETS = {  # the names that stock libraries look for
    "pytorch_model.bin": "model.safetensors",
    "pytorch_model_fsdp.bin": "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}
HALF = (torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class PickledHeader:
    """What a pickle says of a tensor, in the words of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]


def convert(source: Path, target: Path, float32: bool, entry: str = "") -> str:
    """Convert one file unless its target is made already, and say which of the two happened and what was taken."""
    known = mistaken_for(source)
    if "pointer" in known or "web page" in known or "empty" in known:
        raise InputError(f"{source} {known}")
    with lazy_tensors(source) as found:
        model = model_in(found, source, entry)
        headers = {name: PickledHeader(DTYPES[t.dtype], t.shape) for name, t in model.tensors.items()}
        require_weights(source, headers, {})
        said = "".join(f"; {part}" for part in model.said)
        if is_made(target, source, model, float32):
            return f"kept {target}{said}"
        tensors = {name: widened(pickled.read(), float32) for name, pickled in model.tensors.items()}
    write_tensors(target, tensors)
    return f"converted {source} to {target}: {len(tensors)} tensors, {target.stat().st_size / 1e6:.1f} MB{said}"


def widened(tensor: Tensor, float32: bool) -> Tensor:
    """A tensor as it is stored, or in float32 if that is asked for and it is a floating-point one."""
    return tensor.to(torch.float32) if float32 and tensor.is_floating_point() else tensor


def is_made(target: Path, source: Path, model: Contents[Pickled], float32: bool) -> bool:
    """Whether the target holds this model, whole, and in float32 if that is asked for.

    Raises: InputError if it holds anything else: it may be newer, or dearer, than what is converted.
    """
    try:
        with opened(target) as handle:
            names = set(handle.keys())
            odd = next(iter(sorted(names ^ model.tensors.keys())), None)
            odd = odd or next((n for n, t in model.tensors.items() if not alike(handle.get_tensor(n), t.read())), None)
            kinds = {handle.get_slice(name).get_dtype() for name in names}
    except InputError:
        return False  # there is none, or it is not whole
    if odd:
        raise InputError(f"{target} is there and differs from {source} in {odd}; remove it, or choose another --out")
    return not float32 or kinds.isdisjoint({DTYPES[dtype] for dtype in HALF})


def alike(made: Tensor, source: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN included, in float32 or as they are stored."""
    if made.shape != source.shape or made.dtype not in (source.dtype, torch.float32):
        return False
    source = source.to(made.dtype)
    return torch.equal(made, source) or bool(((made == source) | (made.isnan() & source.isnan())).all())


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


def target_of(file: Path) -> Path:
    """The same name with the suffix .safetensors, or the name that stock libraries look for."""
    return file.with_name(TARGETS.get(file.name, file.stem + ".safetensors"))


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
