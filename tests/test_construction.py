"""Optimising anchors: it gets better, keeps the best, repeats exactly, and stops at nonsense."""

import pytest
import torch

from common.core.task_vectors import subtract
from common.fda.construction import SearchSettings, optimise_anchors
from common.fda.matching import MatchingProblem, matching_loss
from helpers import linear


def problem_of(theta_0, theta_t, block=linear):
    return MatchingProblem(block, theta_0, theta_t, subtract(theta_t, theta_0))


def optimise(problem, x, **settings):
    return optimise_anchors(problem, x, SearchSettings(**settings))


@pytest.fixture
def unit():
    generator = torch.Generator().manual_seed(0)
    theta_0 = {"weight": torch.randn(6, 5, generator=generator)}
    theta_t = {"weight": theta_0["weight"] + torch.randn(6, 5, generator=generator)}
    return theta_0, theta_t, torch.randn(8, 1, 5, generator=generator)


def test_a_linear_layer_with_enough_anchors_is_matched(unit):
    """With at least rank(ΔW) anchors the cosine can reach 1."""
    theta_0, theta_t, x = unit
    found = optimise(problem_of(theta_0, theta_t), x, steps=800, lr=1e-2, distance="mse")
    assert found.losses["weight"] < 0.01 < 0.05 < found.trace[0]


def test_muon_gets_there_in_fewer_steps(unit):
    theta_0, theta_t, x = unit
    slow = optimise(problem_of(theta_0, theta_t), x, steps=40, lr=1e-2, distance="mse")
    fast = optimise(
        problem_of(theta_0, theta_t),
        x,
        steps=40,
        lr=0.3,
        distance="mse",
        optimizer="muon",
        schedule="linear",
    )
    assert min(fast.trace) < 0.5 * min(slow.trace)


def test_the_best_anchors_are_kept_and_the_last_are_scored(unit):
    theta_0, theta_t, x = unit
    found = optimise(problem_of(theta_0, theta_t), x, steps=30, lr=0.5, distance="mse")  # a rate that overshoots
    assert len(found.trace) == 31
    assert found.trace[found.best_step] == min(found.trace)
    again = matching_loss(problem_of(theta_0, theta_t), found.x, distance="mse")
    assert again.mean().item() == found.trace[found.best_step] == pytest.approx(sum(found.losses.values()))
    one = optimise(problem_of(theta_0, theta_t), x, steps=1, lr=1e-3, distance="mse")
    assert one.best_step == 1 and not torch.equal(one.x, x)


def test_no_step_leaves_the_anchors_and_the_argument_alone(unit):
    theta_0, theta_t, x = unit
    before = x.clone()
    assert torch.equal(optimise(problem_of(theta_0, theta_t), x, steps=0, lr=1e-2).x, before)
    optimise(problem_of(theta_0, theta_t), x, steps=3, lr=1e-2)
    assert torch.equal(x, before)


def test_a_task_vector_of_zero_leaves_the_anchors(unit):
    theta_0, _, x = unit
    found = optimise(problem_of(theta_0, dict(theta_0)), x, steps=5, lr=1e-2)
    assert torch.equal(found.x, x) and found.trace == []


def test_a_loss_that_is_not_finite_names_its_step(unit):
    theta_0, theta_t, x = unit
    calls = []

    def breaks(params, x_ATD):
        calls.append(1)
        return linear(params, x_ATD) * (torch.nan if len(calls) > 2 * 7 else 1)  # two calls a step

    with pytest.raises(FloatingPointError, match="nan at step 7"):
        optimise(problem_of(theta_0, theta_t, breaks), x, steps=50, lr=1e-2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_in_bf16_the_kept_loss_is_the_float32_one_of_the_kept_anchors(unit, optimizer, monkeypatch):
    monkeypatch.setattr("common.fda.precision.FEW", 0)  # also so small a map
    theta_0, theta_t, x = unit
    settings = {"steps": 50, "lr": 0.1, "distance": "mse", "schedule": "linear", "optimizer": optimizer}
    exact = optimise(problem_of(theta_0, theta_t), x, **settings)
    found = optimise(problem_of(theta_0, theta_t), x, **settings, precision="bf16")
    again = matching_loss(problem_of(theta_0, theta_t), found.x, distance="mse")
    assert found.losses["weight"] == again.item()
    assert found.best_step in (0, 20, 40, 50)
    assert found.losses["weight"] < 0.5 * found.trace[0]
    assert found.trace != exact.trace and found.trace == pytest.approx(exact.trace, abs=0.02)


def test_tf32_is_float32_where_there_is_no_cuda(unit):
    theta_0, theta_t, x = unit
    full, tf32 = (optimise(problem_of(theta_0, theta_t), x, steps=20, lr=0.1, precision=p) for p in ("float32", "tf32"))
    assert full.trace == tf32.trace


def test_a_unit_ends_at_the_first_look_that_is_good_enough(unit):
    theta_0, theta_t, x = unit
    settings = {"steps": 800, "lr": 1e-2, "distance": "mse"}
    whole = optimise(problem_of(theta_0, theta_t), x, **settings)
    wanted = whole.trace[100]
    assert wanted < min(whole.trace[:90])
    found = optimise(problem_of(theta_0, theta_t), x, **settings, stop_loss=wanted)
    assert found.trace == whole.trace[:101]


def test_a_unit_ends_where_it_gets_no_better(unit):
    theta_0, theta_t, x = unit
    found = optimise(problem_of(theta_0, theta_t), x, steps=800, lr=1e-9, patience=60)
    assert len(found.trace) == 61
    better = optimise(problem_of(theta_0, theta_t), x, steps=100, lr=1e-2, distance="mse", patience=60)
    assert len(better.trace) == 101
