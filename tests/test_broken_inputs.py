"""Broken inputs by the hundred: exit 2 and one sentence that names the file, nothing executed, nothing changed on disk.

Every example damages one file, runs the command within this process, and puts the file back. Where any reader must
refuse what was drawn, so must the command; where the damage may be harmless the command may also succeed, and then only
the folder of its run has changed. No command takes more memory than LIMIT beyond what the process has.
"""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import damage
from commands import Place, call, state
from common.config import Config, as_dict
from common.io.model_files import INDEX_FILE
from common.io.shards import publish_shards, stage_shards
from helpers import as_made, change
from pico_lora import write_adapter
from pico_nlg import pico_config as nlg_config
from pico_nlg import write_pico_models
from pico_vision import pico_config, write_pico_clip

SETTINGS = {  # the same examples at every run; the first that fails is told as it was drawn
    "derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate], "report_multiple_bugs": False,
}  # fmt: skip
TENFOLD = pytest.param(10, marks=pytest.mark.slow)
EXAMPLES = pytest.mark.parametrize("times", [1, TENFOLD])


def check(place: Place, damaged: bytes, harmless: bool, *arguments: str, parsed: bool = True) -> None:
    """The property; `harmless`: the damage may be one that nobody minds."""
    whole = place.path.read_bytes()
    place.seen.add(damaged)
    place.path.write_bytes(damaged)
    kept = place.root / "kept"
    try:
        before = state(place.root)
        if place.written.exists() and harmless:
            shutil.copytree(place.written, kept)
        code, said = call(place, *arguments, parsed=parsed)
        sentence = [line for line in said.splitlines() if line.startswith("error: ")]
        if code != 0 or not harmless:
            assert code == 2, said
            assert len(sentence) == 1 and said.endswith(f"{sentence[0]}\n"), said
            named = str(place.root) if harmless else place.path.name  # a changed name shows beside another file's
            assert named in sentence[0], said
            after = state(place.root)
            changed = [p for p in before.keys() | after.keys() if before.get(p) != after.get(p)]
            assert not [path for path in changed if not path.startswith(str(kept))], f"{changed} changed; {said}"
        assert not (place.root / "ran").exists(), "something in the file was executed"
    finally:
        if kept.exists():
            shutil.rmtree(place.written)
            kept.rename(place.written)
        elif harmless and place.written.exists():
            shutil.rmtree(place.written)
        place.path.write_bytes(whole)


def each(times: int, number: int, places: list[Place], draw, harmless: bool, at_least: float = 0.6) -> None:
    """Check the property for a number of drawn examples, the same at every run."""

    @settings(max_examples=times * number, **SETTINGS)
    @given(st.data())
    def one(data):
        place = data.draw(st.sampled_from(places))
        check(place, data.draw(draw(place.path.read_bytes())), harmless)

    one()
    assert sum(len(place.seen) for place in places) >= at_least * times * number


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory):
    """Hashes of the files here are kept here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    """CLIP checkpoints, and a run with anchors, a start and an adapted model, none of it scored."""
    root = tmp_path_factory.mktemp("vision")
    write_pico_clip(root / "clip")
    for script in ("Vision/construct_fda.py", "Vision/adapt.py"):
        place = Place(root, "", script, vision_config(root, "made", "ta"))
        assert call(place)[0] == 0
    return root


def vision_config(root: Path, name: str, start: str) -> Config:
    config = change(pico_config(root, root / "runs"), "run", score=False, name=name)
    return change(config, "start", method=start)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """Language models: one expert in shards, the other an adapter of rank 2 on an MLP."""
    root = tmp_path_factory.mktemp("nlg")
    write_pico_models(root / "llama", "llama", extra_tokens=0)
    shard(root / "llama" / "math")
    adapter(root / "llama" / "code")
    assert call(Place(root, "", "scripts/merge.py", llama_config(root)))[0] == 0
    shutil.rmtree(root / "runs")
    return root


def llama_config(root: Path) -> Config:
    config = change(nlg_config(root, root / "runs"), "run", score=False)
    return change(config, "model", tokenizers=(), vocabulary="refuse")


def shard(folder: Path) -> None:
    """Several shards and an index in place of one file."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stage_shards(as_made(tensors), folder, 4000)
    publish_shards(folder)


def adapter(folder: Path) -> None:
    """An adapter of rank 2 on a matrix of an MLP in place of the model."""
    shutil.rmtree(folder)
    generator = torch.Generator().manual_seed(0)
    factors = {"A": torch.randn(2, 16, generator=generator), "B": torch.randn(24, 2, generator=generator)}
    module = "model.layers.1.mlp.up_proj"
    write_adapter(folder, {f"{module}.lora_{x}.weight": factor.numpy() for x, factor in factors.items()})


@pytest.fixture(scope="module")
def tensor_files(vision, llama) -> list[Place]:
    """Weights of a base, of experts, of an adapter; anchors; a start."""
    new = vision_config(vision, "new", "ta")
    again = change(vision_config(vision, "made", "ta"), "adapt", label="again")
    merged = change(again, "start", method="ta")
    return [
        Place(vision, "clip/SVHN/finetuned.safetensors", "scripts/merge.py", new),
        Place(vision, "clip/base/open_clip_model.safetensors", "Vision/construct_fda.py", new),
        Place(vision, "runs/made/anchors/weight/MNIST/block_00.safetensors", "Vision/adapt.py", again),
        Place(vision, "runs/made/merged/ta/open_clip_model.safetensors", "Vision/adapt.py", merged),
        Place(llama, "llama/base/model.safetensors", "scripts/merge.py", llama_config(llama)),
        Place(llama, f"llama/math/{shards_of(llama)[1]}", "scripts/merge.py", llama_config(llama)),
        Place(llama, "llama/code/adapter_model.safetensors", "scripts/merge.py", llama_config(llama)),
    ]


def shards_of(root: Path) -> list[str]:
    return [file.name for file in sorted((root / "llama" / "math").glob("*.safetensors"))]


@pytest.fixture(scope="module")
def json_files(vision, llama) -> list[Place]:
    """Configs of models, an index, the settings of an adapter; what a run says of its stages and its models."""
    made = vision_config(vision, "made", "ta")
    return [
        Place(vision, "clip/base/open_clip_config.json", "scripts/merge.py", vision_config(vision, "new", "ta")),
        Place(vision, "runs/made/merged/ta/provenance.json", "scripts/merge.py", made),
        Place(vision, "runs/made/run.json", "Vision/construct_fda.py", made),
        Place(llama, "llama/base/config.json", "scripts/merge.py", llama_config(llama)),
        Place(llama, "llama/math/config.json", "scripts/merge.py", llama_config(llama)),
        Place(llama, f"llama/math/{INDEX_FILE}", "scripts/merge.py", llama_config(llama)),
        Place(llama, "llama/code/adapter_config.json", "scripts/merge.py", llama_config(llama)),
    ]


@EXAMPLES
def test_a_damaged_file_of_tensors_is_refused_by_name(tensor_files, times):
    each(times, 100, tensor_files, damage.broken_tensors, harmless=False)


@EXAMPLES
def test_flipped_bytes_of_a_header_are_refused_or_harmless(tensor_files, times):
    each(times, 50, tensor_files, damage.flipped_bytes, harmless=True)


@EXAMPLES
def test_what_is_no_json_object_is_refused_by_name(json_files, times):
    each(times, 60, json_files, damage.broken_json, harmless=False)


@EXAMPLES
def test_json_with_an_odd_field_is_refused_by_name_or_harmless(json_files, times):
    each(times, 70, json_files, damage.odd_json, harmless=True)


@EXAMPLES
def test_a_weight_that_is_not_finite_is_refused_by_name(vision, llama, times):
    """Wherever it is: in a base, an expert, an adapter, a start or anchors."""
    again = change(vision_config(vision, "made", "ta"), "adapt", label="again")
    for place in (
        Place(vision, "clip/SVHN/finetuned.safetensors", "scripts/merge.py", vision_config(vision, "new", "ta")),
        Place(vision, "runs/made/anchors/weight/MNIST/block_00.safetensors", "Vision/adapt.py", again),
        Place(llama, "llama/base/model.safetensors", "scripts/merge.py", llama_config(llama)),
        Place(llama, "llama/code/adapter_model.safetensors", "scripts/merge.py", llama_config(llama)),
    ):
        names = sorted(set(damage.split_file(place.path.read_bytes())[0]) - {"__metadata__"})
        names = [name for name in names if not place.file.startswith("clip") or name.startswith("visual.")]

        def draw(contents, names=names):
            value = st.sampled_from([float("nan"), float("inf"), -float("inf")])
            return st.builds(damage.spoiled, st.just(contents), st.sampled_from(names), st.integers(0, 10**6), value)

        each(times, 8, [place], draw, harmless=False)


def test_anchors_of_another_shape_or_without_their_tensor_are_refused(vision):
    """Their header is right: only the tensor shows it."""
    again = change(vision_config(vision, "made", "ta"), "adapt", label="again")
    place = Place(vision, "runs/made/anchors/weight/MNIST/block_00.safetensors", "Vision/adapt.py", again)
    header, data = damage.split_file(place.path.read_bytes())
    row = header.pop("anchors")
    a, t, d = row["shape"]
    for changed in ({"anchors": row | {"shape": [a * t, d]}}, {"anchor": row}, {"anchors": row | {"dtype": "I32"}}):
        check(place, damage.joined(header | changed, data), harmless=False)


@pytest.mark.parametrize("alpha", ["Infinity", "NaN", "1" + "0" * 400])
def test_an_adapter_whose_scale_is_not_finite_is_refused(llama, alpha):
    """Such a number is JSON to Python; a merge with it would be NaN, or a traceback."""
    place = Place(llama, "llama/code/adapter_config.json", "scripts/merge.py", llama_config(llama))
    settings_ = place.path.read_text()
    assert settings_.count('"lora_alpha": 6') == 1
    check(place, settings_.replace('"lora_alpha": 6', f'"lora_alpha": {alpha}').encode(), harmless=False)


@EXAMPLES
def test_a_broken_experiment_file_is_refused_by_name(vision, times):
    config = vision_config(vision, "new", "ta")
    place = Place(vision, "configs/experiment.yaml", "scripts/merge.py", config)
    place.path.parent.mkdir(exist_ok=True)
    settings_ = {k: v for k, v in as_dict(config).items() if k != "dry_run"}
    place.path.write_text(yaml.safe_dump(settings_))

    @settings(max_examples=30 * times, **SETTINGS)
    @given(damage.broken_yaml(place.path.read_bytes()))
    def one(damaged):
        damaged = damaged.replace(b"RAN", f'["{vision / "ran"}"]'.encode())
        check(place, damaged, False, "--config", str(place.path), parsed=False)

    one()
