"""Fitting a block: identities of the parameterisations, recovery of a known solution, refusals."""

import pytest
import torch

from common.adaptation import coefficients, fit_block, own_weights
from common.anchors import seeded
from common.errors import InputError


def linear(params, x_ATD):
    return x_ATD @ params["weight"].T


def random_params(seed):
    return {"weight": torch.randn(4, 3, generator=seeded(seed))}


def fit(start, x, y, **changes):
    settings = {"distance": "mse", "lr": 1e-2, "epochs": 5, "batch_size": 4} | changes
    return fit_block(linear, start, x, y, generator=seeded(0, "fit"), **settings)


@pytest.mark.parametrize("distance", ["mse", "l1"])  # their gradient is exactly zero where the outputs are equal
def test_adaptation_started_at_the_only_expert_stays_put(distance):
    theta_0, theta_t = ({"weight": torch.randint(-9, 9, (4, 3), generator=seeded(s)).float()} for s in (0, 1))
    x = torch.randint(-9, 9, (8, 1, 3), generator=seeded(2)).float()
    tau = {"weight": theta_t["weight"] - theta_0["weight"]}
    merged, trace = fit(coefficients(theta_0, [tau], [1.0]), x, linear(theta_t, x), distance=distance)
    assert trace == [0] * 5
    assert torch.equal(merged["weight"], theta_t["weight"])


def test_the_expert_is_found_again_from_the_base():
    theta_0, theta_t = random_params(0), random_params(1)
    x = torch.randn(16, 2, 3, generator=seeded(2))
    merged, trace = fit(own_weights(theta_0), x, linear(theta_t, x), lr=0.05, epochs=300)
    assert trace[-1] < 1e-3 < trace[0]
    torch.testing.assert_close(merged["weight"], theta_t["weight"], atol=0.01, rtol=0)


def test_coefficients_begin_at_the_scaled_sum_and_move_only_where_a_task_vector_does():
    theta_0 = random_params(0)
    deltas = [{"weight": torch.zeros(4, 3)} for _ in range(2)]
    deltas[0]["weight"][0], deltas[1]["weight"][1] = 1.0, 2.0
    start = coefficients(theta_0, deltas, [0.3, 0.5])
    expected = theta_0["weight"] + 0.3 * deltas[0]["weight"] + 0.5 * deltas[1]["weight"]
    torch.testing.assert_close(start.build(start.free)["weight"], expected)
    x = torch.randn(8, 1, 3, generator=seeded(2))
    merged, _ = fit(start, x, torch.ones(8, 1, 4))
    moved = (merged["weight"] != expected).any(1)
    assert moved.tolist() == [True, True, False, False]


def test_the_last_batch_may_be_smaller():
    theta_0 = random_params(0)
    x = torch.randn(10, 1, 3, generator=seeded(2))
    _, trace = fit(own_weights(theta_0), x, linear(theta_0, x), batch_size=4)
    assert len(trace) == 5


def test_a_batch_larger_than_the_anchors_is_refused():
    x = torch.randn(3, 1, 3)
    with pytest.raises(InputError, match=r"adapt.batch_size is 4, but all tasks together have 3 anchors"):
        fit(own_weights(random_params(0)), x, torch.zeros(3, 1, 4))


def test_a_loss_that_is_not_finite_names_its_epoch():
    x = torch.randn(4, 1, 3)
    with pytest.raises(FloatingPointError, match="epoch 0"):
        fit(own_weights(random_params(0)), x, torch.full((4, 1, 4), torch.inf))
