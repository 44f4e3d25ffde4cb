"""What a machine of a cluster does for a driver: it looks whether it can, works on a unit, sends back its files."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from socket import gethostname
from typing import Any

import torch

from common.config import ROOT
from common.core.errors import InputError
from common.io.checkpoints import replacing
from common.run.engine import Outcome, Work, outcome_of


@dataclass(frozen=True)
class Home:
    """Where a unit comes from, and what of its files travels.

    folder: the driver's working folder. code: its version of this project. token: a file that shows a machine that it
    sees the run's folder. root: where a machine writes instead if it need not; the run's files lie there as in `own`.
    """

    folder: str
    code: str
    threads: int
    token: Path
    own: str
    root: str


def sees(token: Path) -> bool:
    """Whether this machine sees the driver's file."""
    return token.is_file()


def gpu_memory() -> int:
    """Bytes of this machine's smallest GPU."""
    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))


@cache
def code_version() -> str:
    """What decides, besides inputs, which bytes come of a unit: this project's files, and PyTorch."""
    sha = hashlib.sha256(torch.__version__.encode())
    for file in sorted(file for kind in ("py", "yaml") for file in ROOT.glob(f"[cVN]*/**/*.{kind}")):
        sha.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return sha.hexdigest()


def unit_at_node(
    work: Work, unit: Any, home: Home, sent: Mapping[str, Any], made: Sequence[str]
) -> tuple[Outcome, dict[str, bytes]]:
    """The outcome of a unit, and of the files `made` those that are there, if they have to be sent.

    Args:
        sent: {name below the root: reference to the bytes} of the files that the unit reads, where the run's folder is
            not seen.
    """
    outcome = outcome_of(partial(settled, work, home, sent), unit)
    if home.root and isinstance(outcome.error, InputError):
        outcome = replace(outcome, error=InputError(str(outcome.error).replace(home.root, home.own)))
    files = {name: Path(home.root, name) for name in made}
    return outcome, {name: file.read_bytes() for name, file in files.items() if file.is_file()}


def settled(work: Work, home: Home, sent: Mapping[str, Any], unit: Any) -> Any:
    """The work, where the driver works and with what it sent. InputError if this machine is not fit for it."""
    if code_version() != home.code:
        raise InputError(
            f"the machine {gethostname()} has another version of this project or of PyTorch than the driver"
        )
    if os.path.isdir(home.folder):
        os.chdir(home.folder)
    if not home.root and not home.token.is_file():
        raise InputError(f"the machine {gethostname()} joined later and does not see {home.token.parent}; start again")
    torch.set_num_threads(home.threads)
    for name, reference in sent.items():
        bring(Path(home.root, name), reference)
    return work(unit)


def bring(file: Path, reference: Any) -> None:
    """Put a file of the driver's to where it lies on this machine, unless it is there."""
    import ray

    if not file.is_file():
        with replacing(file) as temporary:
            temporary.write_bytes(ray.get(reference))
