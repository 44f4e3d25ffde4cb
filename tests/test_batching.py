"""Tasks of a block in one go: what they find is what each finds alone."""

from dataclasses import replace

import pytest
import torch
import yaml

from common.config import PRESETS, Model
from common.core.blocks import BlockFamily
from common.core.errors import InputError
from common.core.seeding import seeded
from common.core.task_vectors import subtract
from common.fda.construction import SearchSettings, optimise_anchors, optimise_together
from common.fda.matching import MatchingProblem
from common.io.checkpoints import read_header
from common.pipeline import adapt, construct
from Vision import domain
from Vision.open_clip_models import OPEN_CLIP


@pytest.fixture(scope="module")
def units(pico_inputs):
    """A block of the pico CLIP, θ₀, and three tasks, of which the last leaves a tensor as it is."""
    family: BlockFamily = OPEN_CLIP
    (_, module), *_ = family.modules(domain.skeleton(Model(root=str(pico_inputs / "clip"), base="base")))
    generator = seeded(0)
    theta_0 = {n: 0.3 * torch.randn(p.shape, generator=generator) for n, p in module.named_parameters()}
    block, problems, x_inits = family.pure(module), [], []
    for task in range(3):
        theta_t = {n: p + 0.1 * torch.randn(p.shape, generator=generator) for n, p in theta_0.items()}
        if task == 2:
            theta_t["mlp.c_fc.bias"] = theta_0["mlp.c_fc.bias"]
        tau = family.without_null_gradients(subtract(theta_t, theta_0))
        problems.append(MatchingProblem(block, theta_0, theta_t, tau, 0.1 * torch.ones(5, 16)))
        x_inits.append(torch.randn(4, 5, 16, generator=generator))
    return problems, x_inits


@pytest.mark.parametrize(
    ("optimizer", "lr", "precision", "apart"), [("adamw", 0.05, "float32", 1e-5), ("muon", 0.3, "bf16", 5e-3)]
)
def test_tasks_together_find_what_each_finds_alone(units, optimizer, lr, precision, apart, monkeypatch):
    monkeypatch.setattr("common.fda.precision.FEW", 0)
    settings = SearchSettings(30, lr=lr, optimizer=optimizer, schedule="linear", precision=precision)
    alone = [optimise_anchors(problem, x, settings) for problem, x in zip(*units, strict=True)]
    for found, expected in zip(optimise_together(*units, settings), alone, strict=True):
        assert found.losses.keys() == expected.losses.keys()
        assert found.trace == pytest.approx(expected.trace, abs=apart)
        assert expected.trace[-1] < 0.9 * expected.trace[0]
    assert len(alone[2].losses) == len(alone[0].losses) - 1


@pytest.mark.parametrize("weights", ["size", "norm"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_weights_are_those_of_each_task_in_a_batch(units, weights, precision, monkeypatch):
    monkeypatch.setattr("common.fda.precision.FEW", 0)
    plain, x_inits = units
    problems = [replace(problem, weights=weights) for problem in plain]
    settings = SearchSettings(5, lr=0.05, optimizer="adamw", precision=precision)
    alone = [optimise_anchors(problem, x, settings) for problem, x in zip(problems, x_inits, strict=True)]
    together = optimise_together(problems, x_inits, settings)
    for found, expected in zip(together, alone, strict=True):
        assert found.trace == pytest.approx(expected.trace, abs=1e-5 if precision == "float32" else 5e-3)
    unweighted = optimise_anchors(plain[0], x_inits[0], settings)
    assert abs(unweighted.trace[0] - alone[0].trace[0]) > 1e-2
    with pytest.raises(ValueError, match="count by different weights"):
        optimise_together([problems[0], plain[1]], x_inits[:2], settings)


def test_each_task_of_a_batch_ends_where_it_would_end_alone(units):
    problems, x_inits = units[0][:2], units[1][:2]
    settings = SearchSettings(60, lr=0.05, optimizer="adamw")
    whole = [optimise_anchors(problem, x, settings) for problem, x in zip(problems, x_inits, strict=True)]
    wanted = min(found.trace[20] for found in whole) + 1e-3
    settings = replace(settings, stop_loss=wanted)
    alone = [optimise_anchors(problem, x, settings) for problem, x in zip(problems, x_inits, strict=True)]
    lengths = [len(found.trace) for found in alone]
    together = optimise_together(problems, x_inits, settings)
    assert [len(found.trace) for found in together] == lengths and len(set(lengths)) == 2


def test_tasks_of_different_blocks_are_not_measured_together(units):
    problems, x_inits = units
    other = replace(problems[0], theta_0=dict(problems[0].theta_0))
    with pytest.raises(ValueError, match="several blocks or base models"):
        optimise_together([problems[0], other], x_inits[:2], SearchSettings(1, lr=0.1))


def test_construct_makes_the_tasks_of_a_block_together(pico_config, tmp_path):
    """The same losses to rounding, the same bytes each time, also where one of the files was lost."""
    construct(pico_config, domain)
    settings = replace(pico_config.anchors, together="eager")
    both = replace(pico_config, anchors=settings, run=replace(pico_config.run, name="both"))
    construct(both, domain)
    files = sorted((tmp_path / "both" / "anchors").glob("*/*/*.safetensors"))
    bytes_of = {file: file.read_bytes() for file in files}
    assert len(files) == 4
    for file in files:
        alone = read_header(tmp_path / "pico" / file.relative_to(tmp_path / "both"))
        assert read_header(file)["trace"] == pytest.approx(alone["trace"], abs=1e-5)
    files[0].unlink()
    construct(both, domain)
    assert {file: file.read_bytes() for file in files} == bytes_of


def test_the_fast_preset_gives_the_same_bytes_each_time(pico_config, tmp_path):
    preset = yaml.safe_load((PRESETS / "fast.yaml").read_text())
    fast = replace(
        pico_config,
        anchors=replace(pico_config.anchors, **preset["anchors"] | {"steps": 25}),
        adapt=replace(pico_config.adapt, **preset["adapt"] | {"epochs": 2}),
        start=replace(pico_config.start, method="ta"),
    )
    made = []
    for name in ("once", "again"):
        run = replace(pico_config.run, name=name, score=False, **preset["run"])
        construct(replace(fast, run=run), domain)
        adapt(replace(fast, run=run), domain)
        files = sorted((tmp_path / name).rglob("*.safetensors"))
        made.append({file.relative_to(tmp_path / name): file.read_bytes() for file in files})
    assert made[0] == made[1] and len(made[0]) == 4 + 2
    first = read_header(tmp_path / "once" / "anchors" / "weight" / "MNIST" / "block_00.safetensors")
    assert first["run"]["precision"] == "bf16" and first["trace"][-1] < first["trace"][0]


@pytest.mark.parametrize(("flags", "same"), [({}, True), ({"amx_bf16": True}, False)])
def test_construct_takes_float32_where_bf16_would_be_emulated(pico_config, tmp_path, monkeypatch, flags, same):
    monkeypatch.setattr("common.fda.precision.FEW", 0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    traces = []
    for precision in ("float32", "bf16"):
        construct(replace(pico_config, run=replace(pico_config.run, name=precision, precision=precision)), domain)
        file = tmp_path / precision / "anchors" / "weight" / "MNIST" / "block_00.safetensors"
        traces.append(read_header(file)["trace"])
    assert (traces[0] == traces[1]) is same


def test_chunks_and_tasks_together_exclude_each_other(pico_config):
    settings = replace(pico_config.anchors, together="eager", chunk=2)
    with pytest.raises(InputError, match="anchors.chunk cannot be set with it"):
        construct(replace(pico_config, anchors=settings), domain)
