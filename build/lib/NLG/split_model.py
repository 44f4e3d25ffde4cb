"""Split a Hugging Face checkpoint into one safetensors file a layer, and an index that stock libraries follow.

    python NLG/split_model.py MODEL --out DIR

MODEL is a folder (model.safetensors, pytorch_model.bin, or shards of either with their index) or one such file. Tensors
are copied byte by byte, one at a time, so memory does not grow with the model; every file is read back and compared.
Prefixes that training tools put before the names (module., _orig_mod.) are removed.
Started again after an interruption it keeps what is whole. The pipeline does not need this: it reads any safetensors
checkpoint lazily as it is. It helps to share the layers out among machines, and to read pytorch_model*.bin at all.
"""

import argparse
import re
import sys
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from common.core.errors import InputError
from common.io.checkpoints import copy_files, read_header
from common.io.hashes import file_hash
from common.io.model_files import INDEX_FILE, PICKLED_INDEX, WEIGHT_FILES, indexed_files, weight_files
from common.io.prefixes import unwrapped
from common.io.shards import Stored, copy_stored, stored_in, write_index

COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja")  # config, generation config, tokenizer


def input_files(source: Path) -> list[Path]:
    """The files that make up a checkpoint, pickled ones included."""
    if source.suffix == ".bin":
        return [source]
    if not any((source / name).is_file() for name in (*WEIGHT_FILES, INDEX_FILE)):
        single, index = source / "pytorch_model.bin", source / PICKLED_INDEX
        if single.is_file() and index.is_file():
            raise InputError(f"{source} holds two models, {single.name} and {index.name}; remove what is not meant")
        if single.is_file() or index.is_file():
            return [single] if single.is_file() else indexed_files(index)
    return weight_files(source)


def part_of(name: str) -> str:
    """The layer of a tensor, model.layers.7, or outside the layers its module, model.embed_tokens."""
    layer = re.match(r"(.+?\.\d+)\.", name)
    part = layer[1] if layer else name.rpartition(".")[0] or name
    if not re.fullmatch(r"\w[\w.-]*", part):
        raise InputError(f"the tensor {name!r} has a name that no file can bear")
    return part


def split(source: Path, out: Path) -> None:
    """Copy every tensor into the file of its layer under `out`, then the index and what lies beside the weights."""
    if out.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise InputError(f"--out {out} is where the checkpoint is; choose another folder")
    files = input_files(source)
    parts: dict[str, dict[str, Stored]] = defaultdict(dict)
    with ExitStack() as stack:
        stored: dict[str, Stored] = {}
        for file in files:
            stored |= stack.enter_context(stored_in(file))
        for wrapped, name in unwrapped(stored, source).names.items():
            parts[part_of(name)][name] = stored[wrapped]
        origin = {"source": [file_hash(file) for file in files]}
        size = sum(tensor.nbytes for part in parts.values() for tensor in part.values())
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"split {source.name}") as bar:
            for part, tensors in parts.items():
                copy_part(out / f"{part}.safetensors", tensors, origin)
                bar.update(sum(tensor.nbytes for tensor in tensors.values()))
    if source.is_dir():
        copy_companions(source, out)
    write_index([out / f"{part}.safetensors" for part in parts], out)


def copy_part(file: Path, tensors: dict[str, Stored], origin: dict) -> None:
    """Write one file, unless it is there already; InputError if it is there but of another checkpoint."""
    if not file.is_file():
        return copy_stored(file, tensors, origin)
    found = read_header(file)
    if found != origin:
        sampled = any(len(value) < 64 for value in found.get("source", ()))
        of = "an earlier version of this command, which sampled its source" if sampled else "another checkpoint"
        raise InputError(f"{file} is of {of}; choose another --out, or remove it")


def copy_companions(source: Path, out: Path) -> None:
    """Copy configs and tokenizer; the indices of the source describe other files."""
    found = {file.name for pattern in COMPANIONS for file in source.glob(pattern)}
    copy_files(source, out, sorted(name for name in found if not name.endswith(".index.json")))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder, or one file of weights")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write to")
    args = parser.parse_args(arguments)
    try:
        split(args.model, args.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
