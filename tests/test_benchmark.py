"""The benchmark: its reference computes what the engine does, both stages measure a pico block, merges are timed."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel

import benchmark_construct
from benchmark_adapt import adapt
from benchmark_blocks import ARCHS, random_block, random_expert, vit, write_whole
from benchmark_construct import construct
from benchmark_merge import RECIPES, compared, largest_difference, make_models, measured, recipe_of
from benchmark_reference import Reference
from common.config import Model, Run
from common.core.errors import InputError
from common.core.seeding import seeded
from common.core.task_vectors import subtract
from common.fda.matching import MatchingProblem, matching_gradient
from common.io.checkpoints import Checkpoint, write_tensors
from mergekit_recipe import config_of

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
    reference = Reference(of.block, theta_0, theta_t, x)
    with sdpa_kernel(SDPBackend.MATH):
        reference.step()
        problem = MatchingProblem(of.block, theta_0, theta_t, subtract(theta_t, theta_0))
        _, gradient = matching_gradient(problem, x)
    torch.testing.assert_close(reference.x.grad, gradient, atol=1e-4 * gradient.abs().max().item(), rtol=1e-3)
    assert all(p.grad is not None for p in (*reference.theta_0.values(), *reference.theta_t.values()))


def test_construction_is_measured(pico, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_construct, "matmul_ceiling", lambda precision, device: 1e12)
    of, thetas = pico
    files = tmp_path / "base.safetensors", tmp_path / "expert.safetensors"
    for file, theta in zip(files, thetas[:2], strict=True):
        write_whole(file, of, theta)
    told = construct(of, *files, Namespace(steps=40, reference_steps=2, repeats=1, together=2, compiler="eager"), CPU)
    assert told["loss"]["engine"] <= told["loss"]["reference"] and told["time_to_equal_loss_ratio"]["clock"] > 0
    assert told["steps"] == {"reference": 2, "engine": 20, "engine_planned": 40}
    assert not told["target_is_the_papers"]
    assert told["tasks_together"]["tasks"] == 2 and told["tasks_together"]["step_time_ratio"]["clock"] > 0


def test_adaptation_ends_where_the_plain_loop_ends(pico):
    of, thetas = pico
    told = adapt(of, thetas, {"pretrained": 1e-5, "ta": 1e-2}, Namespace(epochs=20, repeats=2), CPU)
    assert told["steps"] == 20 and told["tasks"] == 2
    assert all(told[s]["loss"]["fast"] < 0.9 * told[s]["loss"]["base"] for s in ("pretrained", "ta"))
    assert told["pretrained"]["difference_of_result"] < 1e-2 and told["ta"]["difference_of_result"] < 1e-2


@pytest.mark.parametrize(
    ("arch", "shape", "weights"),
    [
        ("ViT-B-32", (64, 50, 768), 7_087_872),
        ("roberta-base", (64, 5, 768), 7_087_872),
        ("smollm-mlp", (8192, 1, 576), 3 * 576 * 1536),
        ("llama-mlp", (8192, 1, 5120), 3 * 5120 * 13824),
    ],
)
def test_blocks_have_the_real_sizes(arch, shape, weights):
    make, anchors = ARCHS[arch]
    of = make(anchors)
    assert of.shape == shape and sum(p.numel() for p in of.module.parameters()) == weights


# --- merges ----------------------------------------------------------------------------------------------------------

MERGED_AS = {  # start.method and its hyperparameters, which is what each recipe asks for
    "average": ("ta", {"scale": [1 / 3] * 3}),
    "slerp": ("slerp", {"t": 0.5}),
    "ta": ("ta", {"scale": [0.3] * 3}),
    "ties": ("ties", {"density": 0.2, "scale": 1.0, "granularity": "tensor"}),
    "dare_ta": ("dare_ta", {"drop": 0.9, "scale": [0.3] * 3}),
    "dare_ties": ("dare_ties", {"drop": 0.9, "density": 1.0, "scale": 1.0}),
}


@pytest.mark.parametrize("method", RECIPES)
def test_both_merge_by_one_recipe(method, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(RECIPES[method], tmp_path)))
    config = config_of(tmp_path / "recipe.yaml", "nlg", Run())
    assert (config.start.method, config.start.hyper[config.start.method]) == MERGED_AS[method]
    models = {Path(config.model.base).name, *config.tasks}
    assert models == ({"a", "b"} if method == "slerp" else set("abc") if method == "average" else {"base", *"abc"})


def test_the_models_that_are_merged_differ_by_noise(tmp_path):
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    make_models(tmp_path, size | {"vocab_size": 2000})
    base, a, b = (Checkpoint(tmp_path / name).read_under("") for name in ("base", "a", "b"))
    assert sum(p.numel() for p in base.values()) == 2 * 2000 * 16 + 4 * 16 * 16 + 3 * 16 * 24 + 3 * 16
    name = "model.embed_tokens.weight"
    assert (a[name] - base[name]).std() == pytest.approx(1e-3, rel=0.05)
    assert (a[name] - b[name]).std() == pytest.approx(2**0.5 * 1e-3, rel=0.05)  # drawn apart


def test_a_command_is_measured_with_all_it_took():
    burn = "import time; x = bytearray(2**28); b = time.process_time()\nwhile time.process_time() < b + 0.3: pass"
    taken = measured([sys.executable, "-c", burn], {})
    assert taken.seconds > 0.3 and taken.cpu_seconds > 0.3 and 0.25 < taken.peak_gib < 0.3
    with pytest.raises(InputError, match=r"ended with 3: \['no room'\]"):
        measured([sys.executable, "-c", "print('no room'); raise SystemExit(3)"], {})


def test_commands_are_compared_in_turn(tmp_path):
    """Each writes down when it ran; the second takes twice the memory."""

    def command(who, size):
        write = f"open({str(tmp_path / 'log')!r}, 'a').write({who!r} + chr(10)); x = bytearray({size})"
        return [sys.executable, "-c", write]

    told = compared({"ours": command("ours", 2**28), "mergekit": command("mergekit", 2**29)}, tmp_path, 1)
    assert (tmp_path / "log").read_text().split() == ["ours", "mergekit"] * 2
    assert told["ours_in_parts_of_mergekit"]["peak_gib"] == pytest.approx(0.5, abs=0.05)


def test_two_models_are_compared_tensor_by_tensor(tmp_path):
    for name, change in (("one", 0.0), ("other", 0.25)):
        write_tensors(tmp_path / name / "model.safetensors", {"a": torch.ones(3), "b": torch.tensor([1.0, 2 - change])})
    assert largest_difference(tmp_path / "one", tmp_path / "other") == 0.25
