"""What every toy does with the file that is kept beside its module: make it anew, or unpack it once."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from common.io.checkpoints import write_tensors

Weights = dict[str, Tensor]


def make(
    out: Path,
    kept: Path,
    train: Callable[[], Weights] | None,
    write: Callable[[Weights, Path], None],
    *,
    settings: object,
    name: str,
    contents: str,
) -> None:
    """The toy in `out`, written from the file `kept` unless it is there already; `train`, if given, makes that first.

    What a finished toy follows from: the kept file, the module of its data beside it, and `settings`.
    """
    if train:
        write_tensors(kept, train())
    sources = [kept, kept.with_name(f"{kept.stem}_data.py")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + repr(settings).encode())
    seal, made_from = out / "toy.json", json.dumps({"made_from": digest.hexdigest()})
    if seal.exists() and seal.read_text() == made_from:
        print(f"kept    {out} (a finished {name} toy)")
        return
    write(load_file(kept), out)
    seal.write_text(made_from)
    print(f"made    {out}: {contents}")
