"""What options of the model decide of a merged folder is in its provenance: another choice is refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.assembly import start_in_base
from common.config import Model
from common.core.errors import InputError
from common.io.checkpoints import Checkpoint, write_tensors
from common.io.written import computed_as, written_as
from common.opening import open_experiment
from common.pipeline import construct, merge_alone
from common.planning.dry_run import CONSTRUCT, MERGE, describe
from common.provenance import read_provenance
from helpers import change, rewrite
from NLG import domain as nlg
from NLU import domain as nlu
from pico_hf_classifiers import pico_classifier_config, write_pico_classifiers
from Vision import domain as vision

ALWAYS = {"vocabulary": "refuse", "dtype": "", "tokenizers": []}
WEIGHTS = "open_clip_model.safetensors"


def merging(config):
    """The config of a merge by ta that is not scored."""
    return change(change(config, "start", method="ta"), "run", score=False)


@pytest.fixture
def parted(pico_inputs, pico_config, tmp_path):
    """A vision config whose base has lost its text tower, which lies in one/ and, with other weights, in other/."""
    root = tmp_path / "clip"
    shutil.copytree(pico_inputs / "clip", root)
    for name in ("one", "other"):
        shutil.copytree(root / "base", root / name)
    rewrite(root / "other" / WEIGHTS, lambda t: t["text_projection"].add_(1))
    rewrite(root / "base" / WEIGHTS, lambda t: {n: x for n, x in t.items() if n.startswith("visual.")})
    return root, change(merging(pico_config), "model", root=str(root))


def test_another_text_tower_is_refused_wherever_it_lies(parted):
    root, config = parted
    with_one = change(config, "model", text="one")
    folder = merge_alone(with_one, vision)
    assert read_provenance(folder)["inputs"]["model"].keys() == {*ALWAYS, "text"}
    with pytest.raises(InputError, match=r"was made with inputs\.model\.text = sha256:\w+, now it is sha256:"):
        merge_alone(change(config, "model", text="other"), vision)
    (root / "one").rename(root / "moved")
    assert merge_alone(change(config, "model", text="moved"), vision) == folder
    shutil.copy(root / "other" / WEIGHTS, root / "moved" / WEIGHTS)  # other weights in its place
    with pytest.raises(InputError, match=r"inputs\.model\.text"):
        merge_alone(change(config, "model", text="moved"), vision)


def test_a_start_within_the_pretrained_rest_has_its_text_tower_too(parted):
    _, config = parted
    config = change(config, "model", text="one")
    start = Checkpoint(merge_alone(config, vision))
    start_in_base(open_experiment(config, vision), vision, start)
    other = change(config, "model", text="other")
    with pytest.raises(InputError, match=r"ta-pretrained-rest/provenance.json was made with inputs\.model\.text"):
        start_in_base(open_experiment(other, vision), vision, start)


def test_heads_that_are_asked_for_later_or_no_longer_are_refused(nlu_config):
    config = merging(nlu_config)
    folder = merge_alone(config, nlu)
    assert read_provenance(folder)["inputs"]["model"] == ALWAYS  # as before there was a record of heads
    with_heads = change(config, "model", heads=("CoLA",))
    with pytest.raises(
        InputError, match=r"says nothing of inputs\.model\.heads: it was made without, or .* now it is \['CoLA'\]"
    ):
        merge_alone(with_heads, nlu)
    said = describe(with_heads, nlu, checks=MERGE, anchored=False)
    assert any("inputs.model.heads" in sentence for sentence in said.refusals)
    with_heads = change(with_heads, "run", name="heads")
    assert (merge_alone(with_heads, nlu) / "heads/CoLA/config.json").is_file()
    merge_alone(with_heads, nlu)
    with pytest.raises(InputError, match=r"inputs\.model\.heads = \['CoLA'\], now it is None"):
        merge_alone(change(with_heads, "model", heads=()), nlu)


def test_the_head_of_an_unmerged_expert_is_told_by_its_bytes(own_nlu):
    config = change(merging(replace(own_nlu, tasks=["CoLA", "STS-B"])), "model", heads=("MNLI",))
    merge_alone(config, nlu)
    merge_alone(config, nlu)
    file = config.model.path("expert", "MNLI") / "model.safetensors"
    rewrite(file, lambda t: t["classifier.out_proj.weight"].add_(1))
    with pytest.raises(InputError, match=r"was made with inputs\.model\.heads_of\.MNLI = "):
        merge_alone(config, nlu)


def test_the_tokenizer_of_an_unmerged_expert_is_told_by_its_bytes(own_nlg):
    root, config = own_nlg
    one = change(replace(config, tasks=["math"]), "eval", tests={"math": ["arithmetic"]})  # its tokenizers: code
    assert "tokenizers_of" not in read_provenance(merge_alone(config, nlg))["inputs"]["model"]
    one = change(one, "run", name="one")
    merge_alone(one, nlg)
    file = root / "code/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": True}))
    with pytest.raises(InputError, match=r"was made with inputs\.model\.tokenizers_of\.code = "):
        merge_alone(one, nlg)


def test_a_head_in_a_file_is_told_by_its_bytes_where_it_is_copied(tmp_path, pico_inputs):
    models = write_pico_classifiers(tmp_path, "vit")
    config = merging(pico_classifier_config(tmp_path, pico_inputs / "data"))
    config = change(config, "model", head="head_{task}.safetensors")
    head, file = models["MNIST"].classifier, tmp_path / "head_MNIST.safetensors"
    write_tensors(file, {"weight": head.weight, "bias": head.bias})
    merge_alone(config, vision)
    write_tensors(file, {"weight": head.weight, "bias": head.bias + 1})
    folder = merge_alone(config, vision)  # none is copied, and a head decides no merge without data
    assert read_provenance(folder)["inputs"]["model"] == ALWAYS
    config = change(change(config, "model", heads=("MNIST",)), "run", name="heads")
    folder = merge_alone(config, vision)
    written = load_file(folder / "heads/MNIST/head.safetensors")["classifier.bias"]
    assert written.tolist() == (head.bias + 1).tolist()
    write_tensors(file, {"weight": head.weight, "bias": head.bias})
    for changed in (config, change(config, "model", head="")):
        with pytest.raises(InputError, match=r"inputs\.model\.head_files\.MNIST"):
            merge_alone(changed, vision)


def test_a_head_in_a_file_decides_a_merge_that_uses_images(tmp_path, pico_inputs, monkeypatch):
    models = write_pico_classifiers(tmp_path, "vit")
    config = merging(pico_classifier_config(tmp_path, pico_inputs / "data"))
    config = change(config, "start", method="adamerging", hyper={"adamerging": {"steps": 1, "examples": 4}})
    plain = read_provenance(merge_alone(config, vision))
    assert plain["scorers"]["MNIST"].keys() == {"task", "arch", "expert", "base", "head"}
    row = vision.TASKS["MNIST"]
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"was made with scorers\.MNIST\.task = "):
        patch.setitem(vision.TASKS, "MNIST", replace(row, classes=row.classes[::-1]))
        merge_alone(config, vision)
    config = change(change(config, "model", head="head_{task}.safetensors"), "run", name="head")
    head, file = models["MNIST"].classifier, tmp_path / "head_MNIST.safetensors"
    write_tensors(file, {"weight": head.weight, "bias": head.bias})
    merge_alone(config, vision)
    write_tensors(file, {"weight": head.weight, "bias": head.bias + 1})
    with pytest.raises(InputError, match=r"was made with scorers\.MNIST\.head = "):
        merge_alone(config, vision)


def test_a_named_architecture_is_recorded_where_it_is_written(pico_config, nlg_config):
    assert json.loads(json.dumps(written_as(pico_config))) == ALWAYS
    assert written_as(change(pico_config, "model", arch="ViT-B-32"))["arch"] == "ViT-B-32"
    text = Path(nlg_config.model.path("base"), "config.json").read_text()
    assert "arch" not in written_as(change(nlg_config, "model", arch=text))  # the base's own file is what is written
    bare = change(nlg_config, "model", arch=text, base="math/model.safetensors.index.json")
    assert written_as(bare)["arch"] == text


def rewritten_configs(config, **fields):
    """The config.json of the base and of every expert with other fields."""
    for file in Path(config.model.root).rglob("config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_anchors_of_layers_that_computed_otherwise_are_refused(own_nlu):
    config = change(own_nlu, "run", score=False)
    construct(config, nlu)
    rewritten_configs(config, transformers_version="5.0.1", architectures=["Other"], hidden_dropout_prob=0.2)
    construct(config, nlu)  # nothing of that reaches a layer: all are kept
    rewritten_configs(config, layer_norm_eps=1e-3)
    with pytest.raises(
        InputError, match=r"block_00\.safetensors was made with model\.computing_fields = sha256:\w+, now"
    ):
        construct(config, nlu)
    assert "made with model.computing_fields" in describe(config, nlu, CONSTRUCT).refusals[0]


def test_the_architecture_that_is_set_decides_the_anchors():
    """open_clip's ViT-B-32 and its quickgelu have tensors of the same names and shapes."""
    model = Model(root="/nowhere", base="base", expert="{task}")
    plain, quick = (replace(model, arch=arch) for arch in ("ViT-B-32", "ViT-B-32-quickgelu"))
    assert computed_as(model) == {}
    assert computed_as(plain) == {"arch": "ViT-B-32"} != computed_as(quick)
