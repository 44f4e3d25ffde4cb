"""Anchors on disk: files of ours with their provenance, and the released ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.core.errors import InputError
from common.io.checkpoints import check_provenance, read_header, write_tensors
from common.io.headers import opened
from common.io.json_files import interpreted
from common.io.pickles import read_anchors


def save_anchors(file: Path, x_ATD: Tensor, header: Mapping[str, Any]) -> None:
    """Write anchors with their provenance in the header of the file."""
    write_tensors(file, {"anchors": x_ATD}, header)


def load_anchors(file: Path, provenance: Mapping[str, Any], shape: tuple[int, ...] | None = None) -> Tensor:
    """Anchors x_ATD from a file of ours; `shape` is what they must have, if that is known.

    Raises: InputError naming the first field that is not as in `provenance`, or saying what else the file holds than
        finite anchors of the shape that is there.
    """
    check_provenance(file, read_header(file), provenance)
    with opened(file) as handle:
        x = handle.get_tensor("anchors") if "anchors" in handle.keys() else None  # noqa: SIM118 (no dict)
    if x is None or x.dtype != torch.float32 or (shape and tuple(x.shape) != shape):
        found = "no tensor `anchors`" if x is None else f"anchors of shape {tuple(x.shape)} and type {x.dtype}"
        expected = f"float32 of shape {shape}" if shape else "float32"
        raise InputError(f"{file} holds {found}; {expected} is expected: remove it to have it made anew")
    if not x.isfinite().all():
        raise InputError(f"{file} holds NaN or Inf; remove it to have it made anew")
    return x


def save_snapshots(file: Path, snapshots: Mapping[int, Tensor], header: Mapping[str, Any]) -> None:
    """Write anchors {step: x_ATD} along an optimisation, with their provenance in the header of the file."""
    write_tensors(file, {f"step_{step}": x_ATD for step, x_ATD in snapshots.items()}, header)


def load_snapshots(file: Path, provenance: Mapping[str, Any], shape: tuple[int, ...]) -> dict[int, Tensor]:
    """Anchors {step: x_ATD} along an optimisation, in the order of the steps; InputError as `load_anchors` has it."""
    check_provenance(file, read_header(file), provenance)
    with opened(file) as handle, interpreted(file, "file of snapshots"):
        stored = {int(name.removeprefix("step_")): handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    if not all(tuple(x.shape) == shape and x.dtype == torch.float32 and x.isfinite().all() for x in stored.values()):
        raise InputError(f"{file} holds what are no finite float32 anchors {shape}; remove it to have it made anew")
    return dict(sorted(stored.items()))


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


def axes_as_published(x_ATD: Tensor, axes: str) -> Tensor:
    """Anchors with the axes of released files: the way back of `load_published`."""
    return {"ATD": x_ATD, "TAD": x_ATD.transpose(0, 1), "AD": x_ATD.squeeze(1)}[axes].contiguous()
