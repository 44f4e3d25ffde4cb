"""The benchmark: its reference computes what the engine does, and both stages measure a pico block."""

from argparse import Namespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import benchmark
from benchmark_blocks import ARCHS, random_block, random_expert, vit, write_whole
from common.config import Model
from common.core.seeding import seeded
from common.core.task_vectors import subtract
from common.fda.matching import MatchingProblem, matching_gradient

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pico(pico_inputs):
    """A block of the pico CLIP with four anchors, random weights of a base and two experts."""
    of = vit(Model(root=str(pico_inputs / "clip"), base="base"), anchors=4)
    theta_0 = random_block(of.module, seeded(0))
    return of, [theta_0, *(random_expert(theta_0, seeded(i)) for i in (1, 2))]


def test_an_expert_is_as_far_from_the_base_as_said(pico):
    _, (theta_0, theta_t, _) = pico
    for name, tau in subtract(theta_t, theta_0).items():
        assert tau.norm() / theta_0[name].norm() == pytest.approx(0.01, rel=1e-3)


def test_the_reference_takes_the_gradient_that_the_engine_takes(pico):
    of, (theta_0, theta_t, _) = pico
    x = torch.randn(of.shape, generator=seeded(0))
    reference = benchmark.Reference(of.block, theta_0, theta_t, x)
    with sdpa_kernel(SDPBackend.MATH):
        reference.step()
        problem = MatchingProblem(of.block, theta_0, theta_t, subtract(theta_t, theta_0))
        _, gradient = matching_gradient(problem, x)
    torch.testing.assert_close(reference.x.grad, gradient, atol=1e-4 * gradient.abs().max().item(), rtol=1e-3)
    assert all(p.grad is not None for p in (*reference.theta_0.values(), *reference.theta_t.values()))


def test_construction_is_measured(pico, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "matmul_ceiling", lambda precision, device: 1e12)
    of, thetas = pico
    files = tmp_path / "base.safetensors", tmp_path / "expert.safetensors"
    for file, theta in zip(files, thetas[:2], strict=True):
        write_whole(file, of, theta)
    told = benchmark.construct(
        of, *files, Namespace(steps=40, reference_steps=2, repeats=1, together=2, compiler="eager"), CPU
    )
    assert told["loss"]["engine"] <= told["loss"]["reference"] and told["time_to_equal_loss_ratio"]["clock"] > 0
    assert told["steps"] == {"reference": 2, "engine": 20, "engine_planned": 40}
    assert not told["target_is_the_papers"]
    assert told["tasks_together"]["tasks"] == 2 and told["tasks_together"]["step_time_ratio"]["clock"] > 0


def test_adaptation_ends_where_the_plain_loop_ends(pico):
    of, thetas = pico
    told = benchmark.adapt(of, thetas, {"pretrained": 1e-5, "ta": 1e-2}, Namespace(epochs=20, repeats=2), CPU)
    assert told["steps"] == 20 and told["tasks"] == 2
    assert all(told[s]["loss"]["fast"] < 0.9 * told[s]["loss"]["base"] for s in ("pretrained", "ta"))
    assert told["pretrained"]["difference_of_result"] < 1e-2 and told["ta"]["difference_of_result"] < 1e-2


@pytest.mark.parametrize(
    ("arch", "shape", "weights"),
    [
        ("ViT-B-32", (64, 50, 768), 7_087_872),
        ("roberta-base", (64, 5, 768), 7_087_872),
        ("llama-mlp", (8192, 1, 5120), 3 * 5120 * 13824),
    ],
)
def test_blocks_have_the_real_sizes(arch, shape, weights):
    make, anchors = ARCHS[arch]
    of = make(anchors)
    assert of.shape == shape and sum(p.numel() for p in of.module.parameters()) == weights
