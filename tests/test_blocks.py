"""Block families: purity, null gradients, and the real models' shapes (FACTS: 50, 197, 257 tokens)."""

import pytest
import torch

from common.config import Model
from common.core.blocks import BlockFamily, nonzero_tensors
from common.fda.matching import cosine
from Vision import domain
from Vision.open_clip_models import OPEN_CLIP


def test_without_null_gradients_clears_one_group_of_rows():
    family = BlockFamily(blocks="b", null_gradients={"fused": (1, 3), "gone": (0, 1)})
    tau = {"fused": torch.arange(1.0, 7), "gone": torch.ones(2), "other": torch.ones(2)}
    cleaned = family.without_null_gradients(tau)
    assert cleaned["fused"].tolist() == [1, 2, 0, 0, 5, 6]
    assert list(nonzero_tensors(cleaned)) == ["fused", "other"]
    assert tau["fused"].tolist() == [1, 2, 3, 4, 5, 6], "the argument must stay as it is"


def test_the_key_bias_of_clip_has_no_gradient_and_is_left_out():
    from open_clip.transformer import ResidualAttentionBlock

    torch.manual_seed(0)
    module = ResidualAttentionBlock(8, 2).double()
    family = OPEN_CLIP
    theta = {n: torch.randn_like(p).requires_grad_() for n, p in module.named_parameters()}
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    cosine(family.pure(module)(theta, x), torch.randn(3, 4, 8, dtype=torch.float64)).backward()
    gradient = theta["attn.in_proj_bias"].grad
    assert gradient[8:16].abs().max() < 1e-15 < gradient[:8].abs().max()
    kept = family.without_null_gradients({"attn.in_proj_bias": torch.ones(24)})["attn.in_proj_bias"]
    assert kept.tolist() == [1] * 8 + [0] * 8 + [1] * 8


@pytest.mark.parametrize(
    ("arch", "tokens", "width", "depth", "block_size"),
    [
        ("ViT-B-32-quickgelu", 50, 768, 12, 7_087_872),
        ("ViT-B-16-quickgelu", 197, 768, 12, 7_087_872),
        ("ViT-L-14-quickgelu", 257, 1024, 24, 12_596_224),
    ],
)
def test_the_papers_models_have_the_papers_shapes(arch, tokens, width, depth, block_size):
    model = Model(arch=arch)
    assert domain.token_shape(model) == (tokens, width)
    blocks = [m for _, m in domain.family(model).modules(domain.skeleton(model))]
    parameters = dict(blocks[0].named_parameters())
    assert (len(blocks), len(parameters)) == (depth, 12)
    assert sum(p.numel() for p in parameters.values()) == block_size
    assert all(p.is_meta for p in parameters.values())
    assert type(blocks[0].mlp.gelu).__name__ == "QuickGELU"
