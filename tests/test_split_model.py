"""split_model: any layout in, the same model out, in little memory, after any interruption."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.config import ROOT
from common.core.errors import InputError
from common.io.checkpoints import Checkpoint
from common.io.model_files import INDEX_FILE, PICKLED_INDEX
from common.io.shards import copy_stored, read_range
from helpers import files_of
from NLG.split_model import main, part_of, split
from pico_nlg import pico_model, pico_tokenizer

LAYOUTS = ["single", "sharded", "bin", "sharded bin"]
TOKENS = torch.arange(12)[None]


def assert_same_model(found, model):
    """Weights to the last bit. Logits to rounding: BLAS may sum in another order where memory is aligned otherwise."""
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    torch.testing.assert_close(found(TOKENS).logits, model(TOKENS).logits)


def save(model, folder, layout):
    """A checkpoint as save_pretrained writes it, now or (pickled) in former years."""
    model.save_pretrained(folder, max_shard_size="8KB" if "sharded" in layout else "1GB")
    pico_tokenizer().save_pretrained(folder)
    if "bin" not in layout:
        return
    weight_map = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = dict(Checkpoint(file).read_under(""))
        name = file.name.replace("model", "pytorch_model").replace("safetensors", "bin")
        torch.save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        file.unlink()
    if "sharded" in layout:
        (folder / INDEX_FILE).unlink()
        (folder / PICKLED_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    model = pico_model("llama")
    save(model, tmp_path / "in", "sharded")
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_stock_transformers_opens_the_result_with_the_same_logits(tmp_path, layout, family):
    model = pico_model(family)
    save(model, tmp_path / "in", layout)
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a d").input_ids == [3, 39, 6]
    layers = {f"model.layers.{i}.safetensors" for i in range(2)}
    outside = {"model.embed_tokens.safetensors", "model.norm.safetensors", "lm_head.safetensors"}
    weights = layers | outside - ({"lm_head.safetensors"} if family == "gemma" else set())
    assert {f.name for f in (tmp_path / "out").glob("*.safetensors")} == weights


def test_one_file_can_be_split_too(tmp_path):
    save_file({"model.layers.0.a": torch.ones(2).half()}, tmp_path / "in.safetensors")
    split(tmp_path / "in.safetensors", tmp_path / "out")
    assert files_of(tmp_path / "out").keys() == {"model.layers.0.safetensors", INDEX_FILE}


def test_parts_are_layers_and_modules():
    parts = {
        "model.layers.11.mlp.up_proj.weight": "model.layers.11", "lm_head.weight": "lm_head", "bias": "bias",
        "encoder.layer.0.experts.3.weight": "encoder.layer.0", "model.embed_tokens.weight": "model.embed_tokens",
    }  # fmt: skip
    assert {name: part_of(name) for name in parts} == parts


def test_an_interrupted_split_goes_on_and_ends_with_the_same_bytes(llama, tmp_path, monkeypatch):
    split(tmp_path / "in", tmp_path / "alone")
    for survived in (1, 2):
        writes = iter(range(9))

        def dying(*args, stop=survived, writes=writes):
            if next(writes) == stop:
                raise KeyboardInterrupt
            return copy_stored(*args)

        with monkeypatch.context() as patch:
            patch.setattr("NLG.split_model.copy_stored", dying)
            with pytest.raises(KeyboardInterrupt):
                split(tmp_path / "in", tmp_path / "stopped")
        assert INDEX_FILE not in files_of(tmp_path / "stopped")
    times = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "stopped").iterdir()}
    assert len(times) == 3
    split(tmp_path / "in", tmp_path / "stopped")
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "alone")
    assert all((tmp_path / "stopped" / name).stat().st_mtime_ns == then for name, then in times.items())


def test_every_tensor_is_read_once(llama, tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr("common.io.shards.read_range", lambda *where: reads.append(where) or read_range(*where))
    split(tmp_path / "in", tmp_path / "out")
    assert len(reads) == len(set(reads)) == len(llama.state_dict())


def damage(file, how):
    if how == "missing":
        file.unlink()
    if how == "short":
        file.write_bytes(file.read_bytes()[:-1])
    if how == "more":
        torch.save({"weight": torch.ones(2), "epoch": 3}, file)
    if how == "code":
        torch.save({"weight": torch.ones(2), "run": os.system}, file)


@pytest.mark.parametrize(
    ("layout", "how", "message"),
    [
        ("sharded", "missing", "there is no file .*{}"),
        ("sharded", "short", "{} is truncated"),
        ("sharded bin", "missing", "{} cannot be read: No such file"),
        ("sharded bin", "short", "{} is truncated"),
        ("bin", "more", "{} holds more than tensors: 'epoch' is none"),
        ("bin", "code", "{}.* names .*system"),
    ],
)
def test_damaged_input_is_named_in_one_sentence_and_nothing_is_written(tmp_path, capsys, layout, how, message):
    save(pico_model("llama"), tmp_path / "in", layout)
    file = sorted((tmp_path / "in").glob("*model*.safetensors" if "bin" not in layout else "*.bin"))[-1]
    damage(file, how)
    capsys.readouterr()
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    with pytest.raises(InputError, match=message.format(file.name)):
        split(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_refusals(llama, tmp_path):
    with pytest.raises(InputError, match="there is no checkpoint at .*nowhere"):
        split(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(InputError, match="is where the checkpoint is; choose another folder"):
        split(tmp_path / "in", tmp_path / "in")
    save_file({"../../escape.weight": torch.ones(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=r"the tensor '../../escape.weight' has a name that no file can bear"):
        split(tmp_path / "odd.safetensors", tmp_path / "out")
    split(tmp_path / "in", tmp_path / "out")
    save(pico_model("llama"), tmp_path / "other", "single")
    with pytest.raises(InputError, match="out/.*safetensors is of another checkpoint; choose another --out"):
        split(tmp_path / "other", tmp_path / "out")


def test_a_full_disk_keeps_what_is_whole(llama, tmp_path, monkeypatch):
    fsyncs = iter(range(9))

    def full(descriptor):
        if next(fsyncs) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("common.io.checkpoints.os.fsync", full)
        with pytest.raises(InputError, match="cannot write .*safetensors: .*No space left"):
            split(tmp_path / "in", tmp_path / "out")
    assert len(files_of(tmp_path / "out")) == 2
    split(tmp_path / "in", tmp_path / "out")
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), llama)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path):
    tensors = {f"model.layers.{i}.mlp.weight": torch.randn(1000, 5000) for i in range(12)}
    save_file(tensors, tmp_path / "in.safetensors")
    command = [sys.executable, str(ROOT / "NLG/split_model.py"), str(tmp_path / "in.safetensors"), "--out"]
    began = time.monotonic()
    subprocess.run([*command, str(tmp_path / "alone")], check=True, capture_output=True)
    takes = time.monotonic() - began
    for part in range(5):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
        time.sleep(takes * (0.5 + part / 12))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "alone")
