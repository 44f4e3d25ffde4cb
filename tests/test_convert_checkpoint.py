"""The published layout becomes safetensors files with open_clip's own names."""

import runpy
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from common.io.containers import model_in
from released import pickle_3, write_released
from scripts.convert_checkpoint import target_of

SCRIPT = Path(__file__).parent.parent / "scripts" / "convert_checkpoint.py"
main = runpy.run_path(str(SCRIPT))["main"]


class Archive(nn.Module):
    """What OpenAI's archive keeps beside the weights."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(3, 4))
        self.logit_scale = nn.Parameter(torch.tensor(4.6052))
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(77))

    def forward(self, x):
        return self.visual(x) * self.logit_scale


@pytest.fixture
def published(tmp_path):
    """A folder as published, and the tensors that each file holds."""
    folder = tmp_path / "ViT-B-32"
    (folder / "DTD").mkdir(parents=True)
    files = {"zeroshot": "ImageEncoder", "DTD/finetuned": "ImageEncoder", "head_DTD": "ClassificationHead"}
    states = {name: write_released(folder / f"{name}.pt", kind, torch.save) for name, kind in files.items()}
    states["merged_tv"] = write_released(folder / "merged_tv.pt", "ImageEncoder", pickle_3)
    return folder, states


def test_the_tree_is_converted_once(published, tmp_path, capsys):
    folder, states = published
    assert main([str(folder), "--out", str(tmp_path / "safe")]) == 0
    assert capsys.readouterr().out.count("converted ") == 4
    for name, state in states.items():
        found = load_file(tmp_path / "safe" / f"{name}.safetensors")
        assert found.keys() == {key.removeprefix("model.") for key in state}
        assert all(torch.equal(found[key.removeprefix("model.")], tensor) for key, tensor in state.items())
    first = {file: file.read_bytes() for file in (tmp_path / "safe").rglob("*.*")}
    assert len(first) == 4

    cut = tmp_path / "safe" / "head_DTD.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    assert main([str(folder), "--out", str(tmp_path / "safe")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["kept", "converted", "kept", "kept"]
    assert {file: file.read_bytes() for file in (tmp_path / "safe").rglob("*.*")} == first


def test_open_clip_takes_the_names(published, tmp_path):
    folder, states = published
    main([str(folder / "zeroshot.pt"), "--out", str(tmp_path)])
    vision = {"layers": 2, "width": 8, "head_width": 4, "patch_size": 4, "image_size": 8}
    text = {"context_length": 5, "vocab_size": 10, "width": 8, "heads": 2, "layers": 1}
    model = open_clip.CLIP(6, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text), quick_gelu=True)
    missing, unexpected = model.load_state_dict(load_file(tmp_path / "zeroshot.safetensors"), strict=False)
    assert unexpected == [] and missing and all(name.startswith("transformer.") for name in missing)
    assert torch.equal(model.visual.proj, states["zeroshot"]["model.visual.proj"])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_openai_archives_stay_in_half_precision_unless_asked(tmp_path):
    module = Archive().half()
    torch.jit.save(torch.jit.script(module), tmp_path / "ViT-B-32.pt")
    for options, dtype in (([], torch.float16), (["--float32"], torch.float32)):
        assert main([str(tmp_path / "ViT-B-32.pt"), "--out", str(tmp_path), *options]) == 0
        found = load_file(tmp_path / "ViT-B-32.safetensors")
        assert found.keys() == {"visual.0.weight", "visual.0.bias", "logit_scale"}
        for name, tensor in found.items():
            assert tensor.dtype == dtype and torch.equal(tensor, module.state_dict()[name].to(dtype))


def test_a_bad_file_ends_the_run_and_leaves_what_was_made(published, tmp_path):
    folder, _ = published
    whole = (folder / "head_DTD.pt").read_bytes()
    (folder / "head_DTD.pt").write_bytes(whole[: len(whole) // 2])
    run = subprocess.run(
        [sys.executable, SCRIPT, folder, "--out", tmp_path / "safe"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("error: ") and "head_DTD.pt is truncated" in run.stderr
    made = [file.relative_to(tmp_path / "safe").as_posix() for file in (tmp_path / "safe").rglob("*.*")]
    assert made == ["DTD/finetuned.safetensors"]


def test_nothing_to_convert_is_said(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "neither a file nor a folder that holds .pt or .bin files" in capsys.readouterr().err


def test_only_the_released_wrapper_loses_its_prefix():
    def names(*stored):
        return list(model_in(dict.fromkeys(stored), "file").tensors)

    assert names("model.visual.proj", "model.attn_mask") == ["visual.proj"]
    assert names("model.layers.0.mlp.up_proj.weight") == ["model.layers.0.mlp.up_proj.weight"]


def test_a_hugging_face_file_gets_the_name_that_stock_libraries_look_for():
    assert target_of(Path("roberta/pytorch_model.bin")) == Path("roberta/model.safetensors")
    assert target_of(Path("MNIST/finetuned.pt")) == Path("MNIST/finetuned.safetensors")
