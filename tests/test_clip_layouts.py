"""A CLIP of open_clip with experts of transformers, and the reverse: the same merges, written as the base is."""

import json
import re
import shutil
from dataclasses import replace

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, CLIPImageProcessor

from common.core.errors import InputError
from common.io.checkpoints import write_tensors
from common.opening import open_experiment
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import describe
from helpers import change, edit_config, files_of, rewrite
from pico_hf_vision import pico_hf_config
from pico_layouts import in_open_clip, write_both
from pico_vision import PICO_TASKS
from Vision import domain, layouts

CPU = torch.device("cpu")


def mixed(tmp_path, data, base, experts, alone=True):
    """(stock CLIPModels by name, a config with the base in one layout and the experts in another)."""
    models = write_both(tmp_path, alone)
    config = change(pico_hf_config(tmp_path, data), "run", score=False)
    return models, change(config, "model", base=f"{base}/base", expert=experts + "/{task}")


@pytest.mark.parametrize(
    ("base", "experts", "alone"),
    [("open_clip", "hf", True), ("open_clip", "hf", False), ("hf", "open_clip", True)],
    ids=["towers-of-transformers", "models-of-transformers", "models-of-open-clip"],
)
def test_ta_of_the_other_layout_is_ta_by_hand(base, experts, alone, tmp_path, pico_inputs):
    models, config = mixed(tmp_path, pico_inputs / "data", base, experts, alone)
    folder = merge_alone(change(config, "start", method="ta"), domain)
    states = [models[name].state_dict() for name in ("base", *PICO_TASKS)]
    expected = {n: t + 0.3 * sum(s[n] - t for s in states[1:]) for n, t in states[0].items() if t.is_floating_point()}
    if base == "hf":
        merged = AutoModel.from_pretrained(folder).state_dict()
    else:
        merged, expected = open_clip.create_model(f"local-dir:{folder}").state_dict(), in_open_clip(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)
    write_tensors(tmp_path / "head_MNIST.safetensors", {"weight": torch.randn(10, 8)})
    config = change(config, "model", head="head_{task}.safetensors")
    score = dict(domain.score(config, "MNIST", {"x": config.model.path("expert", "MNIST")}, CPU))["x"]
    same = change(config, "model", expert=base + "/{task}")
    assert dict(domain.score(same, "MNIST", {"x": same.model.path("expert", "MNIST")}, CPU))["x"] == score


@pytest.mark.parametrize(("base", "experts"), [("open_clip", "hf"), ("hf", "open_clip")])
def test_anchors_and_what_is_fitted_do_not_hang_on_the_experts_layout(base, experts, tmp_path, pico_inputs):
    """Bit by bit: a weight is the same number wherever it is stored."""
    _, config = mixed(tmp_path, pico_inputs / "data", base, experts)
    same = change(change(config, "model", expert=base + "/{task}"), "run", name="same")
    for each in (config, same):
        construct(each, domain)
        adapt(change(each, "start", method="ta"), domain)
    for folder, pattern in (("anchors", "*.safetensors"), ("merged", "*model.safetensors")):
        ours, theirs = (files_of(each.run.dir / folder, pattern) for each in (config, same))
        assert ours == theirs and ours


def test_a_file_without_a_config_is_read_by_its_names(tmp_path, pico_inputs):
    models, config = mixed(tmp_path, pico_inputs / "data", "hf", "open_clip")
    for task in PICO_TASKS:
        shutil.copyfile(tmp_path / "open_clip" / task / "open_clip_model.safetensors", tmp_path / f"{task}.safetensors")
    experiment = open_experiment(change(config, "model", expert="{task}.safetensors"), domain)
    name = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    read = experiment.experts["SVHN"].read([name])[name]
    torch.testing.assert_close(read, models["SVHN"].state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize(("base", "experts"), [("open_clip", "hf"), ("hf", "open_clip")])
def test_another_function_of_equal_weights_is_refused(base, experts, tmp_path, pico_inputs):
    _, config = mixed(tmp_path, pico_inputs / "data", base, experts)
    fields = json.loads((tmp_path / "open_clip" / "base" / "open_clip_config.json").read_text())
    fields["model_cfg"]["quick_gelu"] = False
    fields["model_cfg"]["vision_cfg"]["head_width"] = 4
    if experts == "hf":
        edit_config(tmp_path / "hf" / "SVHN", hidden_act="gelu", num_attention_heads=4)
    else:
        (tmp_path / "open_clip" / "SVHN" / "open_clip_config.json").write_text(json.dumps(fields))
    with pytest.raises(
        InputError, match="SVHN: heads is 4, the base's is 2; activation is 'gelu', the base's is 'quick_"
    ):
        construct(config, domain)


@pytest.mark.parametrize(("base", "experts"), [("open_clip", "hf"), ("hf", "open_clip")])
def test_an_expert_that_sees_other_colours_is_refused(base, experts, tmp_path, pico_inputs):
    """Of an image, one takes off the mean of ImageNet, the other that of CLIP's own images."""
    _, config = mixed(tmp_path, pico_inputs / "data", base, experts)
    mean = [0.485, 0.456, 0.406]
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    processor.save_pretrained(tmp_path / "hf" / ("SVHN" if experts == "hf" else "base"))
    open_experiment(config, domain)
    if experts == "hf":
        file, fields = tmp_path / "hf" / "SVHN" / "preprocessor_config.json", {"image_mean": mean}
    else:
        file, fields = tmp_path / "open_clip" / "SVHN" / "open_clip_config.json", {"preprocess_cfg": {"mean": mean}}
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    said = "SVHN: image_mean is (0.485, 0.456, 0.406), the base's is (0.481, 0.458, 0.408): the merged model computes"
    with pytest.raises(InputError, match=re.escape(said)):
        construct(config, domain)


@pytest.mark.parametrize(("base", "experts"), [("open_clip", "hf"), ("hf", "open_clip")])
def test_a_text_tower_in_the_other_layout_is_said_not_to_be_compared(base, experts, tmp_path, pico_inputs, capsys):
    _, config = mixed(tmp_path, pico_inputs / "data", base, experts, alone=False)
    describe(config, domain)
    said = "MNIST, SVHN: there is a text tower in another library's layout, which is not compared with the base's, such"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("base", "experts"), [("open_clip", "hf"), ("hf", "open_clip")])
def test_what_has_no_counterpart_is_refused_by_its_name(base, experts, tmp_path, pico_inputs):
    _, config = mixed(tmp_path, pico_inputs / "data", base, experts)
    file = next((tmp_path / experts / "SVHN").glob("*.safetensors"))
    layer = "vision_model.encoder.layers.0" if experts == "hf" else "visual.transformer.resblocks.0"
    layer = layer if layer.split(".")[0] in str(list(load_file(file))) else layer.removeprefix("vision_model.")
    rewrite(file, lambda t: t | {f"{layer}.ls_1.gamma": torch.ones(16)})
    with pytest.raises(InputError, match=rf"{layer}.ls_1.gamma: extra, no tensor of that name is expected"):
        construct(config, domain)


def test_a_siglip_has_no_counterpart(tmp_path, pico_inputs):
    _, config = mixed(tmp_path, pico_inputs / "data", "hf", "open_clip")
    edit_config(tmp_path / "hf" / "base", model_type="siglip")
    with pytest.raises(
        InputError, match="MNIST is of open_clip, where a CLIPModel alone has a counterpart, no siglip_"
    ):
        construct(config, domain)
    other = replace(config, model=replace(config.model, base="open_clip/base", expert="hf/{task}"))
    edit_config(tmp_path / "hf" / "MNIST", model_type="siglip_vision_model")
    with pytest.raises(InputError, match="MNIST holds Hugging Face's layout of a model"):
        construct(other, domain)


def test_names_go_there_and_back():
    names = {*layouts.OUTSIDE, *(f"transformer.resblocks.3.{n}" for n in layouts.TO_HF if "q_proj" not in n)}
    for name in names:
        theirs = layouts.in_transformers(f"visual.{name}")
        assert theirs != f"visual.{name}" and layouts.in_open_clip(theirs) == f"visual.{name}"
        assert layouts.in_transformers(theirs) == theirs and layouts.in_open_clip(f"visual.{name}") == f"visual.{name}"
