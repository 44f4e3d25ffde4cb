"""Of a trainer's checkpoint the model alone is converted; what is taken off and left out is said."""

import argparse
import json
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, RobertaConfig, get_linear_schedule_with_warmup

from common.core.errors import InputError
from common.io.checkpoints import Checkpoint
from common.io.containers import model_in
from scripts.convert_checkpoint import main

CONFIG = RobertaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(CONFIG)


@pytest.fixture(scope="module")
def optimizer(model):
    """AdamW after a step, so that it keeps two moments of every parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def with_prefix(prefix, state):
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


def containers(state, optimizer):
    """What the trainers of this field write."""
    rest = {"epoch": 3, "optimizer": optimizer.state_dict()}
    best = {"best": np.float64(0.5), "args": argparse.Namespace(lr=1e-5, out=Path("logs")), "seen": defaultdict(dict)}
    loops = {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}}
    callbacks = {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "best_model_path": "x.ckpt"}}
    return {
        "open_clip": {"name": "run", "state_dict": with_prefix("module.", state), "scaler": {"scale": 65536.0}} | rest,
        "lightning": {
            "state_dict": with_prefix("model.", state), "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [], "loops": loops, "callbacks": callbacks, "hyper_parameters": {"lr": 1e-5},
        },
        "timm": {"arch": "roberta", "state_dict": state, "version": 2, "metric": 0.7} | rest | best,
        "dino": {"model": state, "scaler": {"scale": torch.tensor(1.0)}} | rest,
        "deepspeed": {"module": state, "optimizer": None, "global_steps": 10, "param_shapes": [{}], "lr_scheduler": {}},
        "compiled": {"model": with_prefix("_orig_mod.", state), "optimizer_state_dict": optimizer.state_dict()},
        "two levels": {"model": {"state_dict": state}, "optimizer": optimizer.state_dict()},
        "no optimiser": {"model_state_dict": with_prefix("module.", state), "epoch": 3},
        "beside": dict(state) | {"optimizer": optimizer.state_dict()},
        "averaged": {"n_averaged": torch.tensor(4)} | with_prefix("module.", state),
    }  # fmt: skip


KINDS = list(containers({}, nn_optimizer := torch.optim.SGD([nn.Parameter(torch.ones(1))], 1.0)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [True, False], ids=["archive", "stream"])
def test_the_model_alone_comes_out(tmp_path, model, optimizer, kind, new, capsys):
    state = model.state_dict()
    content = containers(state, optimizer)[kind]
    torch.save(content, tmp_path / "epoch_3.pt", _use_new_zipfile_serialization=new)
    assert main([str(tmp_path / "epoch_3.pt"), "--out", str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out" / "epoch_3.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[name], tensor) for name, tensor in state.items())
    said = capsys.readouterr().out
    assert f"{len(state)} tensors" in said
    kinds_with_state = ("open_clip", "timm", "dino", "compiled", "two levels", "beside")
    assert ("left out: " in said and "optimizer" in said) == (kind in kinds_with_state)
    wrapped = ("open_clip", "lightning", "deepspeed", "compiled", "no optimiser", "averaged")
    assert ("without the prefix" in said) == (kind in wrapped)


def test_of_several_models_none_is_taken_unless_it_is_named(tmp_path, model, optimizer, capsys):
    state, moved = model.state_dict(), {n: t + 1 for n, t in model.state_dict().items()}
    for first, second in (("model", "model_ema"), ("state_dict", "state_dict_ema"), ("model", "teacher")):
        torch.save({first: state, second: with_prefix("module.", moved)}, tmp_path / "two.pt")
        assert main([str(tmp_path / "two.pt"), "--out", str(tmp_path)]) == 2
        assert f"holds several models, {first}, {second}; --entry {first} takes" in capsys.readouterr().err
        assert main([str(tmp_path / "two.pt"), "--out", str(tmp_path / first / second), "--entry", second]) == 0
        found = load_file(tmp_path / first / second / "two.safetensors")
        assert found.keys() == state.keys() and all(torch.equal(found[name], moved[name]) for name in state)
    assert main([str(tmp_path / "two.pt"), "--out", str(tmp_path), "--entry", "student"]) == 2
    assert "has no entry student; it has model, teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    "names",
    [
        ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"],
        ["net.weight", "net.bias", "head.weight", "head.bias"],
        ["visual.proj", "logit_scale", "model_projection.weight"],
        ["weight"],
    ],
)
def test_a_plain_state_dict_keeps_its_names(names):
    assert list(model_in(dict.fromkeys(names), "file").tensors) == names


def test_a_file_of_training_state_alone_holds_no_model(tmp_path, optimizer, capsys):
    for content in (optimizer.state_dict(), {"optimizer": optimizer.state_dict(), "epoch": 3}):
        torch.save(content, tmp_path / "last.pt")
        assert main([str(tmp_path / "last.pt"), "--out", str(tmp_path)]) == 2
        assert "holds the state of training" in capsys.readouterr().err


@pytest.fixture
def trainer(tmp_path, model, optimizer):
    """checkpoint-12 as transformers' Trainer leaves it, with pickled weights."""
    folder = tmp_path / "checkpoint-12"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(get_linear_schedule_with_warmup(optimizer, 1, 10).state_dict(), folder / "scheduler.pt")
    torch.save({"cpu": torch.random.get_rng_state(), "numpy": np.random.get_state()}, folder / "rng_state.pth")
    torch.save(nn.Linear(1, 1), folder / "training_args.bin")  # stands for TrainingArguments: whatever it is, unread
    torch.save({"scale": 1.0}, folder / "scaler.pt")
    (folder / "trainer_state.json").write_text("{}")
    CONFIG.save_pretrained(folder)
    return folder


def test_a_trainer_s_folder_becomes_one_that_stock_transformers_opens(trainer, model, capsys):
    before = {file.name for file in trainer.iterdir()}
    assert main([str(trainer), "--out", str(trainer)]) == 0
    assert {file.name for file in trainer.iterdir()} - before == {"model.safetensors"}
    said = capsys.readouterr().out
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"):
        assert f"left out {name}: a trainer's state, no model" in said
    (trainer / "pytorch_model.bin").unlink()
    again = AutoModelForSequenceClassification.from_pretrained(trainer)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


def test_a_target_of_other_weights_is_neither_kept_nor_overwritten(trainer, model, capsys):
    """As when a newer model.safetensors lies beside, or the pickle has changed since it was converted."""
    assert main([str(trainer), "--out", str(trainer)]) == 0
    assert main([str(trainer), "--out", str(trainer)]) == 0
    assert "kept " in capsys.readouterr().out
    changed = {n: t.clone() for n, t in model.state_dict().items()}
    changed["roberta.embeddings.word_embeddings.weight"][7, 7] += 1
    torch.save(changed, trainer / "pytorch_model.bin")
    before = (trainer / "model.safetensors").read_bytes()
    assert main([str(trainer), "--out", str(trainer)]) == 2
    assert "model.safetensors is there and differs from" in (said := capsys.readouterr().err)
    assert "in roberta.embeddings.word_embeddings.weight; remove it" in said
    assert (trainer / "model.safetensors").read_bytes() == before


def test_equal_but_narrower_numbers_are_made_anew_only_for_float32(tmp_path, capsys):
    tensors = {"a": torch.tensor([1.0, torch.nan]).half(), "n": torch.tensor([3, 4])}
    torch.save(tensors, tmp_path / "m.pt")
    wide = ["--float32"]
    for options, verb in (([], "converted"), ([], "kept"), (wide, "converted"), (wide, "kept"), ([], "kept")):
        assert main([str(tmp_path / "m.pt"), "--out", str(tmp_path), *options]) == 0
        assert capsys.readouterr().out.startswith(verb)
    assert load_file(tmp_path / "m.safetensors")["a"].dtype == torch.float32


def test_placeholders_and_codes_are_not_converted(tmp_path, capsys):
    torch.save({"module": {"model.layers.0.mlp.up_proj.weight": torch.empty(0)}, "optimizer": None}, tmp_path / "z.pt")
    torch.save({"a.weight": torch.ones(2, 2, dtype=torch.int8), "a.SCB": torch.ones(2)}, tmp_path / "q.pt")
    for name, words in (("z", "ZeRO-3"), ("q", "quantised (bitsandbytes)")):
        assert main([str(tmp_path / f"{name}.pt"), "--out", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / f"{name}.safetensors").exists()


def test_pickled_shards_are_another_command_s(tmp_path, capsys):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {}}))
    assert main([str(tmp_path), "--out", str(tmp_path)]) == 2
    assert f"NLG/split_model.py {tmp_path} makes safetensors" in capsys.readouterr().err


def test_two_files_do_not_become_one(tmp_path, capsys):
    for suffix in ("pt", "bin"):
        torch.save({"a": torch.ones(1)}, tmp_path / f"m.{suffix}")
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "would both become" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_pointer_to_a_pickle_is_called_so(tmp_path, capsys):
    (tmp_path / "m.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 25248\n")
    assert main([str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "is a Git LFS pointer, not the 25,248 bytes of weights" in capsys.readouterr().err


def test_an_open_clip_pickle_gets_the_name_that_open_clip_prefers(tmp_path):
    torch.save({"visual.proj": torch.ones(2, 2)}, tmp_path / "open_clip_pytorch_model.bin")
    save_file({"vision_model.x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="open_clip opens .*open_clip_pytorch_model.bin, which is a pickle"):
        Checkpoint(tmp_path)
    assert main([str(tmp_path), "--out", str(tmp_path)]) == 0
    assert Checkpoint(tmp_path).shapes == {"visual.proj": (2, 2)}
