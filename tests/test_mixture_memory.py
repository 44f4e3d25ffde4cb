"""Of a mixture with 64 experts a layer no more is in memory than a few of them: neither a layer, nor a stack of one.

The large measurement, of three models of 300 MB and more: python tests/test_mixture_memory.py [KIND [WIDTH]]
"""

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from common.config import Adapt, Anchors, Compare, Config, Eval, Model, Run, Start
from common.io.checkpoints import write_tensors
from common.io.shards import CHUNK_BYTES
from NLG.decoders import family, skeleton
from pico_nlg import PICO, pico_architecture

EXPERTS, TASKS = 64, ["math", "code"]
MEASURE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_mixture_memory import measured
print(measured(*sys.argv[1:3], int(sys.argv[3])))
"""


def write_mixture(root: Path, kind: str, experts: int, width: int) -> int:
    """A base and two experts of one layer, as their class stores them; the bytes of one routed expert of one model."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "head_dim": 8}
    architecture = pico_architecture(kind, **PICO | sizes | {"num_local_experts": experts, "num_experts_per_tok": 2})
    architecture.save_pretrained(root / "base")
    model = Model(root=str(root), base="base")
    shapes, total = family(model).stored(skeleton(model)), 0
    for seed, name in enumerate(("base", *TASKS)):
        generator = torch.Generator().manual_seed(seed)
        tensors = {n: 0.02 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
        write_tensors(root / name / "model.safetensors", tensors)
        architecture.save_pretrained(root / name)
    total = sum(4 * math.prod(shape) for name, shape in shapes.items() if ".experts." in name)
    return total // experts


def config_of(root: Path) -> Config:
    return Config(
        "nlg", Model(root=str(root), base="base", expert="{task}"), TASKS, Anchors(number=2, steps=1), Start("ta"),
        Adapt(), Eval(), Compare(), Run(name="run", root=str(root / "runs"), device="cpu", score=False),
    )  # fmt: skip


def measured(kind: str, folder: str, width: int) -> str:
    """Bytes in memory at most while the models are merged, and then while their one layer is constructed, beyond what
    is in memory before: after the imports, and all of the same with models of two experts of width 8."""
    from common.pipeline import construct, merge_alone
    from NLG import domain

    with tempfile.TemporaryDirectory() as warm:
        write_mixture(Path(warm), kind, 2, 8)
        merge_alone(config_of(Path(warm)), domain)
        construct(config_of(Path(warm)), domain)
    found = []
    for stage in (merge_alone, construct):
        Path("/proc/self/clear_refs").write_text("5")  # the most in memory is counted from here
        before = resident("VmRSS")
        stage(config_of(Path(folder)), domain)
        found.append(str(resident("VmHWM") - before))
    return " ".join(found)


def resident(field: str) -> int:
    """Bytes, by what Linux counts: VmRSS is in memory, VmHWM was at most."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def peaks(root: Path, kind: str, width: int) -> tuple[int, int]:
    """The same, measured in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, kind, str(root), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    merge, construct = map(int, done.stdout.split()[-2:])
    return merge, construct


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])  # experts apart in the checkpoint; stacked
def test_an_expert_at_a_time_is_in_memory(tmp_path, kind):
    """A merge holds less than an expert of each of the three models; construction, which differentiates twice, at most
    four times that. Either stack of a model has 64."""
    one = write_mixture(tmp_path, kind, EXPERTS, 192)
    merge, construct = peaks(tmp_path, kind, 192)
    room = CHUNK_BYTES + 4 * 2**20  # what is copied from file to file at once, and the interpreter's
    print(kind, one, merge, construct)
    assert merge < 3 * one + room < EXPERTS * one / 4
    assert construct < 12 * one + room < EXPERTS * one / 2


if __name__ == "__main__":
    chosen, wide = (*sys.argv[1:], *("mixtral", "448")[len(sys.argv) - 1 :])
    with tempfile.TemporaryDirectory() as place:
        each = write_mixture(Path(place), chosen, EXPERTS, int(wide))
        most = peaks(Path(place), chosen, int(wide))
    model, merge_MB, construct_MB = (f"{size / 1e6:.1f} MB" for size in (EXPERTS * each, *most))
    print(f"{chosen}: an expert {each / 1e6:.2f} MB, a model's {model}; merge {merge_MB}, construct {construct_MB}")
