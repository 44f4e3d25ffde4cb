"""Fitting a block: identities of the parameterisations, recovery of a known solution, refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.core.errors import InputError
from common.core.seeding import seeded
from common.fda.adaptation import (
    BETAS,
    FitSettings,
    Trainable,
    coefficient_adam,
    coefficients,
    fit_block,
    input_grams,
    own_weights,
    regmean_warm_start,
)
from common.io.checkpoints import read_header
from common.layout import RunLayout
from common.pipeline import adapt, construct
from common.planning.cost import Ledger, memory_of_warm_start
from helpers import linear
from Vision import domain
from Vision.open_clip_models import OPEN_CLIP

UNUSED = {"unused": torch.ones(3)}


def random_params(seed):
    return {"weight": torch.randn(4, 3, generator=seeded(seed))}


def fit(start, x, y, **changes):
    settings = FitSettings(**{"distance": "mse", "lr": 1e-2, "epochs": 5, "batch_size": 4} | changes)
    return fit_block(linear, start, x, y, settings, generator=seeded(0, "fit"))


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


def test_coefficients_begin_at_the_scaled_sum_and_move_with_task_vectors():
    theta_0 = random_params(0)
    deltas = [{"weight": torch.zeros(4, 3)} for _ in range(2)]
    deltas[0]["weight"][0], deltas[1]["weight"][1] = 1.0, 2.0
    start = coefficients(theta_0, deltas, [0.3, 0.5])
    expected = theta_0["weight"] + 0.3 * deltas[0]["weight"] + 0.5 * deltas[1]["weight"]
    torch.testing.assert_close(start.build(start.params)["weight"], expected)
    x = torch.randn(8, 1, 3, generator=seeded(2))
    merged, _ = fit(start, x, torch.ones(8, 1, 4))
    moved = (merged["weight"] != expected).any(1)
    assert moved.tolist() == [True, True, False, False]


def test_the_last_batch_may_be_smaller():
    theta_0 = random_params(0)
    x = torch.randn(10, 1, 3, generator=seeded(2))
    _, trace = fit(own_weights(theta_0), x, linear(theta_0, x), batch_size=4)
    assert len(trace) == 5


def test_fewer_anchors_than_a_batch_may_have_are_one_batch():
    theta_0, x = random_params(0), torch.randn(3, 1, 3)
    several, all_at_once = (fit(own_weights(theta_0), x, torch.ones(3, 1, 4), batch_size=size) for size in (128, 3))
    assert several[1] == all_at_once[1] and len(several[1]) == 5
    assert all(torch.equal(several[0][name], theta) for name, theta in all_at_once[0].items())


def test_a_loss_that_is_not_finite_names_its_epoch():
    x = torch.randn(4, 1, 3)
    with pytest.raises(FloatingPointError, match="epoch 0"):
        fit(own_weights(random_params(0)), x, torch.full((4, 1, 4), torch.inf))


@pytest.mark.parametrize("start", [own_weights, lambda theta: coefficients(theta, [random_params(1) | UNUSED], [0.3])])
def test_parameters_that_the_block_does_not_use_stay(start):
    x = torch.randn(8, 1, 3, generator=seeded(2))
    start = start(random_params(0) | UNUSED)
    merged, (first, *_, last) = fit(start, x, linear(random_params(1), x), epochs=10)
    assert last < first
    assert torch.equal(merged["unused"], start.build(start.params)["unused"])


@pytest.mark.parametrize("betas", [BETAS, (0.7, 0.98)])
def test_adam_on_the_sum_is_adam_on_every_coefficient(betas):
    """Against torch's own Adam on α of θ = Σ α_i ⊙ δ_i, whose gradients are G as δ_i ⊙ G; some δ are zero."""
    deltas = torch.randn(3, 4, 5, generator=seeded(0), dtype=torch.float64) * 1e-4
    deltas[:, 0], deltas[1, 1] = 0, 0
    alpha = torch.full((3, 4, 5), 0.3, dtype=torch.float64, requires_grad=True)
    plain = torch.optim.Adam([alpha], lr=1e-2, betas=betas)
    shift = torch.zeros(4, 5, dtype=torch.float64)
    step = coefficient_adam(shift, deltas.abs(), betas)
    for i in range(20):
        shift.grad = 1e-3 * torch.randn(4, 5, generator=seeded(i), dtype=torch.float64)
        alpha.grad = deltas * shift.grad
        step(1e-2)
        plain.step()
        expected = ((alpha - 0.3) * deltas).sum(0).detach()
        torch.testing.assert_close(shift, expected, atol=1e-12 * expected.abs().max().item(), rtol=1e-9)


def test_a_speedup_divides_the_epochs_and_keeps_the_sum_of_the_rates():
    """Rates that an optimizer notes and nothing else: 10 epochs of 2 batches, then 5, with a rise and a fall."""
    noted = []

    def start():
        noted.clear()
        return Trainable(random_params(0), dict, lambda params, betas: noted.append)

    x = torch.randn(8, 1, 3, generator=seeded(1))
    _, whole = fit(start(), x, x[..., [0, 0, 0, 0]], lr=0.1, epochs=10)
    assert noted == [0.1] * 20 and len(whole) == 10
    _, fewer = fit(start(), x, x[..., [0, 0, 0, 0]], lr=0.1, epochs=10, speedup=2)
    assert len(fewer) == 5 and noted == pytest.approx([part / 4 for part in (0.25, 0.75, 1, 1, 1, 1, 1, 1, 0.75, 0.25)])
    assert sum(noted) == pytest.approx(0.1 * 20)


def test_a_fifth_of_the_epochs_comes_near_what_all_of_them_find():
    theta_0, theta_t = random_params(0), random_params(1)
    x = torch.randn(16, 2, 3, generator=seeded(2))
    tau = {"weight": theta_t["weight"] - theta_0["weight"]}
    for start in (lambda: own_weights(theta_0), lambda: coefficients(theta_0, [tau], [0.3])):
        whole, (first, *_, last) = fit(start(), x, linear(theta_t, x), epochs=100)
        merged, trace = fit(start(), x, linear(theta_t, x), epochs=100, speedup=5)
        assert trace[-1] < 0.1 * first and len(trace) == 20
        apart = (merged["weight"] - whole["weight"]).norm() / (whole["weight"] - theta_0["weight"]).norm()
        assert apart < 0.05, last


@pytest.mark.parametrize(("width", "rows"), [(400, 100), (100, 400)])
def test_the_dry_run_foresees_the_memory_of_a_warm_start(width, rows):
    """Against the bytes alive at once, told by a ledger of all operations; three experts."""
    theta_0, *thetas = ({"weight": torch.randn(rows, width, generator=seeded(i))} for i in range(4))
    xs = [torch.randn(8, 2, width, generator=seeded(i)) for i in range(3)]
    module = torch.nn.Linear(width, rows, bias=False)
    with Ledger() as ledger:
        regmean_warm_start(linear, own_weights(theta_0), zip(thetas, xs, strict=True))
    given = 4 * rows * width  # θ_t, made before the ledger was on
    assert ledger.peak + given == pytest.approx(memory_of_warm_start(module, held=0), rel=0.2)


def test_the_warm_start_of_one_expert_is_the_expert():
    theta_0, theta_t = random_params(0), random_params(1)
    x = torch.randn(8, 2, 3, generator=seeded(2))
    tau = {"weight": theta_t["weight"] - theta_0["weight"]}
    for start in (own_weights(theta_0), coefficients(theta_0, [tau], [0.3])):
        warm = regmean_warm_start(linear, start, [(theta_t, x)])
        torch.testing.assert_close(warm.build(warm.params)["weight"], theta_t["weight"], atol=1e-5, rtol=0)


def test_the_warm_start_matches_every_expert_on_its_own_directions_alone():
    """Expert 1 has anchors along axis 0, expert 2 along axis 1, nobody along axis 2."""
    theta_0, *thetas = (random_params(i) for i in range(3))
    axes = torch.eye(3)
    warm = regmean_warm_start(linear, own_weights(theta_0), [(t, axes[i].view(1, 1, 3)) for i, t in enumerate(thetas)])
    expected = torch.stack([thetas[0]["weight"][:, 0], thetas[1]["weight"][:, 1], theta_0["weight"][:, 2]], dim=1)
    torch.testing.assert_close(warm.build(warm.params)["weight"], expected)


@pytest.mark.parametrize("ridge", [0.0, 0.3, 1e6])
def test_the_ridge_holds_the_warm_start_to_the_start(ridge):
    """Against the least squares of one tall system in float64: rows of inputs, and √(ridge · g) I for the start."""
    theta, *thetas = ({"weight": torch.randn(4, 6, generator=seeded(i))} for i in range(3))
    xs = [torch.randn(5, 2, 6, generator=seeded(9, i)) for i in range(2)]
    warm = regmean_warm_start(linear, own_weights(theta), zip(thetas, xs, strict=True), ridge)
    rows = np.vstack([x.double().flatten(0, 1).numpy() for x in xs])
    outputs = np.vstack([(x.flatten(0, 1) @ t["weight"].T).double().numpy() for x, t in zip(xs, thetas, strict=True)])
    held = np.sqrt(ridge * (rows**2).sum() / 6) * np.eye(6)
    start = theta["weight"].double().numpy()
    expected, *_ = np.linalg.lstsq(np.vstack([rows, held]), np.vstack([outputs, held @ start.T]), rcond=None)
    found = warm.build(warm.params)["weight"].double().numpy()
    np.testing.assert_allclose(found, expected.T, atol=2e-5, rtol=0)
    assert (np.abs(found - start).max() < 1e-4) == (ridge == 1e6)


def test_the_inputs_of_a_fused_projection_are_seen():
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock

    module = ResidualAttentionBlock(8, 2, act_layer=QuickGELU)
    block = OPEN_CLIP.pure(module)
    theta = {n: p.detach() + 0.1 for n, p in module.named_parameters()}
    x = torch.randn(3, 4, 8, generator=seeded(0))
    grams = input_grams(block, theta, x)
    assert {n: len(g) for n, g in grams.items()} == {
        "attn.in_proj_weight": 8, "attn.out_proj.weight": 8, "mlp.c_fc.weight": 8, "mlp.c_proj.weight": 32,
    }  # fmt: skip
    seen = torch.nn.functional.layer_norm(x, (8,), theta["ln_1.weight"], theta["ln_1.bias"]).flatten(0, 1)
    torch.testing.assert_close(grams["attn.in_proj_weight"], seen.T @ seen)


def test_a_block_without_linear_maps_has_no_warm_start():
    with pytest.raises(InputError, match="adapt.warm_start is regmean, but"):
        regmean_warm_start(
            lambda p, x: x * p["scale"],
            own_weights({"scale": torch.ones(3)}),
            [({"scale": torch.ones(3)}, torch.ones(1, 1, 3))],
        )


@pytest.mark.parametrize("method", ["pretrained", "ta"])
def test_the_closed_form_alone_is_nearer_to_the_experts_than_the_start(pico_config, method):
    quiet = replace(
        pico_config, run=replace(pico_config.run, score=False), start=replace(pico_config.start, method=method)
    )
    construct(quiet, domain)
    losses = {}
    for warm_start in ("none", "regmean"):  # steps too small to matter; the block waits for the other one
        settings = replace(quiet.adapt, warm_start=warm_start, label=warm_start, lr=1e-9, epochs=1, by_start={})
        of_one = replace(quiet, adapt=settings, run=replace(quiet.run, blocks=[0]))
        assert adapt(of_one, domain) is None
        folder = RunLayout(of_one).adapted
        losses[warm_start] = read_header(folder / "blocks" / "block_00.safetensors")["trace"][0]
    assert losses["regmean"] < 0.5 * losses["none"]
    closed = replace(quiet, adapt=replace(quiet.adapt, warm_start="regmean", epochs=0, label="closed"))
    assert (adapt(closed, domain) / "open_clip_model.safetensors").is_file()
    with pytest.raises(InputError, match=r"adapt.ridge = 0.*, now it is 0.5"):
        adapt(replace(closed, adapt=replace(closed.adapt, ridge=0.5)), domain)
