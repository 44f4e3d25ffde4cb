"""The interface from Python: on modules in memory and on places it makes, bit by bit, what the commands make."""

import inspect
import json
import re
import runpy
import shutil
import sys
from contextlib import contextmanager
from copy import deepcopy

import open_clip
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertModel,
    ViTModel,
)

from common.api import Adapt, Anchors, AnchorSet, Model, Start, adapt, calls, construct, merge
from common.api.modules import domain_of
from common.config import ROOT, Config, Run, as_dict
from common.core.errors import InputError
from helpers import change, edit_config, files_of
from NLU import domain as nlu
from pico_nlg import write_pico_models
from pico_vision import COCA, PICO_CLIP, write_pico_clip

ANCHORS = Anchors(number=12, steps=5)
START = Start("ta", hyper={"ta": {"scale": 0.5}})
FIT = Adapt(rest="start", epochs=2, batch_size=8)


def command(script: str, config: Config, monkeypatch) -> None:
    """A command of the command line with a config in a file."""
    file = config.run.dir.parent / "config.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump({k: v for k, v in as_dict(config).items() if k != "dry_run"}))
    monkeypatch.setattr(sys, "argv", [script, "--config", str(file)])
    runpy.run_path(str(ROOT / script), run_name="__main__")


def weights(folder):
    """{name: tensor} of all files of a merged model."""
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def same(module, tensors):
    """Whether a module has these very weights."""
    own = module.state_dict()
    return all(torch.equal(own[name], tensor) for name, tensor in tensors.items())


@pytest.fixture
def llamas(tmp_path):
    """Folders of a base and two experts without tokenizers, and the models in memory."""
    write_pico_models(tmp_path / "llama", "llama", extra_tokens=0)
    for file in (tmp_path / "llama").glob("*/*token*"):
        file.unlink()
    paths = {name: tmp_path / "llama" / name for name in ("base", "math", "code")}
    return paths, {name: AutoModelForCausalLM.from_pretrained(path) for name, path in paths.items()}


def split(named):
    """(base, experts) of a dictionary of models."""
    return named["base"], {task: model for task, model in named.items() if task != "base"}


@contextmanager
def of_a_caller():
    """What a program may have set that calls us, which would change or break our arithmetic."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_the_caller_has_set_changes_nothing_and_stays_set(llamas):
    _, modules = llamas
    set_before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("medium")
    try:
        expected = adapt(*split(modules), construct(*split(modules), ANCHORS), START, FIT)
        with of_a_caller():
            found = adapt(*split(modules), construct(*split(modules), ANCHORS), START, FIT)
            assert torch.get_default_dtype() == torch.float64 and torch.get_default_device().type == "meta"
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        assert not torch.are_deterministic_algorithms_enabled() and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.use_deterministic_algorithms(set_before[0])
        torch.set_float32_matmul_precision(set_before[1])
    assert same(found, expected.state_dict()) and all(
        p.requires_grad and not p.is_inference() for p in found.parameters()
    )


def test_modules_and_places_give_what_the_commands_give(llamas, nlg_config, tmp_path, monkeypatch):
    paths, modules = llamas
    config = change(nlg_config, "model", root=str(tmp_path / "llama"), vocabulary="refuse", tokenizers=())
    config = change(change(config, "start", hyper=START.hyper), "run", root=str(tmp_path / "command"))
    config = change(change(config, "anchors", **vars(ANCHORS)), "adapt", **vars(FIT))
    for script in ("NLG/construct_fda.py", "NLG/adapt.py"):
        command(script, config, monkeypatch)
    expected = {name: weights(config.run.dir / "merged" / name) for name in ("ta", "fda-ta-weight")}

    before = {name: {n: t.clone() for n, t in model.state_dict().items()} for name, model in modules.items()}
    merged, anchors = merge(*split(modules), START), construct(*split(modules), ANCHORS)
    adapted = adapt(*split(modules), anchors, START, FIT)
    assert type(merged) is type(adapted) is type(modules["base"])
    assert same(merged, expected["ta"]) and same(adapted, expected["fda-ta-weight"])
    assert not same(merged, expected["fda-ta-weight"])
    assert all(same(model, before[name]) for name, model in modules.items()), "the inputs stay as they are"
    made = files_of(config.run.dir / "anchors" / "weight", "*.safetensors")
    assert len(made) == 4 and files_of(anchors.config.run.dir / "anchors" / "weight", "*.safetensors") == made
    assert {task: [tuple(x.shape) for x in of] for task, of in anchors.items()} == dict.fromkeys(
        ("math", "code"), [(12, 1, 16)] * 2
    )

    run = tmp_path / "ours"
    construct(*split(paths), ANCHORS, folder=run)
    folder = adapt(*split(paths), AnchorSet(anchors.config), START, FIT, folder=run)
    assert files_of(run / "anchors", "*.safetensors") == files_of(config.run.dir / "anchors", "*.safetensors")
    assert folder == run / "merged" / "fda-ta-weight"
    assert files_of(folder, "*.safetensors") == files_of(config.run.dir / "merged" / folder.name, "*.safetensors")


def test_a_text_encoder_keeps_its_head(nlu_inputs):
    root = nlu_inputs / "roberta"
    base = AutoModelForMaskedLM.from_pretrained(root / "base")
    experts = {
        task: AutoModelForSequenceClassification.from_pretrained(root / task / "model") for task in ("cola", "mnli")
    }
    merged = merge(base, experts, "average").state_dict()
    head = [name for name in merged if name.startswith("lm_head") and "decoder" not in name]
    assert head and all(torch.equal(merged[name], base.state_dict()[name]) for name in head)
    name = "roberta.encoder.layer.1.output.dense.weight"
    mean = sum(expert.state_dict()[name] for expert in experts.values()) / 2
    torch.testing.assert_close(merged[name], mean, atol=1e-6, rtol=1e-5)


@pytest.fixture
def clips(pico_inputs, monkeypatch):
    """A base of open_clip and an expert in memory, and the architecture under a name that open_clip knows."""
    root = pico_inputs / "clip"
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "pico", PICO_CLIP)
    base, expert = (open_clip.create_model(f"local-dir:{root / 'base'}") for _ in range(2))
    expert.load_state_dict(load_file(root / "MNIST" / "finetuned.safetensors"), strict=False)
    return root, base, expert


def test_an_open_clip_module_merges_as_its_files_do(clips, tmp_path):
    root, base, expert = clips
    places = {"MNIST": root / "MNIST" / "finetuned.safetensors", "SVHN": root / "SVHN" / "finetuned.safetensors"}
    folder = merge(root / "base", places, "tsv", folder=tmp_path / "run")
    merged = merge(base, places | {"MNIST": expert}, "tsv", model=Model(arch="pico"))
    assert same(merged, load_file(folder / "open_clip_model.safetensors")) and not same(merged, base.state_dict())


@pytest.mark.parametrize("opener", [BertModel, ViTModel])
def test_a_module_without_a_pooler_gets_none(opener):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    small = {"vocab_size": 8} if opener is BertModel else {"image_size": 16, "patch_size": 8}
    base, *others = (opener(opener.config_class(**sizes, **small), add_pooling_layer=False) for _ in range(3))
    merged = merge(base, {"one": others[0], "two": others[1]}, "average")
    assert merged.pooler is None
    one, two = (other.state_dict() for other in others)
    torch.testing.assert_close(merged.state_dict(), {name: (one[name] + two[name]) / 2 for name in one})


def test_a_coca_of_open_clip_is_a_model_of_open_clip(tmp_path, monkeypatch):
    write_pico_clip(tmp_path, fields=COCA)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "pico-coca", COCA)
    base, expert = (open_clip.create_model(f"local-dir:{tmp_path / 'base'}") for _ in range(2))
    expert.load_state_dict(load_file(tmp_path / "MNIST" / "finetuned.safetensors"), strict=False)
    merged = merge(base, {"MNIST": expert}, "average", model=Model(arch="pico-coca"))
    assert same(merged, expert.state_dict()) and type(merged) is type(base)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "a model of open_clip does not say its architecture; model=Model"),
        ({"model": Model(arch="pico-gelu")}, "base answers an image otherwise than the architecture pico-gelu"),
        ({"model": Model(arch="pico-narrow")}, "base is not of the architecture pico-narrow: .*size mismatch"),
    ],
)
def test_another_function_of_the_same_tensors_is_refused(clips, monkeypatch, given, said):
    _, base, expert = clips
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "pico-gelu", PICO_CLIP | {"quick_gelu": False})
    narrow = PICO_CLIP | {"vision_cfg": PICO_CLIP["vision_cfg"] | {"width": 8}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "pico-narrow", narrow)
    with pytest.raises(InputError, match=said):
        merge(base, {"MNIST": expert}, "ta", **given)


def adapter_on(model):
    return get_peft_model(deepcopy(model), LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def adapter_within(model):
    """As add_adapter of transformers leaves a model, which wants a later peft than is here."""
    model = deepcopy(model)
    model._hf_peft_config_loaded = True
    return model


def test_refusals_are_those_of_the_commands(llamas, tmp_path):
    paths, modules = llamas
    base, experts = split(modules)
    anchors = construct(base, experts, ANCHORS)
    other = {"math": experts["code"], "code": experts["math"]}
    for call, said in [
        (lambda: merge(base, experts, "tis"), "unknown start 'tis'; choose from pretrained, average"),
        (lambda: merge(base, experts, Start("ta", hyper={"ta": {"x": 1}})), "ta: unknown hyperparameter 'x'"),
        (lambda: merge(base, {"math": nn.Linear(2, 2)}, "ta"), r"experts\['math'\] is a Linear; a model of transf"),
        (lambda: merge(nn.Linear(2, 2), experts, "ta"), "base is a Linear; a model of transformers or open_clip is"),
        (lambda: merge(nn.DataParallel(base), experts, "ta"), "base is a DataParallel; .*: its module, say"),
        (lambda: merge(base, {"math": torch.compile(base)}, "ta"), "a OptimizedModule; .*: its _orig_mod, say"),
        (
            lambda: merge(base, {"math": adapter_on(base)}, "ta"),
            r"a PeftModelForCausalLM; .*: its merge_and_unload\(\)",
        ),
        (
            lambda: merge(base, {"math": adapter_within(base)}, "ta"),
            r"experts\['math'\] has an adapter besides its weigh",
        ),
        (
            lambda: merge(adapter_within(base), experts, "ta"),
            "base has an adapter besides its weights, which save_pret",
        ),
        (
            lambda: merge(base, {"math": deepcopy(base).to("meta")}, "ta"),
            r"experts\['math'\] has weights on the meta de",
        ),
        (lambda: merge(base, [modules["math"]], "ta"), "experts is a list; {task: module or path} is needed"),
        (lambda: merge(base, {}, "ta"), "experts is empty; {task: module or path} of at least one task is needed"),
        (
            lambda: merge(base, {1: modules["math"]}, "ta"),
            "experts has the task 1; a text is needed that names it, as in '1'",
        ),
        (lambda: construct(base, {"": "x"}), "experts has the task ''; a text is needed that names it, as in 'math'"),
        (lambda: merge(base, {"math": tmp_path / "none"}, "ta"), "none"),
        (lambda: merge(paths["base"], experts, "ta"), "base is a place and no module.* folder= says where"),
        (lambda: merge(base, experts, "ta", domain="text"), "unknown domain 'text'; choose from vision, nlu, nlg"),
        (lambda: merge(base, experts, "ta", model=Model(base="x")), "model.base is set, but base and experts are arg"),
        (lambda: merge(base, experts, "ta", model=Model(tokenizers=("math",))), "folder= says where"),
        (lambda: merge(base, experts, "regmean"), "regmean needs data of the tasks; nlg has none"),
        (lambda: adapt(base, other, anchors, START, FIT), "was made with weights.expert = .*, now it is"),
        (lambda: adapt(base, experts, anchors, START, FIT, seed=1), "was made with run.seed = 0, now it is 1"),
        (lambda: adapt(base, experts, tmp_path, START, FIT), "there is no anchor file .*dual_anchors_layer_1.npy"),
    ]:
        with pytest.raises(InputError, match=said):
            call()


def test_arguments_are_looked_at_before_any_module_is_written(llamas, monkeypatch):
    base, experts = split(llamas[1])
    monkeypatch.setattr("common.api.calls.named_as_given", None)
    for call, said in (
        (lambda: merge(base, experts, "tta"), "unknown start 'tta'"),
        (lambda: construct(base, experts, Anchors(steps=-2)), "anchors.steps is -2"),
        (lambda: construct(base, experts, {"steps": 2}), r"anchors is {'steps': 2}, but should be Anchors\(...\) of"),
        (lambda: merge(base, experts, "ta", model={"dtype": "float16"}), r"model is .*, but should be Model\(...\)"),
        (lambda: adapt(base, experts, {}, "ta"), "anchors is {}, but should be what construct made, or a place"),
        (lambda: merge(base, experts, "ta", device="gpu"), "run.device is 'gpu'"),
    ):
        with pytest.raises(InputError, match=said):
            call()


@pytest.mark.parametrize("who", ["base", "math"])
def test_a_generation_config_that_is_not_to_be_saved_is_kept(llamas, who):
    """Transformers refuses to save a temperature without sampling, though it opens files with it."""
    _, modules = llamas
    own = modules[who].generation_config
    own.do_sample, own.temperature, own.top_p = False, 0.6, 0.9
    base, experts = split(modules)
    merged = merge(base, experts, "average")
    expected = (0.6, 0.9) if who == "base" else (base.generation_config.temperature, base.generation_config.top_p)
    assert (merged.generation_config.temperature, merged.generation_config.top_p) == expected
    assert modules[who].generation_config is own and own.temperature == 0.6


def test_refusals_name_modules_as_they_were_given(llamas):
    paths, modules = llamas
    base, experts = split(modules)
    experts["math"].config.rms_norm_eps = 0.5
    with pytest.raises(InputError) as raised:
        merge(base, experts, "average")
    said = str(raised.value)
    assert said.startswith("experts['math']/config.json: rms_norm_eps is 0.5, the base's is 1e-06 (base/config.json)")
    with pytest.raises(InputError) as raised:
        merge(paths["base"], experts | {"code": paths["code"]}, "average", folder=paths["base"].parent / "run")
    said = str(raised.value)
    assert said.startswith("experts['math']/config.json: ") and f"({paths['base'] / 'config.json'})" in said


def test_the_domain_is_found_or_asked_for(llamas, nlu_inputs, pico_inputs, tmp_path):
    paths, modules = llamas
    assert domain_of(modules["base"]) == domain_of(str(paths["base"])) == "nlg"
    assert domain_of(nlu_inputs / "bert" / "base") == "nlu"
    assert domain_of(AutoModelForMaskedLM.from_pretrained(nlu_inputs / "roberta" / "base")) == "nlu"
    assert domain_of(pico_inputs / "clip" / "base") == "vision"
    image = AutoConfig.for_model("vit", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    assert domain_of(AutoModel.from_config(image)) == "vision"
    assert domain_of(AutoModelForImageClassification.from_config(image)) == "vision"
    with pytest.raises(InputError, match="does not tell what kind of model it is; domain= says so: vision, nlu, nlg"):
        domain_of(tmp_path)


def test_a_config_that_is_edited_between_two_calls_counts(llamas, nlu_inputs, tmp_path):
    """The anchors are of the function that the files say now: those that the same files elsewhere give."""
    places = [llamas[0][name] for name in ("base", "math")]
    before = construct(places[0], {"math": places[1]}, ANCHORS, folder=tmp_path / "before")
    for place in places:
        edit_config(place, hidden_act="relu")
        shutil.copytree(place, tmp_path / "elsewhere" / place.name)
    after = construct(places[0], {"math": places[1]}, ANCHORS, folder=tmp_path / "after")
    base, math = (tmp_path / "elsewhere" / place.name for place in places)
    elsewhere = construct(base, {"math": math}, ANCHORS, folder=tmp_path / "third")
    for index in range(2):
        assert torch.equal(after["math"][index], elsewhere["math"][index])
        assert not torch.equal(after["math"][index], before["math"][index])
    encoder = shutil.copytree(nlu_inputs / "bert" / "base", tmp_path / "bert")
    model = Model(base=str(encoder))
    assert nlu.skeleton(model).config.hidden_act == "gelu" and nlu.skeleton(model) is nlu.skeleton(model)
    edit_config(encoder, hidden_act="relu")
    assert nlu.skeleton(model).config.hidden_act == "relu"


def test_defaults_are_those_of_the_config():
    for function in (merge, construct, adapt):
        for name, parameter in inspect.signature(function).parameters.items():
            default = {"seed": Run.seed, "device": Run.device, "precision": Run.precision}.get(name)
            if parameter.default not in (parameter.empty, None, "") and default is None:
                default = getattr(calls, name.capitalize())()
            assert parameter.default in (parameter.empty, None, "", default), name
    assert inspect.signature(merge).parameters["device"].default == Run.device


def test_the_example_of_the_page_runs(llamas, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "scripts/README.md").read_text(), re.DOTALL)
    found: dict = {}
    exec(example, found)
    assert type(found["merged"]) is type(found["adapted"]) is type(found["base"])
    assert [x.shape for x in found["anchors"]["code"]] == [(64, 1, 16)] * 2
    assert not same(found["adapted"], found["merged"].state_dict())


def test_the_notebook_is_kept_without_outputs():
    notebook = json.loads((ROOT / "scripts/example.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 5 and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs():
    """It ends, experts know their own tasks alone, and every merge knows something of each."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "scripts/example.ipynb", 4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    table = next(o["text"] for o in code[-1].outputs if o.get("name") == "stdout").splitlines()
    rows = {line[:26].strip(): [float(x) for x in line[26:].split()] for line in table[1:]}
    print(rows)
    assert rows["base"] == [0, 0, 0] and rows["expert of plants"][1] > 90 > 10 > rows["expert of plants"][0]
    for name in ("task arithmetic", "TSV", "FDA from task arithmetic", "FDA from TSV"):
        assert min(rows[name]) > 10, name
