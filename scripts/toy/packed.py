"""A toy's packed file: all its weights in one file beside its module, made by `--train` and unpacked without it."""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from safetensors.torch import load_file
from torch import Tensor

from common.io.checkpoints import write_tensors

Weights = dict[str, Tensor]


def package_folder(name: str, install: str) -> Path:
    """Folder of an installed package, which is found without being run; SystemExit saying how to `install` it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"this toy needs the package {name}: {install}")
    return Path(spec.submodule_search_locations[0])


def make_from_packed(
    out: Path,
    packed: Path,
    train: Callable[[], Weights] | None,
    write: Callable[[Weights, Path], None],
    *,
    data: Sequence[ModuleType],
    settings: object,
    name: str,
    contents: str,
) -> None:
    """Write a toy into the folder `out`, unless a finished one of the same sources is there.

    Args:
        packed: the packed file, which `train` makes anew if it is given.
        write: unpacks its tensors into a folder.
        data, settings: the modules that make the toy's data, and what else decides the toy: with the packed file they
            are its sources.
        name, contents: what is printed of the toy.
    """
    if train:
        write_tensors(packed, train())
    sources = [packed, *(Path(str(module.__file__)) for module in data)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + repr(settings).encode())
    seal, made_from = out / "toy.json", json.dumps({"made_from": digest.hexdigest()})
    if seal.exists() and seal.read_text() == made_from:
        print(f"kept    {out} (a finished {name} toy)")
        return
    write(load_file(packed), out)
    seal.write_text(made_from)
    print(f"made    {out}: {contents}")
