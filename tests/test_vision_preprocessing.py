"""How images are prepared for CLIPs: what says it, and what experts that were trained on others are answered."""

import json

import open_clip
import pytest

from common.config import Model
from common.core.errors import InputError
from Vision.clip_config import compare, config_text, preprocess_of, resolve
from Vision.open_clip_models import skeleton

SIGLIP = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


@pytest.mark.parametrize("arch", ["ViT-B-32", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2"])
def test_a_named_architecture_prepares_images_as_its_pretrained_weights(arch, tmp_path, capsys):
    """Also in the file that is written beside merged weights."""
    model = Model(arch=arch, base=str(tmp_path))
    expected = open_clip.get_pretrained_cfg(arch, open_clip.list_pretrained_tags_by_model(arch)[0])
    ours = skeleton(model).visual.preprocess_cfg
    written = json.loads(config_text(model, ours))["preprocess_cfg"]
    for key in ("mean", "std", "interpolation", "resize_mode"):
        assert tuple(ours[key]) == tuple(expected[key]) and tuple(written[key]) == tuple(expected[key])
    assert ours["size"] in (224, (224, 224)) and not capsys.readouterr().err


def test_where_pretrained_weights_of_a_name_differ_a_warning_says_so(tmp_path, capsys):
    assert preprocess_of(Model(arch="ViT-L-14", base=str(tmp_path)))["mean"][0] == pytest.approx(0.48145466)
    said = "weights laion2b_s32b_b82k had mean [0.5, 0.5, 0.5], not [0.48145466, 0.4578275, 0.40821073]; std [0.5, "
    assert said in capsys.readouterr().err


def test_the_config_beside_the_base_goes_before_the_name_of_an_architecture(tmp_path, capsys):
    """In the layout of a folder that open_clip saves: its own mean, std and way to resize."""
    named = open_clip.get_model_config("ViT-L-14")
    file = tmp_path / "open_clip_config.json"
    file.write_text(json.dumps({"model_cfg": named, "preprocess_cfg": SIGLIP | {"size": [3, 224, 224]}}))
    model = Model(arch="ViT-L-14", base=str(tmp_path))
    assert {key: skeleton(model).visual.preprocess_cfg[key] for key in SIGLIP} == SIGLIP
    ours = resolve({"model_cfg": named, "preprocess_cfg": preprocess_of(model)}, "model.arch")
    compare(ours, "model.arch", {"model.base": tmp_path})
    assert "prepared" not in capsys.readouterr().err


def test_an_expert_prepared_otherwise_than_the_named_architecture_is_refused(tmp_path):
    named = open_clip.get_model_config("ViT-B-16-SigLIP")
    preprocess = preprocess_of(Model(arch="ViT-B-16-SigLIP", base=str(tmp_path)))
    file = tmp_path / "open_clip_config.json"
    ours = resolve({"model_cfg": named, "preprocess_cfg": preprocess}, "model.arch")
    file.write_text(json.dumps({"model_cfg": named, "preprocess_cfg": SIGLIP}))
    compare(ours, "model.arch", {"MNIST": tmp_path})
    file.write_text(json.dumps({"model_cfg": named, "preprocess_cfg": {}}))
    with pytest.raises(InputError, match=r"preprocess_cfg.mean.0 is 0.48145466, not 0.5"):
        compare(ours, "model.arch", {"MNIST": tmp_path})
