"""bf16 rounds products, and of two blocks that are nearly alike it rounds the difference, not the answers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import precision
from common.anchors import seeded
from common.blocks import BlockFamily
from common.matching import matching_gradient, side_by_side
from common.precision import in_precision
from common.runtime import prepare
from common.task_vectors import subtract

CPU = prepare("cpu")


@pytest.fixture(autouse=True)
def small_maps_too(monkeypatch):
    monkeypatch.setattr(precision, "FEW", 0)


def linear(params, x):
    return F.linear(x, params["weight"])


def block_and_tasks(relative):
    """A transformer block of open_clip, θ₀, a θ_t that differs by `relative`, and anchors."""
    from open_clip.transformer import ResidualAttentionBlock

    generator = seeded(0)
    module = ResidualAttentionBlock(64, 4)
    theta_0 = {n: torch.randn(p.shape, generator=generator) / 8 for n, p in module.named_parameters()}
    theta_t = {n: p + relative * p.std() * torch.randn(p.shape, generator=generator) for n, p in theta_0.items()}
    return BlockFamily("").pure(module), theta_0, theta_t, torch.randn(6, 5, 64, generator=generator)


def test_bf16_rounds_products_and_nothing_else():
    """2⁻⁸ is lost beside 1 in bfloat16: the product sees 1, the sum that is no product sees all."""
    x, weight = torch.tensor([[[1 + 2**-9]]]), {"weight": torch.ones(1, 1)}
    with in_precision("bf16", CPU) as answers:
        y, _ = answers(linear, weight, weight, x)
        assert y.item() == 1 and y.dtype == torch.float32
        y, _ = answers(lambda params, x: x + params["weight"], weight, weight, x)
        assert y.item() == 1 + 1 + 2**-9
    with in_precision("float32", CPU) as answers:
        assert answers is side_by_side
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_task_vector_below_the_rounding_of_its_weights_is_seen():
    """θ_t is bf16's 1 throughout, and x is exact, so an answer of its own would be that of θ₀."""
    theta_0, theta_t = {"weight": torch.ones(4, 4)}, {"weight": torch.ones(4, 4) + 2**-12 * torch.eye(4)}
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    with in_precision("bf16", CPU) as answers:
        y_0, y_t = answers(linear, theta_0, theta_t, x)
    assert torch.equal(y_t - y_0, 2**-12 * x)


@pytest.mark.parametrize("relative", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("chunk", [None, 4])
def test_the_matching_gradient_is_that_of_float32_however_small_the_task_vector(relative, chunk):
    block, theta_0, theta_t, x = block_and_tasks(relative)
    setting = block, theta_0, theta_t, subtract(theta_t, theta_0), x
    with sdpa_kernel(SDPBackend.MATH):
        loss_P, expected = matching_gradient(*setting)
        with in_precision("bf16", CPU) as answers:
            low_P, found = matching_gradient(*setting, chunk=chunk, answers=answers)
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999
    torch.testing.assert_close(low_P, loss_P, rtol=0, atol=0.02)


def test_autocast_would_not_do():
    """What the test above guards against: each answer rounded for itself."""
    block, theta_0, theta_t, x = block_and_tasks(1e-3)

    def rounded(params, x_ATD):
        with torch.autocast("cpu", torch.bfloat16):
            return block(params, x_ATD).float()

    tau = subtract(theta_t, theta_0)
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = matching_gradient(block, theta_0, theta_t, tau, x)
        _, found = matching_gradient(rounded, theta_0, theta_t, tau, x)
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) < 0.9


def test_torchs_linear_is_itself_again_also_after_a_failure():
    usual = F.linear

    def fails(params, x):
        F.linear(x, params["weight"])
        raise ValueError

    with in_precision("bf16", CPU) as answers, pytest.raises(ValueError):
        answers(fails, {"weight": torch.ones(2, 2)}, {"weight": torch.ones(2, 2)}, torch.ones(1, 1, 2))
    assert F.linear is usual
    assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


def test_small_maps_stay_in_float32(monkeypatch):
    monkeypatch.setattr(precision, "FEW", 5)
    x, weight = torch.tensor([[[1 + 2**-9]]]), {"weight": torch.ones(4, 1)}
    with in_precision("bf16", CPU) as answers:
        assert all(y[..., 0].item() == 1 + 2**-9 for y in answers(linear, weight, weight, x))
    monkeypatch.setattr(precision, "FEW", 4)
    with in_precision("bf16", CPU) as answers:
        assert answers(linear, weight, weight, x)[0][..., 0].item() == 1
