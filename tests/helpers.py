"""What tests of several subjects share: configs with another value, what files hold, tensors compared."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from common.config import ROOT, Config
from common.core.task_vectors import LazyTensor, Params
from common.fda import precision
from common.fda.matching import MatchingProblem, matching_gradient
from common.fda.precision import forward_in
from common.io.checkpoints import Checkpoint, write_tensors
from common.io.shards import Stored, stored_when_made


def change(config: Config, section: str, **fields) -> Config:
    """The config with other values in one of its sections."""
    return replace(config, **{section: replace(getattr(config, section), **fields)})


def files_of(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """{path below the folder: its bytes} of all files, however deep, whose name fits the pattern."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob(pattern)) if f.is_file()}


def rewrite(file: Path, edit: Callable[[Params], Any]) -> None:
    """Change a file of tensors: `edit` gets {name: tensor}, changes it in place or returns another dictionary."""
    tensors = load_file(file)
    edited = edit(tensors)
    write_tensors(file, edited if isinstance(edited, dict) else tensors)


def as_made(tensors: Params) -> dict[str, Stored]:
    """Tensors as an export hands them to what writes them."""
    return {n: stored_when_made(LazyTensor(tuple(t.shape), (lambda t=t: t,)), t.dtype) for n, t in tensors.items()}


def edit_config(folder: Path, **fields) -> None:
    """Change fields of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def command(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the project as a user runs it, from its folder, with these variables in the environment besides."""
    run = [sys.executable, *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def read(path: Path, name: str) -> torch.Tensor:
    """One tensor of a checkpoint, in float32."""
    return Checkpoint(path).read([name])[name]


def linear(params: Params, x_ATD: torch.Tensor) -> torch.Tensor:
    """A block of one weight, without bias."""
    return torch.nn.functional.linear(x_ATD, params["weight"])


def assert_same_in_bf16(problem: MatchingProblem, x_ATD: torch.Tensor) -> None:
    """Gradients of anchors of a shape that the block was never called with point the same way in bf16 as in float32."""
    x_ATD = torch.cat([x_ATD, -x_ATD, x_ATD.flip(1)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(precision, "FEW", 0)
        _, found = matching_gradient(problem, x_ATD, forward=forward_in("bf16"))
    _, expected = matching_gradient(problem, x_ATD)
    assert functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98


def assert_close(ours: torch.Tensor, expected, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    """A tensor of the project is, in float64, what another computation expects."""
    np.testing.assert_allclose(ours.detach().double().numpy(), np.asarray(expected), rtol=rtol, atol=atol)


def heeding_interrupts() -> None:
    """For a process that is begun: what a shell begins in the background ignores interrupts, and so would this."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
