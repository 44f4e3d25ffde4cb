"""How images are prepared for CLIPs: what says it, and what experts that were trained on others are answered."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from common.config import Model
from common.core import notices
from common.core.errors import InputError
from common.pipeline import construct
from common.planning.dry_run import describe
from helpers import change, rewrite
from pico_hf_vision import pico_hf_config, write_pico_hf
from pico_lora import write_adapter
from pico_vision import PICO_TASKS, write_pico_clip
from Vision import domain
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


def test_the_config_beside_the_base_goes_before_model_arch(tmp_path, capsys):
    """In the layout of a folder that open_clip saves: its own mean, std and way to resize."""
    named = open_clip.get_model_config("ViT-L-14")
    file = tmp_path / "open_clip_config.json"
    file.write_text(json.dumps({"model_cfg": named, "preprocess_cfg": SIGLIP | {"size": [3, 224, 224]}}))
    model = Model(arch="ViT-L-14", base=str(tmp_path))
    assert {key: skeleton(model).visual.preprocess_cfg[key] for key in SIGLIP} == SIGLIP
    ours = resolve({"model_cfg": named, "preprocess_cfg": preprocess_of(model)}, "model.arch")
    compare(ours, "model.arch", {"model.base": tmp_path})
    assert "prepared" not in capsys.readouterr().err


def test_an_expert_prepared_otherwise_than_model_arch_is_refused(tmp_path):
    named = open_clip.get_model_config("ViT-B-16-SigLIP")
    preprocess = preprocess_of(Model(arch="ViT-B-16-SigLIP", base=str(tmp_path)))
    file = tmp_path / "open_clip_config.json"
    ours = resolve({"model_cfg": named, "preprocess_cfg": preprocess}, "model.arch")
    file.write_text(json.dumps({"model_cfg": named, "preprocess_cfg": SIGLIP}))
    compare(ours, "model.arch", {"MNIST": tmp_path})
    file.write_text(json.dumps({"model_cfg": named, "preprocess_cfg": {}}))
    with pytest.raises(InputError, match=r"preprocess_cfg.mean.0 is 0.48145466, not 0.5"):
        compare(ours, "model.arch", {"MNIST": tmp_path})


def test_an_expert_with_images_prepared_otherwise_is_refused(tmp_path, pico_inputs, capsys):
    write_pico_hf(tmp_path, "clip", alone=False)
    config = pico_hf_config(tmp_path, pico_inputs / "data")
    same = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**same).save_pretrained(tmp_path / "MNIST")
    describe(config, domain)
    for field, value in (("image_mean", [0.5] * 3), ("do_center_crop", False), ("resample", 0)):
        CLIPImageProcessor(**same | {field: value}).save_pretrained(tmp_path / "SVHN")
        with pytest.raises(InputError, match=rf"SVHN prepares an image otherwise than .*base \({field} is .*, there "):
            construct(config, domain)
    assert "warning:" not in capsys.readouterr().err


def noisy_text(tensors):
    """A text tower, in whatever layout, that was trained."""
    return {n: t + 0.1 if n.startswith(("text_model.encoder", "transformer.")) else t for n, t in tensors.items()}


@pytest.mark.parametrize("kind", ["open_clip", "clip"])
def test_what_experts_have_besides_the_image_tower_is_said(
    kind, tmp_path, pico_inputs, pico_config, capsys, monkeypatch
):
    monkeypatch.setattr(notices, "_said", set())
    if kind == "clip":
        write_pico_hf(tmp_path, "clip", alone=False)
        config, files = pico_hf_config(tmp_path, pico_inputs / "data"), "{}/model.safetensors"
    else:
        write_pico_clip(tmp_path)
        config, files = change(pico_config, "model", root=str(tmp_path)), "{}/finetuned.safetensors"
        base = load_file(tmp_path / "base" / "open_clip_model.safetensors")
        for task in PICO_TASKS:
            rewrite(tmp_path / files.format(task), lambda t, base=base: base | t)
    rewrite(tmp_path / files.format("MNIST"), lambda t: {n: x.half() if "ln" in n else x for n, x in t.items()})
    describe(config, domain)
    assert "warning:" not in capsys.readouterr().err
    rewrite(tmp_path / files.format("SVHN"), lambda t: noisy_text(t) | {"classifier.weight": torch.ones(3, 16)})
    describe(config, domain)
    said = capsys.readouterr().err
    assert "warning: SVHN: there is a text tower unlike the base's, such as t" in said and "model.head can name" in said
    assert "SVHN: there are tensors that are no part of the base's model, such as classifier.weight: image" in said


def test_an_adapter_of_both_towers_is_merged_in_one_and_a_warning_says_so(tmp_path, pico_inputs, capsys):
    write_pico_hf(tmp_path, "clip")
    shutil.rmtree(tmp_path / "SVHN")
    pairs = {}
    for tower in ("vision_model", "text_model"):
        module = f"{tower}.encoder.layers.0.self_attn.q_proj"
        pairs |= {f"{module}.lora_A.weight": np.ones((2, 16), "f4"), f"{module}.lora_B.weight": np.ones((16, 2), "f4")}
    write_adapter(tmp_path / "SVHN", pairs)
    describe(pico_hf_config(tmp_path, pico_inputs / "data"), domain)
    said = "SVHN: there is a text tower unlike the base's, such as text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert said in capsys.readouterr().err
