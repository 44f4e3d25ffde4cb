"""bf16 rounds products, and of two blocks that are nearly alike it rounds the difference, not the outputs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.core.blocks import BlockFamily
from common.core.seeding import seeded
from common.core.task_vectors import subtract
from common.fda import precision
from common.fda.matching import MatchingProblem, matching_gradient, plain_forward
from common.fda.precision import effective_precision, forward_in, in_precision
from common.run.device import prepare
from helpers import linear

CPU = prepare("cpu")


@pytest.fixture(autouse=True)
def small_maps_too(monkeypatch):
    monkeypatch.setattr(precision, "FEW", 0)


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
    y, _ = forward_in("bf16")(linear, weight, weight, x)
    assert y.item() == 1 and y.dtype == torch.float32
    y, _ = forward_in("bf16")(lambda params, x: x + params["weight"], weight, weight, x)
    assert y.item() == 1 + 1 + 2**-9
    assert forward_in("float32") is forward_in("tf32") is plain_forward


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [("tf32", "cuda", "high"), ("tf32", "cpu", "highest"), ("bf16", "cuda", "highest")],
)
def test_tf32_is_switched_on_for_a_gpu_and_off_again(precision, device, expected):
    with in_precision(precision, torch.device(device)):
        assert torch.get_float32_matmul_precision() == expected
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_task_vector_below_the_rounding_of_its_weights_is_seen():
    """θ_t is bf16's 1 throughout, and x is exact, so that in bf16 its output alone would be that of θ₀."""
    theta_0, theta_t = {"weight": torch.ones(4, 4)}, {"weight": torch.ones(4, 4) + 2**-12 * torch.eye(4)}
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    y_0, y_t = forward_in("bf16")(linear, theta_0, theta_t, x)
    assert torch.equal(y_t - y_0, 2**-12 * x)


@pytest.mark.parametrize("relative", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("chunk", [None, 4])
def test_the_matching_gradient_of_small_task_vectors_is_that_of_float32(relative, chunk):
    block, theta_0, theta_t, x = block_and_tasks(relative)
    setting = MatchingProblem(block, theta_0, theta_t, subtract(theta_t, theta_0)), x
    with sdpa_kernel(SDPBackend.MATH):
        loss_P, expected = matching_gradient(*setting)
        low_P, found = matching_gradient(*setting, chunk=chunk, forward=forward_in("bf16"))
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999
    torch.testing.assert_close(low_P, loss_P, rtol=0, atol=0.02)


def test_autocast_would_not_do():
    """What the test above guards against: each output rounded on its own."""
    block, theta_0, theta_t, x = block_and_tasks(1e-3)

    def rounded(params, x_ATD):
        with torch.autocast("cpu", torch.bfloat16):
            return block(params, x_ATD).float()

    tau = subtract(theta_t, theta_0)
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = matching_gradient(MatchingProblem(block, theta_0, theta_t, tau), x)
        _, found = matching_gradient(MatchingProblem(rounded, theta_0, theta_t, tau), x)
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) < 0.9


@pytest.mark.parametrize(
    ("asked", "device", "flags", "expected"),
    [
        ("bf16", "cpu", {"avx2": True, "amx_bf16": False}, "float32"),
        ("bf16", "cpu", {"avx512_bf16": True, "cpu_name": "AMD EPYC"}, "bf16"),
        ("bf16", "cpu", {"avx512_bf16": True, "cpu_name": "Intel Xeon"}, "float32"),
        ("bf16", "cpu", {"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, "bf16"),
        ("bf16", "cuda", {}, "bf16"),
        ("tf32", "cpu", {}, "tf32"),
    ],
)
def test_a_cpu_takes_bf16_where_it_is_faster(asked, device, flags, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert (
        effective_precision(asked, torch.device(device), {"weight": torch.ones(1, 1)}, torch.ones(1, 1, 1)) == expected
    )


def test_torchs_linear_is_itself_again_also_after_a_failure():
    usual = F.linear

    def fails(params, x):
        F.linear(x, params["weight"])
        raise ValueError

    with pytest.raises(ValueError):
        forward_in("bf16")(fails, {"weight": torch.ones(2, 2)}, {"weight": torch.ones(2, 2)}, torch.ones(1, 1, 2))
    assert F.linear is usual
    assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


def test_small_products_stay_in_float32(monkeypatch):
    x, weight = torch.tensor([[[1 + 2**-9]] * 2]), {"weight": torch.ones(4, 1)}
    for few, expected in ((9, 1 + 2**-9), (8, 1)):
        monkeypatch.setattr(precision, "FEW", few)
        for y in forward_in("bf16")(linear, weight, weight, x):
            assert y.unique().item() == expected
        gpu = torch.device("cuda")  # on a CPU it depends on the instructions
        assert effective_precision("bf16", gpu, weight, x) == ("float32" if few == 9 else "bf16")
        assert effective_precision("tf32", gpu, weight, x) == "tf32"


def test_chunks_too_small_for_bf16_find_the_weights_of_their_maps(monkeypatch):
    """Of chunks of 4 and 2 anchors the second leaves some of the maps in float32; each uses its own weights."""
    block, theta_0, theta_t, x = block_and_tasks(1e-2)
    setting = MatchingProblem(block, theta_0, theta_t, subtract(theta_t, theta_0)), x
    monkeypatch.setattr(precision, "FEW", 10 * 64 * 4 * 64 + 1)  # of 2 anchors' rows, the MLP's
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = matching_gradient(*setting)
        forward = forward_in("bf16")
        for _ in range(2):
            _, found = matching_gradient(*setting, chunk=4, forward=forward)
            assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999


def test_weights_are_rounded_once():
    block, theta_0, theta_t, x = block_and_tasks(1e-2)
    forward = forward_in("bf16")
    first = forward(block, theta_0, theta_t, x)
    kept = {key: (low.data_ptr(), low.dtype) for key, low in forward.low.items()}
    again = forward(block, theta_0, theta_t, x)
    assert {key: (low.data_ptr(), low.dtype) for key, low in forward.low.items()} == kept
    assert {dtype for _, dtype in kept.values()} == {torch.bfloat16} and len(kept) == 2 * 4
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
