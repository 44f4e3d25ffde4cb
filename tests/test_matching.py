"""The matching loss against closed forms, plain autograd and finite differences, all in float64."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.core.task_vectors import subtract
from common.fda.matching import (
    DISTANCES,
    WEIGHTS,
    MatchingProblem,
    direction_cosine,
    matching_gradient,
    matching_loss,
    matching_value,
)
from helpers import linear
from Vision.open_clip_models import OPEN_CLIP


@pytest.fixture
def pico_block():
    """A CLIP block of width 8 with random weights before and after fine-tuning, and three anchors of four tokens."""
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock

    torch.manual_seed(0)
    module = ResidualAttentionBlock(8, 2, act_layer=QuickGELU).double()
    theta_0 = {n: torch.randn_like(p) * 0.3 for n, p in module.named_parameters()}
    theta_t = {n: p + torch.randn_like(p) * 0.05 for n, p in theta_0.items()}
    with sdpa_kernel(SDPBackend.MATH):
        yield OPEN_CLIP.pure(module), theta_0, theta_t, torch.randn(3, 4, 8, dtype=torch.float64)


@pytest.mark.parametrize("distance", DISTANCES)
def test_loss_is_one_minus_cosine_per_tensor(pico_block, distance):
    block, theta_0, theta_t, x = pico_block
    theta = {n: p.clone().requires_grad_() for n, p in theta_0.items()}
    y, target = block(theta, x).reshape(3, -1), block(theta_t, x).reshape(3, -1)
    similarity = {
        "cos": F.cosine_similarity(y, target).mean(),
        "mse": -((y - target) ** 2).mean(),
        "l1": -(y - target).abs().mean(),
    }[distance]
    similarity.backward()
    expected = [
        1 - theta[n].grad.flatten() @ t.flatten() / (theta[n].grad.norm() * t.norm())
        for n, t in subtract(theta_t, theta_0).items()
    ]
    found = matching_loss(MatchingProblem(block, theta_0, theta_t, subtract(theta_t, theta_0)), x, distance=distance)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize("distance", ["cos", "mse"])  # l1 has no second derivative to speak of
def test_gradient_in_the_anchors_agrees_with_central_differences(pico_block, distance):
    block, theta_0, theta_t, x = pico_block
    problem = MatchingProblem(block, theta_0, theta_t, subtract(theta_t, theta_0))

    def loss(x_ATD):
        return matching_loss(problem, x_ATD, distance=distance).sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    h = 1e-6
    for place in [(0, 0, 0), (1, 3, 5), (2, 1, 7)]:
        nudge = torch.zeros_like(x).index_put_(tuple(map(torch.tensor, place)), torch.tensor(h, dtype=x.dtype))
        difference = (loss(x + nudge) - loss(x - nudge)) / (2 * h)
        assert abs(difference.item() - gradient[place].item()) < 1e-6


def test_one_anchor_of_a_linear_layer_matches_its_first_singular_value():
    """Squared distance: the gradient is −ΔW x xᵀ, so the best cosine is s₁/‖ΔW‖ at the first right singular vector."""
    torch.manual_seed(0)
    theta_0 = {"weight": torch.randn(6, 5, dtype=torch.float64)}
    theta_t = {"weight": theta_0["weight"] + torch.randn(6, 5, dtype=torch.float64)}
    tau = subtract(theta_t, theta_0)
    problem = MatchingProblem(linear, theta_0, theta_t, tau)
    _, s, vh = torch.linalg.svd(tau["weight"])
    at_best = matching_loss(problem, vh[0][None, None], distance="mse")
    assert at_best.item() == pytest.approx(1 - (s[0] / tau["weight"].norm()).item(), abs=1e-12)
    elsewhere = matching_loss(problem, vh[1][None, None], distance="mse")
    assert elsewhere.item() == pytest.approx(1 - (s[1] / tau["weight"].norm()).item(), abs=1e-12)
    assert at_best < elsewhere


def test_orthonormal_anchors_of_a_linear_layer_match_perfectly():
    """With as many anchors as inputs and XXᵀ ∝ I the gradient is −ΔW itself: descent, not ascent, is along τ."""
    torch.manual_seed(0)
    theta_0 = {"weight": torch.randn(6, 5, dtype=torch.float64)}
    theta_t = {"weight": torch.randn(6, 5, dtype=torch.float64)}
    x = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0][:, None]
    loss = matching_loss(MatchingProblem(linear, theta_0, theta_t, subtract(theta_t, theta_0)), x, distance="mse")
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_direction_cosine_does_not_notice_how_small_a_gradient_is():
    g, tau = torch.tensor([3e-15, 4e-15]), torch.tensor([3.0, 4.0])
    assert direction_cosine(g, tau).item() == pytest.approx(1, abs=1e-6)
    assert direction_cosine(torch.zeros(2), tau).item() == 0


def test_tensors_left_out_of_tau_do_not_count(pico_block):
    block, theta_0, theta_t, x = pico_block
    tau = subtract(theta_t, theta_0)
    whole = matching_loss(MatchingProblem(block, theta_0, theta_t, tau), x)
    some = {n: tau[n] for n in ("ln_2.weight", "mlp.c_fc.bias")}
    names = list(tau)
    expected = torch.stack([whole[names.index(n)] for n in some])
    torch.testing.assert_close(matching_loss(MatchingProblem(block, theta_0, theta_t, some), x), expected)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_loss_and_gradient_do_not_depend_on_the_anchors_in_memory(pico_block, chunk):
    block, theta_0, theta_t, x = pico_block
    problem = MatchingProblem(block, theta_0, theta_t, subtract(theta_t, theta_0))
    x.requires_grad_()
    expected = matching_loss(problem, x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    loss_P, found = matching_gradient(problem, x, chunk=chunk)
    torch.testing.assert_close(loss_P, expected.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found, gradient, atol=1e-12, rtol=0)
    value = matching_value(problem, x, chunk=chunk)
    torch.testing.assert_close(value, expected.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("weights", ["size", "norm"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_weights_of_tensors_by_hand(pico_block, weights, chunk):
    """Σ_p w_p (1 − cos_p) with w_p in parts of their mean, and its gradient, by torch's own cosine and autograd."""
    block, theta_0, theta_t, x = pico_block
    tau = subtract(theta_t, theta_0)
    sizes = [float(t.numel() if weights == "size" else (t**2).sum() ** 0.5) for t in tau.values()]
    theta = {n: p.clone().requires_grad_() for n, p in theta_0.items()}
    x.requires_grad_()
    distance = (1 - F.cosine_similarity(block(theta, x).reshape(3, -1), block(theta_t, x).reshape(3, -1))).sum()
    gradients = torch.autograd.grad(distance, [theta[n] for n in tau], create_graph=True)
    pairs = zip(gradients, tau.values(), sizes, strict=True)
    terms = [s * (1 + F.cosine_similarity(g.flatten(), t.flatten(), 0, eps=0)) for g, t, s in pairs]
    expected = torch.stack(terms) * len(sizes) / sum(sizes)
    (by_x,) = torch.autograd.grad(expected.sum(), x)
    problem = MatchingProblem(block, theta_0, theta_t, tau, weights=weights)
    loss_P, found = matching_gradient(problem, x, chunk=chunk)
    for loss in (loss_P, matching_loss(problem, x), matching_value(problem, x, chunk=chunk)):
        torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, by_x, atol=1e-12, rtol=0)


def test_weights_of_equal_tensors_change_nothing():
    torch.manual_seed(0)
    theta_0, tau = ({"weight": torch.randn(6, 5)} for _ in range(2))
    theta_t, x = {"weight": theta_0["weight"] + tau["weight"]}, torch.randn(3, 1, 5)
    found = [matching_gradient(MatchingProblem(linear, theta_0, theta_t, tau, weights=w), x) for w in WEIGHTS]
    assert len(found) == 3
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], atol=0, rtol=0)


@pytest.mark.parametrize("chunk", [None, 2])
def test_the_block_sees_the_anchors_with_the_offset_added(pico_block, chunk):
    block, theta_0, theta_t, x = pico_block
    tau, offset = subtract(theta_t, theta_0), torch.randn(4, 8, dtype=torch.float64)
    plain, shifted = (MatchingProblem(block, theta_0, theta_t, tau, *more) for more in ((), (offset,)))
    torch.testing.assert_close(matching_loss(shifted, x), matching_loss(plain, x + offset), atol=0, rtol=0)
    found, expected = (matching_gradient(p, y, chunk=chunk) for p, y in ((shifted, x), (plain, x + offset)))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    values = (matching_value(p, y, chunk=chunk) for p, y in ((shifted, x), (plain, x + offset)))
    torch.testing.assert_close(*values, atol=0, rtol=0)
