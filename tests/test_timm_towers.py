"""Image towers that open_clip takes from timm, SigLIP's among them: merged, adapted and scored like its own."""

import json

import open_clip
import pytest
import torch

from common.core.errors import InputError
from common.io.checkpoints import Checkpoint
from common.opening import open_experiment
from common.pipeline import adapt, construct
from common.planning.dry_run import describe
from helpers import change, rewrite
from pico_vision import PICO_TASKS, TIMM, write_pico_clip
from Vision import domain


@pytest.fixture
def timm_config(pico_config, tmp_path):
    """A base as open_clip writes SigLIP, and experts that are image towers near it."""
    root = tmp_path / "timm"
    write_pico_clip(root, fields=TIMM)
    return change(pico_config, "model", root=str(root))


def test_a_vit_of_timm_is_merged_adapted_and_scored(timm_config):
    construct(timm_config, domain)
    folder = adapt(change(timm_config, "start", method="ta"), domain)
    clip = open_clip.create_model(f"local-dir:{folder}")
    assert clip.encode_image(torch.zeros(1, 3, 16, 16)).isfinite().all()
    rows = json.loads((timm_config.run.dir / "results.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"pretrained", "individual", "ta", "fda"}
    merged, name = Checkpoint(folder.parent / "ta"), "visual.trunk.blocks.0.mlp.fc1.weight"
    base, *experts = (
        Checkpoint(timm_config.model.path(which, task)).read([name])[name]
        for which, task in (("base", ""), *(("expert", task) for task in PICO_TASKS))
    )
    torch.testing.assert_close(merged.read([name])[name], base + 0.3 * sum(expert - base for expert in experts))
    assert "x visual.trunk.blocks.N, " in describe(timm_config, domain).text


def test_a_block_is_timm_s_and_its_key_bias_moves_nothing(timm_config):
    experiment = open_experiment(timm_config, domain)
    clip = open_clip.create_model(f"local-dir:{timm_config.model.path('base')}").eval()
    _, tokens, width = experiment.shape
    x_ATD = torch.randn(2, tokens, width)
    theta_0 = experiment.read_block(experiment.base, 1)
    expected = clip.visual.trunk.blocks[1](x_ATD)
    torch.testing.assert_close(experiment.functions[1](theta_0, x_ATD), expected)
    theta = {name: p.clone().requires_grad_() for name, p in theta_0.items()}
    target = torch.randn_like(x_ATD)
    (experiment.functions[1](theta, x_ATD) - target).square().sum().backward()
    gradient = theta["attn.qkv.bias"].grad.chunk(3)
    assert gradient[1].abs().max() < 1e-4 < gradient[0].abs().max()


def test_a_tower_of_timm_without_blocks_is_refused(timm_config):
    other = TIMM | {"vision_cfg": TIMM["vision_cfg"] | {"timm_model_name": "test_convnext", "image_size": 64}}
    base = timm_config.model.path("base")
    (base / "open_clip_config.json").write_text(json.dumps({"model_cfg": other, "preprocess_cfg": {}}))
    rewrite(base / "open_clip_model.safetensors", lambda t: [t.pop(n) for n in list(t) if "blocks" in n])
    with pytest.raises(InputError, match="image tower of timm that is no ViT .*or a ViT of timm, can be merged"):
        construct(timm_config, domain)


@pytest.mark.parametrize(
    ("tower", "said"),
    [
        (
            {"timm_model_name": "test_vit2", "image_size": 24},
            "its image tower cannot see images of 24 x 24 pixels, the",
        ),
        ({"timm_model_name": "vit_relpos_small_patch16_224"}, "is timm's VisionTransformerRelPos; vision anchors"),
    ],
)
def test_a_tower_that_cannot_be_called_is_refused_by_what_it_is(timm_config, tower, said):
    base = timm_config.model.path("base")
    fields = TIMM | {"vision_cfg": TIMM["vision_cfg"] | tower}
    (base / "open_clip_config.json").write_text(json.dumps({"model_cfg": fields, "preprocess_cfg": {}}))
    with pytest.raises(InputError, match=said):
        construct(timm_config, domain)
