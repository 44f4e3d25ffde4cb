"""Anchors: where they start (paper section 3.3) and how they are kept on disk.

Shapes: A anchors, T tokens, D width.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoints import check_provenance, opened, read_header, write_tensors
from common.errors import InputError
from common.task_vectors import Params
from common.unpickling import read_anchors

SCALES = {"weight": 1.0, "gauss": 0.01}  # the paper's, by scheme


def initial_anchors(
    scheme: str, shape: tuple[int, int, int], *, theta_t: Params, scale: float, generator: torch.Generator
) -> Tensor:
    """Anchors x_ATD to start the optimisation from, on the CPU.

    "weight": every token is a row of a weight matrix of the fine-tuned block that has D inputs, drawn without
        replacement; when there are too few rows, the tokens left over are means of two random rows.
    "gauss": standard normal.
    Both times `scale`. What matters is little energy in the tail subspace of the task vector (paper Eq. 7).

    Deviation: where rows run short (ViT-B/16, ViT-L/14) the released code lays the rows in storage order and the means
    behind them, so that a token's place decides what it is; here all are shuffled.
    """
    a, t, d = shape
    if scheme == "gauss":
        return torch.randn(shape, generator=generator) * scale
    if scheme != "weight":
        raise InputError(f"there is no initialisation {scheme!r}; choose one of {', '.join(SCALES)}")
    matrices = [w.detach().float().cpu() for w in theta_t.values() if w.ndim == 2 and w.shape[1] == d]
    if not matrices:
        raise InputError(f"no weight matrix of the block has {d} inputs, so anchors cannot start from its rows")
    rows = torch.cat(matrices)
    short = max(0, a * t - len(rows))
    pairs = torch.randint(len(rows), (2, short), generator=generator)
    rows = torch.cat([rows, rows[pairs].mean(0)])
    return rows[torch.randperm(len(rows), generator=generator)[: a * t]].reshape(shape) * scale


def seeded(seed: int, *what: str | int) -> torch.Generator:
    """A CPU generator for one unit of work, the same on every machine and in every order of work."""
    key = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def save_anchors(file: Path, x_ATD: Tensor, header: Mapping[str, Any]) -> None:
    """Write anchors with their provenance in the header of the file."""
    write_tensors(file, {"anchors": x_ATD}, header)


def load_anchors(file: Path, provenance: Mapping[str, Any]) -> Tensor:
    """Anchors x_ATD from a file of ours; InputError names the first field that is not as in `provenance`."""
    check_provenance(file, read_header(file), provenance)
    with opened(file) as handle:
        return handle.get_tensor("anchors")


def load_published(file: Path, axes: str, width: int) -> Tensor:
    """Anchors x_ATD from a released .npy file, whose axes are `axes`: ATD, TAD or AD. Nothing in it is executed."""
    if not file.is_file():
        raise InputError(f"there is no anchor file {file}")
    x = torch.from_numpy(read_anchors(file)["input"]).float()
    if x.ndim != len(axes) or x.shape[-1] != width:
        wanted = f"{len(axes)} axes with width {width} are expected"
        raise InputError(f"{file} holds anchors of shape {tuple(x.shape)}; {wanted}")
    if not x.isfinite().all():
        raise InputError(f"{file} holds NaN or Inf")
    return {"ATD": x, "TAD": x.transpose(0, 1), "AD": x[:, None]}[axes].contiguous()
