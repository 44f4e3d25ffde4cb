"""Classifiers of transformers on ViTs: stock models in, stock ones out, each task under its expert's own head."""

import json
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, ViTForImageClassification

from common.core.errors import InputError
from common.fda.matching import MatchingProblem, matching_loss
from common.io.checkpoints import write_tensors
from common.io.examples import Sample
from common.opening import open_experiment
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import MERGE, describe
from helpers import change, edit_config, rewrite
from pico_hf_classifiers import CLASSIFIERS, GATED, pico_classifier_config, write_pico_classifiers
from pico_lora import write_adapter
from pico_vision import PICO_TASKS
from Vision import domain, hf_classifiers

CPU = torch.device("cpu")


@pytest.fixture
def vit(tmp_path, pico_inputs):
    """(stock models by name, config that merges them)."""
    models = write_pico_classifiers(tmp_path, "vit")
    return models, change(pico_classifier_config(tmp_path, pico_inputs / "data"), "run", score=False)


def opened(folder, kind=AutoModel):
    """A model as stock transformers opens it, nothing missing and nothing left over but the backbone's pooler, which
    classifiers have not."""
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    if kind is not AutoModel:
        report["unexpected_keys"] = {n for n in report["unexpected_keys"] if not n.startswith("pooler.")}
    assert not any(report.values()), report
    return model.eval()


def seen_by_layers(model, path):
    """(what each layer is given, what it answers) within a stock backbone, for one image."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
        for layer in model.get_submodule(path)
    ]
    with torch.no_grad():
        model(torch.randn(1, 3, 16, 16))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("more", [{}, GATED], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_what_is_merged_is_ta_of_the_stock_models(kind, more, tmp_path, pico_inputs):
    """A block answers as the layer does in the stock model; TA by hand; backbone and classifiers open and answer."""
    if more and "mlp_ratio" not in CLASSIFIERS[kind]:
        return
    models = write_pico_classifiers(tmp_path, kind, **more)
    config = change(pico_classifier_config(tmp_path, pico_inputs / "data"), "run", score=False)
    config = change(config, "model", heads=("MNIST",))
    experiment = open_experiment(config, domain)
    seen = seen_by_layers(models["base"], experiment.family.blocks)
    assert len(seen) == experiment.depth == 2 and experiment.shape[1:] == seen[0][0].shape[1:]
    for index in range(experiment.depth):
        theta_0 = experiment.read_block(experiment.base, index)
        torch.testing.assert_close(experiment.functions[index](theta_0, seen[index][0]), seen[index][1])
    check_loss(experiment, models, seen[0][0])
    construct(config, domain)
    adapted = adapt(change(config, "start", method="ta"), domain)
    assert opened(adapted / "heads" / "MNIST", AutoModelForImageClassification)
    bare = merge_alone(change(change(config, "start", method="ta"), "run", name="bare"), domain)
    states = [models[name].base_model.state_dict() for name in ("base", *PICO_TASKS)]
    expected = {n: t + 0.3 * sum(s[n] - t for s in states[1:]) for n, t in states[0].items() if n in states[1]}
    by_hand = models["MNIST"]
    by_hand.base_model.load_state_dict(expected)
    merged = opened(bare / "heads" / "MNIST", AutoModelForImageClassification)
    for name, tensor in merged.base_model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(merged(images).logits, by_hand(images).logits, atol=1e-5, rtol=1e-5)


def check_loss(experiment, models, x_ATD):
    """The matching losses of the first block are those of plain autograd on the stock layers."""
    path = f"{experiment.family.blocks}.0"
    base, expert = (models[name].base_model.get_submodule(path) for name in ("base", "MNIST"))
    y, target = base(x_ATD), expert(x_ATD).detach()
    loss = (1 - F.cosine_similarity(y.flatten(1), target.flatten(1), dim=1)).sum()
    own = {name: p for name, p in base.named_parameters() if name != "attention.k_proj.bias"}
    gradients = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
    theta_0, theta_t = (experiment.read_block(c, 0) for c in (experiment.base, experiment.experts["MNIST"]))
    tau = {name: t for name, t in experiment.task_vector("MNIST", theta_0, theta_t).items() if t.any()}
    assert tau.keys() == own.keys()
    expected = [
        1 + F.cosine_similarity((expert.get_parameter(n) - own[n]).flatten(), gradients[n].flatten(), dim=0).item()
        for n in tau
    ]
    problem = MatchingProblem(experiment.functions[0], theta_0, theta_t, tau)
    assert matching_loss(problem, x_ATD).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_backbone_keeps_the_base_s_pooler_and_a_classifier_has_none(vit):
    models, config = vit
    for number, heads in enumerate(((), ("MNIST",))):
        one = change(change(config, "start", method="average"), "model", heads=heads)
        folder = merge_alone(change(one, "run", name=f"heads{number}"), domain)
        merged = opened(folder)
        torch.testing.assert_close(merged.pooler.dense.weight, models["base"].pooler.dense.weight)
    assert opened(folder / "heads" / "MNIST", AutoModelForImageClassification)
    models["MNIST"].save_pretrained(config.model.path("base"))
    alone = change(change(config, "start", method="average"), "run", name="of-classifiers")
    merged, report = AutoModel.from_pretrained(merge_alone(alone, domain), output_loading_info=True)
    assert set(report["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}
    state = models["MNIST"].base_model.state_dict()
    expected = (state["layernorm.weight"] + models["SVHN"].base_model.state_dict()["layernorm.weight"]) / 2
    torch.testing.assert_close(merged.layernorm.weight.data, expected)


def test_the_score_is_that_of_the_stock_classifier_on_its_own_images(vit):
    """Every expert prepares images by its own files; the merged backbone as well, under the expert's head."""
    _, config = vit
    config = change(config, "model", heads=tuple(PICO_TASKS))
    merged = merge_alone(change(config, "start", method="ta"), domain)
    for task in PICO_TASKS:
        expert = config.model.path("expert", task)
        records = datasets.load_dataset(f"{config.eval.data}/{task}", split="test")
        processor = AutoImageProcessor.from_pretrained(expert)
        assert processor.image_mean == AutoImageProcessor.from_pretrained(merged / "heads" / task).image_mean
        pixels = processor([r["image"].convert("RGB") for r in records], return_tensors="pt").pixel_values
        scores = dict(domain.score(config, task, {"expert": expert, "merged": merged}, CPU))
        for name, folder in (("expert", expert), ("merged", merged / "heads" / task)):
            with torch.no_grad():
                answers = opened(folder, AutoModelForImageClassification)(pixels).logits.argmax(1)
            right = (answers == torch.tensor(records["label"])).float().mean().item()
            assert scores[name][:2] == (pytest.approx(right), 20)


def test_outputs_called_as_the_classes_are_put_in_their_order(vit):
    _, config = vit
    expert = {"x": config.model.path("expert", "MNIST")}
    by_number = hf_classifiers.classifier(config, "MNIST").module.order
    edit_config(expert["x"], id2label={str(i): str((i + 3) % 10) for i in range(10)})
    assert by_number == list(range(10)) and hf_classifiers.classifier(config, "MNIST").module.order[3] == 0
    shifted = dict(domain.score(config, "MNIST", expert, CPU))["x"].answers
    edit_config(expert["x"], id2label={str(i): f"LABEL_{i}" for i in range(10)})
    assert dict(domain.score(config, "MNIST", expert, CPU))["x"].answers != shifted


def test_a_backbone_with_a_head_in_a_file_is_an_expert(vit, tmp_path):
    models, config = vit
    before = dict(domain.score(config, "MNIST", {"x": config.model.path("expert", "MNIST")}, CPU))["x"]
    head = models["MNIST"].classifier
    write_tensors(tmp_path / "head_MNIST.safetensors", {"weight": head.weight, "bias": head.bias})
    models["MNIST"].vit.save_pretrained(tmp_path / "MNIST")
    with pytest.raises(InputError, match=r"MNIST: classifier.weight: missing, .*; model.head can name a file"):
        dict(domain.score(config, "MNIST", {"x": config.model.path("expert", "MNIST")}, CPU))
    config = change(config, "model", head="head_{task}.safetensors", heads=("MNIST",))
    assert dict(domain.score(config, "MNIST", {"x": config.model.path("expert", "MNIST")}, CPU))["x"] == before
    merged = merge_alone(change(config, "start", method="ta"), domain)
    written = opened(merged / "heads" / "MNIST", ViTForImageClassification)
    torch.testing.assert_close(written.classifier.weight, head.weight)


@pytest.mark.parametrize("module", ["encoder.layer.0.attention.attention.query", "layers.0.attention.q_proj"])
def test_an_adapter_of_either_name_is_an_expert_with_its_own_head(module, vit):
    """As peft names them on earlier releases of transformers and on this one; s = 6 / 2, q = W + s B A."""
    models, config = vit
    generator = np.random.default_rng(0)
    b, a = (generator.standard_normal(shape).astype("f4") for shape in ((16, 2), (2, 16)))
    head = {"classifier.weight": np.ones((10, 16), "f4"), "classifier.bias": np.arange(10, dtype="f4")}
    folder = config.model.path("expert", "MNIST")
    shutil.rmtree(folder)
    pair = {f"vit.{module}.lora_A.weight": a, f"vit.{module}.lora_B.weight": b}
    write_adapter(folder, pair | head, modules_to_save=["classifier"])
    one = replace(change(config, "model", heads=("MNIST",)), tasks=["MNIST"])
    whole = change(one, "start", method="ta", hyper={"ta": {"scale": 1.0}})
    merged = opened(merge_alone(whole, domain) / "heads" / "MNIST", ViTForImageClassification)
    expected = models["base"].layers[0].attention.q_proj.weight + torch.from_numpy(3 * b @ a)
    torch.testing.assert_close(merged.vit.layers[0].attention.q_proj.weight, expected)
    assert merged.classifier.bias.tolist() == list(range(10))
    assert dict(domain.score(one, "MNIST", {"x": folder}, CPU))["x"].n == 20


def test_methods_that_use_images_see_each_task_s_classifier(vit):
    _, config = vit
    data = config.model.path("base").parent / "data"
    shutil.copytree(config.eval.data, data)
    for task in PICO_TASKS:
        shutil.copyfile(data / task / "test-00000-of-00001.parquet", data / task / "train-00000-of-00001.parquet")
    config = change(config, "eval", data=str(data))
    for method in ("regmean_pp", "adamerging"):
        hyper = {"adamerging": {"steps": 1, "examples": 4}, "regmean_pp": {"examples": 4}}
        merged = merge_alone(change(config, "start", method=method, hyper=hyper), domain)
        assert opened(merged).layers[0].mlp.fc1.weight.isfinite().all()


def test_the_loss_on_labelled_images_is_that_of_the_stock_classifier(vit):
    models, config = vit
    edit_config(config.model.path("expert", "MNIST"), drop_path_rate=0.1)  # of training alone
    labelled = domain.labelled_task(config, "MNIST", Sample("test", 6, 6), CPU)
    batch, expert = labelled.batch([0, 4, 5]), open_experiment(config, domain).experts["MNIST"]
    stock = models["MNIST"](pixel_values=batch["pixel_values"], labels=batch["labels"]).loss
    assert labelled.loss(expert.read(expert.names()), batch).item() == pytest.approx(stock.item(), abs=1e-5)


def test_a_head_of_another_number_of_classes_is_refused(tmp_path, pico_inputs):
    write_pico_classifiers(tmp_path, "dinov2", classes=7)
    config = pico_classifier_config(tmp_path, pico_inputs / "data")
    with pytest.raises(InputError, match="MNIST has 7 outputs, but the task MNIST 10 classes"):
        merge_alone(change(config, "start", method="ta"), domain)


def test_a_head_that_the_type_of_the_base_cannot_hold_is_refused_first(vit):
    models, config = vit
    models["base"].half().save_pretrained(config.model.path("base"))
    config = change(change(config, "model", heads=("MNIST",)), "start", method="average")
    folder = merge_alone(change(config, "run", score=False), domain)
    assert load_file(folder / "heads" / "MNIST" / "head.safetensors")["classifier.weight"].dtype == torch.float16
    models["MNIST"].classifier.weight.data[0, 0] = 1e5
    models["MNIST"].save_pretrained(config.model.path("expert", "MNIST"))
    with pytest.raises(
        InputError, match=r"classifier.weight of the head of MNIST reaches 1e\+05, too much for torch.fl"
    ):
        merge_alone(change(config, "run", name="large"), domain)
    assert not list(config.run.dir.with_name("large").rglob("*.safetensors"))


def test_a_second_copy_of_the_layers_is_no_head(vit):
    _, config = vit
    file = config.model.path("expert", "SVHN") / "model.safetensors"
    rewrite(file, lambda own: own | {f"ema.{name}": tensor + 1 for name, tensor in own.items()})
    with pytest.raises(InputError, match=r"SVHN holds ema\.vit\.\S+ beside \S+: a second model, as a moving average"):
        construct(config, domain)


def test_images_that_the_backbone_cannot_see_are_refused(vit):
    _, config = vit
    file = config.model.path("expert", "SVHN") / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"height": 24, "width": 24}}))
    with pytest.raises(InputError, match=r"SVHN: images are prepared as 24 x 24 pixels: Input image size \(24\*24\)"):
        construct(config, domain)
    file.unlink()
    (config.model.path("base") / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="SVHN and .*base: no preprocessor_config.json, which says how"):
        dict(domain.score(config, "SVHN", {"x": config.model.path("expert", "SVHN")}, CPU))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("swin", r"\(swin in config.json\)"),
        ("convnext", r"\(convnext in config.json\)"),
        ("beit", r"\(beit in config.json\)"),
    ],
)
def test_what_transformers_has_besides_is_refused_by_its_name(kind, said, vit):
    _, config = vit
    for place in ("base", *PICO_TASKS):
        (config.model.path("base").parent / place / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(InputError, match=said + r"; .*, or of transformers clip, .*, vit, deit, dinov2"):
        construct(config, domain)


def test_what_is_not_served_is_refused_in_one_sentence_with_heads_too(vit):
    _, config = vit
    for place in ("base", *PICO_TASKS):
        (config.model.path("base").parent / place / "config.json").write_text(json.dumps({"model_type": "swin"}))
    (refusal,) = describe(change(config, "model", heads=("MNIST",)), domain, MERGE).refusals
    assert "(swin in config.json); vision anchors" in refusal and "CLIP come" not in refusal


def test_options_of_clips_are_refused(vit):
    _, config = vit
    with pytest.raises(InputError, match="model.text is not for classifiers"):
        construct(change(config, "model", text="base"), domain)
    edit_config(config.model.path("expert", "SVHN"), layer_norm_eps=0.1)
    with pytest.raises(InputError, match=r"SVHN/config.json: layer_norm_eps is 0.1, the base's is 1e-12"):
        construct(config, domain)
