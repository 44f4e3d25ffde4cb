"""Vision models of transformers: stock CLIPs and SigLIPs in, a stock one out, scored as the stock library would."""

import json
import shutil
from contextlib import nullcontext

import datasets
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from common.core.errors import InputError
from common.core.task_vectors import subtract
from common.fda.matching import MatchingProblem, matching_loss
from common.opening import open_experiment
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import describe
from helpers import assert_same_in_bf16, change, edit_config
from pico_hf_vision import TOWERS, pico_hf_config, write_pico_hf
from pico_lora import write_adapter
from pico_vision import PICO_TASKS
from Vision import domain

LAYER = "vision_model.encoder.layers.0."


@pytest.fixture(params=TOWERS)
def pico(request, tmp_path, pico_inputs):
    """(stock models by name, config that merges them)."""
    models = write_pico_hf(tmp_path, request.param)
    return models, pico_hf_config(tmp_path, pico_inputs / "data")


def test_what_is_merged_opens_as_the_stock_model_and_is_ta_of_it(pico):
    models, config = pico
    construct(config, domain)
    adapted = adapt(change(config, "start", method="ta"), domain)
    merged = AutoModel.from_pretrained(config.run.dir / "merged" / "ta").state_dict()
    states = [models[name].state_dict() for name in ("base", *PICO_TASKS)]
    for name, base in states[0].items():
        expected = base + 0.3 * sum(expert[name] - base for expert in states[1:])
        torch.testing.assert_close(merged[name], expected.to(base.dtype), atol=1e-6, rtol=1e-6)
    whole = AutoModel.from_pretrained(adapted)
    assert not torch.equal(whole.state_dict()[LAYER + "mlp.fc1.weight"], merged[LAYER + "mlp.fc1.weight"])
    image = AutoImageProcessor.from_pretrained(adapted)(torch.zeros(3, 16, 16, dtype=torch.uint8), return_tensors="pt")
    ids = [AutoTokenizer.from_pretrained(f)("a photo").input_ids for f in (adapted, config.model.path("base"))]
    assert ids[0] == ids[1] and len(ids[0]) == 4
    assert whole.get_image_features(**image).pooler_output.isfinite().all()


def test_a_step_s_loss_is_that_of_plain_autograd_on_the_stock_layer(pico):
    models, config = pico
    experiment = open_experiment(config, domain)
    x_ATD = torch.randn(3, 5, 16)
    base, expert = (models[name].get_submodule(LAYER.removesuffix(".")) for name in ("base", "MNIST"))
    y, target = base(x_ATD, None), expert(x_ATD, None).detach()
    loss = (1 - F.cosine_similarity(y.flatten(1), target.flatten(1), dim=1)).sum()
    names = [name for name, _ in base.named_parameters() if not name.endswith("k_proj.bias")]
    gradients = torch.autograd.grad(loss, [base.get_parameter(name) for name in names])
    taus = [expert.get_parameter(name).detach() - base.get_parameter(name).detach() for name in names]
    cosines = [
        F.cosine_similarity(t.flatten(), g.flatten(), dim=0).item() for t, g in zip(taus, gradients, strict=True)
    ]
    losses = {name: 1 + cosine for name, cosine in zip(names, cosines, strict=True)}
    theta_0, theta_t = (experiment.read_block(c, 0) for c in (experiment.base, experiment.experts["MNIST"]))
    tau = experiment.task_vector("MNIST", theta_0, theta_t)
    tau = {name: t for name, t in tau.items() if name != "self_attn.k_proj.bias"}
    problem = MatchingProblem(experiment.functions[0], theta_0, theta_t, tau)
    for name, ours in zip(tau, matching_loss(problem, x_ATD).tolist(), strict=True):
        assert ours == pytest.approx(losses[name], abs=1e-5)
    assert_same_in_bf16(problem, x_ATD)
    assert not experiment.family.without_null_gradients(subtract(theta_t, theta_0))["self_attn.k_proj.bias"].any()


def test_the_score_is_the_accuracy_of_the_stock_models(pico, pico_inputs):
    models, config = pico
    tokenizer = AutoTokenizer.from_pretrained(config.model.path("base"))
    processor = AutoImageProcessor.from_pretrained(config.model.path("base"))
    records = datasets.load_dataset(str(pico_inputs / "data" / "MNIST"), split="test")
    prompts = [f'a photo of the number: "{c}".' for c in range(10)]
    tokens = tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")
    pixels = processor([r["image"].convert("RGB") for r in records], return_tensors="pt")
    with torch.no_grad():
        found = models["MNIST"](**pixels, **tokens)
    right = (found.logits_per_image.argmax(-1) == torch.tensor(records["label"])).float().mean().item()
    score = dict(domain.score(config, "MNIST", {"x": config.model.path("expert", "MNIST")}, torch.device("cpu")))["x"]
    assert score[:2] == (pytest.approx(right), 20)


def test_experts_that_are_whole_models_and_methods_that_use_images(tmp_path, pico_inputs):
    write_pico_hf(tmp_path, "clip", alone=False)
    config = change(pico_hf_config(tmp_path, pico_inputs / "data"), "run", score=False)
    for method in ("tsv", "adamerging"):
        start = change(config, "start", method=method, hyper={"adamerging": {"steps": 1, "examples": 4}})
        merged = AutoModel.from_pretrained(merge_alone(start, domain)).state_dict()
        assert merged[LAYER + "mlp.fc1.weight"].isfinite().all()


def test_a_projection_of_an_expert_s_own_is_refused(tmp_path, pico_inputs):
    models = write_pico_hf(tmp_path, "clip", alone=False)
    models["SVHN"].visual_projection.weight.data += 0.1
    models["SVHN"].save_pretrained(tmp_path / "SVHN")
    with pytest.raises(InputError, match=r"SVHN: visual_projection.weight is not that of .*base; the image"):
        construct(pico_hf_config(tmp_path, pico_inputs / "data"), domain)


def test_a_projection_that_an_adapter_trains_is_refused(tmp_path, pico_inputs):
    """Whether it brings a whole one or factors of a change; one that is the base's still is none of its own."""
    models = write_pico_hf(tmp_path, "clip", alone=False)
    held = models["base"].visual_projection.weight.detach().numpy()
    layer = "vision_model.encoder.layers.0.self_attn.q_proj"
    change_of = {f"{layer}.lora_A.weight": np.ones((2, 16), "float32"), f"{layer}.lora_B.weight": np.ones((16, 2), "f")}
    factors = {"lora_A.weight": np.ones((2, 16), "f"), "lora_B.weight": np.ones((held.shape[0], 2), "f")}
    config = change(pico_hf_config(tmp_path, pico_inputs / "data"), "start", method="average")
    shutil.rmtree(tmp_path / "SVHN")
    for own, refused in (
        ({"visual_projection.weight": held}, False),
        ({"visual_projection.weight": held + 0.1}, True),
        ({f"visual_projection.{name}": factor for name, factor in factors.items()}, True),
    ):
        saved = ["visual_projection"] if "visual_projection.weight" in own else None
        write_adapter(tmp_path / "SVHN", change_of | own, modules_to_save=saved)
        with pytest.raises(InputError, match="SVHN: visual_projection.*is not that of") if refused else nullcontext():
            domain.check_inputs(config)


@pytest.mark.parametrize(("base", "expert"), [("float32", "float16"), ("float32", "bfloat16"), ("bfloat16", "float16"),
                                              ("float16", "float32")])  # fmt: skip
def test_a_frozen_projection_may_be_rounded(tmp_path, pico_inputs, base, expert):
    """In the type that one of the models was saved in; what differs after that was trained."""
    models = write_pico_hf(tmp_path, "clip", alone=False)
    models["base"].to(getattr(torch, base)).save_pretrained(tmp_path / "base")
    held = models["base"].visual_projection.weight.data.float()
    for task, kind in (("SVHN", expert), ("MNIST", "float32")):
        models[task].visual_projection.weight.data = held.clone()
        models[task].to(getattr(torch, kind)).save_pretrained(tmp_path / task)
    config = change(pico_hf_config(tmp_path, pico_inputs / "data"), "start", method="average")
    domain.check_inputs(config)
    models["SVHN"].visual_projection.weight.data *= 1 + 2**-6
    models["SVHN"].save_pretrained(tmp_path / "SVHN")
    with pytest.raises(InputError, match=r"SVHN: visual_projection.weight is not that of .*base; the image"):
        domain.check_inputs(config)


def test_a_tower_saved_with_its_projection_goes_with_the_whole_model(tmp_path, pico_inputs):
    """The width of the projection is said by the config of the whole model, or by that of the tower."""
    models = write_pico_hf(tmp_path, "clip", alone=False)
    for task in PICO_TASKS:
        fields = models[task].config.vision_config.to_dict() | {"projection_dim": 8}
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(fields))
        tower.load_state_dict({name: models[task].state_dict()[name] for name in tower.state_dict()})
        tower.save_pretrained(tmp_path / task)
    config = change(pico_hf_config(tmp_path, pico_inputs / "data"), "run", score=False)
    merged = AutoModel.from_pretrained(merge_alone(change(config, "start", method="average"), domain)).state_dict()
    name = LAYER + "mlp.fc1.weight"
    torch.testing.assert_close(merged[name], sum(models[task].state_dict()[name] for task in PICO_TASKS) / 2)


def test_an_image_tower_alone_needs_a_text_tower(pico):
    _, config = pico
    alone = change(config, "model", base="MNIST")
    with pytest.raises(InputError, match="MNIST is an image tower alone: model.text must name a folder"):
        construct(alone, domain)
    with_text = change(change(alone, "model", text="base"), "run", score=False)
    folder = merge_alone(change(with_text, "start", method="average"), domain)
    assert "text_model" in str(list(AutoModel.from_pretrained(folder).state_dict()))


def test_another_function_of_equal_weights_is_refused(pico):
    _, config = pico
    edit_config(config.model.path("expert", "SVHN"), layer_norm_eps=0.1)
    with pytest.raises(InputError, match=r"SVHN/config.json: layer_norm_eps is 0.1, the base's is 1e-0"):
        construct(config, domain)


@pytest.mark.parametrize("tokenizer", ["base", "SVHN"])
def test_where_the_base_does_not_say_how_images_are_prepared_experts_do(tmp_path, pico_inputs, tokenizer, capsys):
    """They must agree, in whatever spelling; the merged model gets what they say, also where it is lent a tokenizer."""
    write_pico_hf(tmp_path, "clip")
    config = change(pico_hf_config(tmp_path, pico_inputs / "data"), "run", score=False)
    config = change(config, "start", method="average")
    base, *experts = (tmp_path / name / "preprocessor_config.json" for name in ("base", *PICO_TASKS))
    fields = json.loads(base.read_text())
    base.unlink()
    if tokenizer != "base":
        for file in (tmp_path / "base").glob("tokenizer*"):
            file.rename(tmp_path / tokenizer / file.name)
    for file in experts:
        file.write_text(json.dumps(fields | {"image_mean": [0, 0, 0]}))
    experts[1].write_text(
        json.dumps(fields | {"image_mean": [0.0, 0, 0], "image_processor_type": "CLIPImageProcessorFast"})
    )
    folder = merge_alone(config, domain)
    assert AutoImageProcessor.from_pretrained(folder).image_mean == (0, 0, 0)
    assert (folder / "tokenizer.json").is_file()
    assert f"has the {base.name} of {', '.join(PICO_TASKS)}" in capsys.readouterr().err
    experts[1].write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"image_mean is .*, there \[0, 0, 0\]\), and no prepr.* beside the base says"):
        merge_alone(change(config, "run", name="other"), domain)
    base.write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"image_mean is \[0, 0, 0\], there .*: the merged model sees images as the l"):
        merge_alone(change(config, "run", name="other"), domain)


def test_a_model_type_that_is_not_served_is_named(pico):
    _, config = pico
    file = config.model.path("base") / "config.json"
    file.write_text(json.dumps({"model_type": "swin"}))
    with pytest.raises(
        InputError, match=r"\(swin in config.json\); .*, or of transformers clip, siglip, .*, vit, deit, "
    ):
        construct(config, domain)
    file.write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(InputError, match="model.family is 'siglip2'"):
        construct(change(config, "model", family="siglip2"), domain)


def test_the_dry_run_says_what_was_found(pico):
    _, config = pico
    assert "2 x vision_model.encoder.layers.N, 16 tensors" in describe(config, domain).text
