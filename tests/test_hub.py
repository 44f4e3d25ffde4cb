"""The hub wherever a path goes: fetched into its cache, headers alone in a dry run, every failure one sentence."""

import itertools
import re
import runpy
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

import pico_hub
from common.command import parse as parse_command
from common.config import ROOT, Model
from common.core.errors import InputError
from common.core.places import path_of
from common.io import hub as hub_module
from common.io.checkpoints import Checkpoint, write_tensors
from common.io.hub import headers_only, parse
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import describe
from helpers import change, files_of
from NLG import domain
from NLU import domain as nlu
from pico_hf_vision import write_pico_hf
from pico_hub import COMMIT
from pico_vision import PICO_CLIP
from Vision import domain as vision

publish = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "publish.py")))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with pico_hub.running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for function in (hub_module._resolved, hub_module.stand_in_folder):
            function.cache_clear()
        yield server


@pytest.fixture
def from_hub(hub, nlg_inputs, nlg_config):
    """A config whose models are on the hub, and the same with local ones."""
    for name in ("base", "math", "code"):
        hub.add(f"pico/{name}", nlg_inputs / "llama" / name)
    model = {"base": "hf://pico/base@main", "expert": "hf://pico/{task}"}
    return change(change(nlg_config, "model", **model), "run", name="hub"), nlg_config


def test_models_of_the_hub_merge_as_local_ones_do(hub, from_hub):
    remote, local = from_hub
    for config in (remote, local):
        construct(config, domain)
        adapt(config, domain)
    assert files_of(remote.run.dir / "merged", "*.safetensors") == files_of(local.run.dir / "merged", "*.safetensors")
    assert f"/snapshots/{COMMIT}" in str(remote.model.path("base"))
    asked = len(hub.asked)
    merge_alone(remote, domain)
    assert len(hub.asked) == asked, "what is fetched is fetched once"


def test_a_dry_run_reads_headers_and_no_weight(hub, from_hub):
    remote, local = from_hub
    with headers_only():
        plan = describe(remote, domain)
    assert not plan.refusals and "not known before the weights are fetched" in plan.text
    assert "2 x model.layers.N.mlp, 3 tensors" in plan.text
    sizes = {name: len(data) for name, data in hub.repos["models/pico/base"].items()}
    weights = [name for name in hub.sent if name.endswith(".safetensors")]
    assert weights == ["model.safetensors"] and sizes["model.safetensors"] > 10_000
    assert not list((remote.run.dir.parent / "hub").rglob("*.safetensors"))
    with headers_only():
        found, real = Checkpoint(remote.model.path("base")), Checkpoint(local.model.path("base"))
    assert found.shapes == real.shapes


def test_a_header_longer_than_the_first_request_is_read(hub, monkeypatch, tmp_path, from_hub):
    remote, _ = from_hub
    monkeypatch.setattr(hub_module, "FIRST", 64)
    with headers_only():
        assert Checkpoint(remote.model.path("base")).shapes
    assert hub.sent["model.safetensors"] < len(hub.repos["models/pico/base"]["model.safetensors"]) / 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "hf://pico/nothing",
            "has no model pico/nothing; a data set is hf://datasets/org/name; `hf auth login` if it is",
        ),
        ("hf://pico/base@v2", "has no revision 'v2' of pico/base"),
        ("hf://pico/base/sub", "holds no weights; pico/base@main has .*config.json"),
        ("hf://pico/gated", "gates pico/gated; accept its terms there"),
        ("hf://pico", "is no place on the hub; write hf://org/name"),
        ("s3://a/b", "unknown scheme 's3'; choose from hf"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, from_hub, text, said):
    remote, _ = from_hub
    hub.gated.add("models/pico/gated")
    with pytest.raises(InputError, match=said) as refusal:
        construct(change(remote, "model", base=text), domain)
    assert "\n" not in str(refusal.value)


def test_without_a_network_the_cache_is_what_there_is(hub, from_hub, monkeypatch):
    remote, _ = from_hub
    first = merge_alone(remote, domain)
    hub_module._resolved.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert merge_alone(remote, domain) == first
    with pytest.raises(InputError, match=r"hf://pico/other: the hub at .* cannot be asked .* has no pico/other@main"):
        merge_alone(change(remote, "model", expert="hf://pico/other"), domain)


def test_a_connection_that_breaks_in_the_middle_is_resumed(hub, from_hub):
    remote, local = from_hub
    hub.breaks = 9_000
    try:
        folder = remote.model.path("base")
    except InputError as error:
        assert "the same command goes on from there" in str(error)
        folder = remote.model.path("base")
    ours, theirs = (
        f.read_bytes() for f in (folder / "model.safetensors", local.model.path("base") / "model.safetensors")
    )
    assert ours == theirs


def test_a_size_that_is_a_lie_is_refused(hub, from_hub):
    remote, _ = from_hub
    hub.lies.add("model.safetensors")
    with pytest.raises(InputError, match="hf://pico/base@main could not be fetched .Consistency check failed"):
        remote.model.path("base")


def test_pickles_are_fetched_only_where_nothing_else_is(hub, tmp_path, nlg_inputs):
    source = tmp_path / "pickled"
    source.mkdir()
    weights = Checkpoint(nlg_inputs / "llama" / "base").read_under("")
    torch.save(weights, source / "pytorch_model.bin")
    (source / "config.json").write_text((nlg_inputs / "llama" / "base" / "config.json").read_text())
    hub.add("pico/pickled", source)
    folder = path_of("hf://pico/pickled")
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert all(torch.equal(t, weights[n]) for n, t in Checkpoint(folder).read_under("").items())
    with headers_only():
        assert Checkpoint(path_of("hf://pico/pickled")).shapes, "what is in the cache is read"
    (source / "model.safetensors").write_bytes((nlg_inputs / "llama" / "base" / "model.safetensors").read_bytes())
    hub.add("pico/both", source)
    assert "converted" not in str(path_of("hf://pico/both")) and not list(path_of("hf://pico/both").glob("*.bin"))


@pytest.fixture
def published(hub, pico_inputs, tmp_path, monkeypatch):
    """configs/vision/vit_b32.yaml for two tasks, with pickled pico models on the hub under the names that it has."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "pico", PICO_CLIP)
    clip, folder = pico_inputs / "clip", tmp_path / "published"
    whole = load_file(clip / "base" / "open_clip_model.safetensors")
    models = {"zeroshot": {n: t for n, t in whole.items() if n.startswith("visual.")}, "ViT-B-32": whole}
    for task in ("MNIST", "SVHN"):
        models[f"{task}/finetuned"] = load_file(clip / task / "finetuned.safetensors")
        models[f"head_{task}"] = {"weight": torch.ones(10, 8)}
    for name, tensors in models.items():
        file = folder / "ViT-B-32" / f"{name}.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, file)
        write_tensors(tmp_path / "converted" / f"{name}.safetensors", tensors)
    hub.add("SphereLab/vision_models_in_FDA", folder)
    config = parse_command("", ["--config", str(ROOT / "configs/vision/vit_b32.yaml")])
    config = change(replace(config, tasks=["MNIST", "SVHN"]), "model", arch="pico")
    return change(change(config, "run", root=str(tmp_path), score=False, device="cpu"), "start", method="ta")


def test_the_paper_s_pickles_are_noted_by_a_dry_run_and_fetched_by_a_run(hub, published, tmp_path):
    with headers_only():
        plan = describe(published, vision)
    root = "hf://SphereLab/vision_models_in_FDA/ViT-B-32"
    assert not plan.refusals and "construct, memory" in plan.text
    for what, name in [("base", "zeroshot"), ("expert SVHN", "SVHN/finetuned"), ("text tower", "ViT-B-32")]:
        assert re.search(f"not fetched {what}: {root}/{name}.safetensors, .* GB of pickles, read when the", plan.text)
    assert f"not fetched head MNIST: {root}/head_MNIST.safetensors, " in plan.text
    asked = [
        request for request in hub.asked if request != "GET /api/models/SphereLab/vision_models_in_FDA/revision/main"
    ]
    assert not asked and len(hub.asked) == 6 and not hub.sent, "a listing for each of six files, and no file"
    merged = merge_alone(published, vision)
    local = change(change(published, "model", root=str(tmp_path / "converted")), "run", name="local")
    assert files_of(merged, "*.safetensors") == files_of(merge_alone(local, vision), "*.safetensors")
    assert "base_model:\n- SphereLab/vision_models_in_FDA\n" in (merged / "README.md").read_text()
    hub_module._resolved.cache_clear()  # as in another process
    with headers_only():
        plan = describe(published, vision)
    assert re.findall("not fetched (.*):", plan.text) == [f"head {task}: hf" for task in published.tasks], (
        "never scored"
    )
    assert not plan.refusals and "in block 0: MNIST" in plan.text


def test_the_paper_s_encoders_merge_from_the_hub(hub, nlu_inputs, tmp_path):
    """configs/nlu/roberta_base.yaml for two tasks: a base of safetensors, and pickled experts."""
    folder = tmp_path / "published"
    shutil.copytree(nlu_inputs / "roberta" / "base", folder / "roberta-base")
    for slug in ("cola", "mnli"):
        expert = folder / slug / "roberta-base_lr1e-05"
        shutil.copytree(nlu_inputs / "roberta" / slug / "model", expert)
        torch.save(load_file(expert / "model.safetensors"), expert / "pytorch_model.bin")
        (expert / "model.safetensors").unlink()
    hub.add("SphereLab/nlu_models_in_FDA", folder)
    config = parse_command("", ["--config", str(ROOT / "configs/nlu/roberta_base.yaml")])
    config = change(replace(config, tasks=["CoLA", "MNLI"]), "run", root=str(tmp_path), score=False, device="cpu")
    config = change(config, "start", method="average")
    with headers_only():
        plan = describe(config, nlu)
    assert not plan.refusals and not [name for name in hub.sent if name.endswith((".bin", ".safetensors"))][1:]
    assert (
        "found      base: " in plan.text
        and "not fetched expert MNLI: hf://SphereLab/nlu_models_in_FDA/mnli" in plan.text
    )
    local = change(change(config, "model", root=str(nlu_inputs / "roberta"), base="base", expert="{slug}/model"), "run",
                   name="local")  # fmt: skip
    ours, theirs = (files_of(merge_alone(each, nlu), "*.safetensors") for each in (config, local))
    assert ours == theirs


def test_anchors_are_taken_from_a_data_set(hub, tmp_path, nlg_config):
    released = tmp_path / "released"
    for task in nlg_config.tasks:
        (released / "weight" / task).mkdir(parents=True)
        for layer in (1, 2):
            np.save(released / "weight" / task / f"dual_anchors_layer_{layer}.npy", np.ones((12, 16), np.float32))
    hub.add("pico/anchors", released, "datasets")
    config = change(nlg_config, "anchors", source="hf://datasets/pico/anchors/weight")
    assert adapt(config, domain).is_dir()


def test_places_are_read_as_they_are_written():
    place = parse("hf://datasets/org/na-me_1@refs/pr/3/a/b.npy")
    assert (place.kind, place.repo, place.revision, place.path) == ("dataset", "org/na-me_1", "refs/pr/3", "a/b.npy")
    place = parse("hf://org/clip-vit-base-patch32_sun397")
    assert (place.kind, place.repo, place.revision, place.path) == (
        "model",
        "org/clip-vit-base-patch32_sun397",
        "main",
        "",
    )
    assert Model(base="~/x", root="/r").path("base").is_absolute() and Model(base="b").path("base").name == "b"


def test_a_merged_model_is_pushed_with_its_card(hub, from_hub, monkeypatch):
    remote, _ = from_hub
    config = change(change(remote, "start", method="ta"), "run", score=True)
    construct(config, domain)
    adapt(config, domain)
    publish.publish("merged/fda-ta-weight", "pico/merged", True, "", config, domain)
    files = hub.repos["models/pico/merged"]
    folder = config.run.dir / "merged" / "fda-ta-weight"
    assert files["model.safetensors.index.json"] and files["config.json"] and files["tokenizer.json"]
    weights = next(name for name in files if name.startswith("model-") and name.endswith(".safetensors"))
    assert files[weights] == (folder / weights).read_bytes()
    text = files["README.md"].decode()
    data = ModelCard(text).data
    assert data.base_model == ["pico/base", "pico/math", "pico/code"] and data.library_name == "transformers"
    assert "merge" in data.tags and data.license is None
    for part in (
        "FDA (TA, Weight)",
        "without data of their tasks",
        "| Pretrained",
        "| arithmetic",
        "steps: 5",
        "torch ",
    ):
        assert part in text
    assert str(config.run.dir) not in text and "/tmp" not in text
    again = path_of("hf://pico/merged")
    assert Checkpoint(again).shapes == Checkpoint(folder).shapes


def test_anchors_that_are_pushed_are_taken_from_there(hub, from_hub, capsys):
    remote, _ = from_hub
    construct(remote, domain)
    ours = adapt(remote, domain)
    publish.publish("anchors/weight", "pico/made", False, "", remote, domain)
    assert "dual_anchors_layer_2.npy" in str(list(hub.repos["datasets/pico/made"]))
    source = change(change(remote, "anchors", source="hf://datasets/pico/made/weight"), "run", name="again")
    assert files_of(adapt(source, domain), "*.safetensors") == files_of(ours, "*.safetensors")
    with pytest.raises(InputError, match=r"block_00.safetensors was made with anchors.steps = 5, now it is 6"):
        publish.publish("anchors/weight", "pico/made", False, "", change(remote, "anchors", steps=6), domain)
    for what in ("merged/none", "anchors", "x/y"):
        with pytest.raises(
            InputError, match=f"--what {what}: .* has anchors/weight, merged/fda-ta-weight, merged/ta whole"
        ):
            publish.publish(what, "pico/made", False, "", remote, domain)
    with pytest.raises(InputError, match="--to made is no repository; write org/name"):
        publish.publish("merged/ta", "made", False, "", remote, domain)


def test_fusionbench_s_layout_merges_from_the_hub(hub, tmp_path, pico_inputs):
    """configs/vision/fusionbench_b32.yaml as it is, with pico models under the names that it has."""
    write_pico_hf(tmp_path, "clip")
    config = parse_command("", ["--config", str(ROOT / "configs/vision/fusionbench_b32.yaml")])
    hub.add("openai/clip-vit-base-patch32", tmp_path / "base")
    for task, source in zip(config.tasks, itertools.cycle(["MNIST", "SVHN"])):
        hub.add(f"tanganke/clip-vit-base-patch32_{task}", tmp_path / source)
    config = change(change(config, "run", root=str(tmp_path), score=False), "start", method="swudi_a")
    with headers_only():
        assert not describe(config, vision).refusals
    assert (merge_alone(config, vision) / "model.safetensors").is_file()
    card = ModelCard((config.run.dir / "merged" / "swudi_a" / "README.md").read_text())
    assert card.data.base_model[:2] == ["openai/clip-vit-base-patch32", "tanganke/clip-vit-base-patch32_sun397"]
