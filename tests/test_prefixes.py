"""Prefixes of training tools go, wherever a checkpoint is read; names that a model really has stay."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, RobertaConfig

from common.core.errors import InputError
from common.io.checkpoints import Checkpoint
from common.io.prefixes import unwrapped
from common.planning.dry_run import Refusals, checkpoint_line
from NLG.scoring import open_model
from NLG.split_model import split
from pico_nlg import pico_model

SMALL = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
RESBLOCK = "transformer.resblocks.0.ln_1.weight"
OPEN_CLIP = ["visual.class_embedding", f"visual.{RESBLOCK}", "logit_scale", RESBLOCK]
WRAPPED = [
    "module.", "_orig_mod.", "model.", "net.", "module.model.", "_orig_mod.module.", "module._orig_mod.model.",
    "_forward_module.model.",
]  # fmt: skip


def names_of(model):
    return list(model.state_dict())


MODELS = {
    "llama": names_of(pico_model("llama")),
    "gemma, tied": [name for name in names_of(pico_model("gemma")) if name != "lm_head.weight"],
    "roberta": names_of(AutoModelForSequenceClassification.from_config(RobertaConfig(**SMALL))),
    "bert, bare": names_of(AutoModel.from_config(BertConfig(**SMALL))),
    "open_clip": OPEN_CLIP,
}


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("model", MODELS)
def test_every_wrapper_goes_from_every_model(model, prefix):
    found = unwrapped([prefix + name for name in MODELS[model]], "file")
    assert list(found.names.values()) == MODELS[model]
    assert str(found).startswith("without the prefix ") and all(word in str(found) for word in prefix.split("."))


@pytest.mark.parametrize("model", MODELS)
def test_a_model_s_own_names_stay(model):
    """Llama's model. is its own, and a tied Llama has no name without it."""
    found = unwrapped(MODELS[model], "file")
    assert list(found.names.values()) == MODELS[model] and found.removed == () and str(found) == ""


TOWERS = [
    ["class_embedding", "conv1.weight", RESBLOCK, "proj"],
    ["module.conv1.weight", f"module.{RESBLOCK}"],
    ["trunk.blocks.0.norm1.weight", "head.proj.weight"],
]


@pytest.mark.parametrize("tower", TOWERS)
def test_an_image_tower_alone_has_the_names_of_the_whole_model(tower):
    found = unwrapped(tower, "file")
    assert list(found.names.values()) == ["visual." + name.removeprefix("module.") for name in tower]
    assert "names behind visual." in str(found)


@pytest.mark.parametrize(
    "names", [["token_embedding.weight", "positional_embedding", RESBLOCK], ["conv1.weight", "layer1.0.conv1.weight"]]
)
def test_a_text_tower_and_a_resnet_are_no_image_tower_alone(names):
    assert list(unwrapped(names, "file").names.values()) == names


REAL = [
    ["model.visual.blocks.0.attn.qkv.weight", "model.language_model.layers.0.mlp.up_proj.weight", "lm_head.weight"],
    ["model.text_model.layers.0.mlp.up_proj.weight", "model.vision_model.encoder.layers.0.layer_norm1.weight"],
    ["model.encoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight", "model.shared.weight"],
    ["language_model.model.layers.0.mlp.up_proj.weight", "vision_tower.vision_model.embeddings.class_embedding"],
    ["backbone.layers.0.mixer.in_proj.weight", "backbone.embeddings.weight"],
    [f"base_model.model.model.layers.0.mlp.up_proj.lora_{factor}.weight" for factor in "AB"],
    ["mlp.up_proj.weight", "mlp.down_proj.weight"],
    ["weight"],
]  # fmt: skip


@pytest.mark.parametrize("names", REAL, ids=lambda names: names[0])
def test_words_that_are_real_in_other_architectures_stay(names):
    assert list(unwrapped(names, "file").names.values()) == names


def test_names_are_those_of_torch_s_own_wrappers():
    """Of DataParallel, compile and AveragedModel around a model, one within another, and activation checkpointing."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.optim.swa_utils import AveragedModel

    model = pico_model("llama")
    expected = names_of(model)
    wrapped = AveragedModel(nn.DataParallel(torch.compile(model)))
    stored = names_of(wrapped)
    assert "n_averaged" in stored and stored[1].startswith("module.module._orig_mod.")
    assert list(unwrapped(stored, "file").names.values()) == expected
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(torch.compile(layer))
    stored = [f"model.layers.{i}._checkpoint_wrapped_module._orig_mod.{n}" for i in range(2) for n in names_of(layer)]
    assert set(unwrapped(stored, "file").names.values()) <= set(expected)


def test_what_lies_beside_the_model_in_a_wrapper_loses_what_it_shares():
    stored = ["module.model.visual.proj", "module.classification_head.weight", "criterion.weight"]
    expected = ["visual.proj", "classification_head.weight", "criterion.weight"]
    assert list(unwrapped(stored, "file").names.values()) == expected


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["model.visual.proj", "ema_model.visual.proj"], "several models, behind ema_model. and model."),
        (["_orig_mod.visual.proj", "visual.proj"], "visual.proj twice, as _orig_mod.visual.proj and as visual.proj"),
        (["_fsdp_wrapped_module._flat_param"], "flat parameter of FSDP.*FULL_STATE_DICT"),
    ],
)
def test_what_cannot_be_told_is_refused(names, sentence):
    with pytest.raises(InputError, match=sentence):
        unwrapped(names, "file")


# ---- everywhere a checkpoint is read ---------------------------------------------------------------------------------


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return pico_model("llama")


def save(model, folder, prefix, inner=""):
    """A folder as save_pretrained writes it, with prefixes before the names and within them."""
    model.save_pretrained(folder)
    tensors = {prefix + n.replace("layers.0.", f"layers.0.{inner}"): t.clone() for n, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("inner", ["", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module.model.", "_fsdp_wrapped_module."])
def test_opened_split_and_scored_a_wrapped_model_is_the_model(tmp_path, llama, prefix, inner):
    folder, state = save(llama, tmp_path / "in", prefix, inner), llama.state_dict()
    opened = Checkpoint(folder)
    assert all(torch.equal(tensor, state[name]) for name, tensor in opened.read_under("").items())
    assert opened.shapes.keys() == state.keys()
    assert "(model.safetensors, without the prefix " in checkpoint_line("base", folder, False, Refusals())
    for name, tensor in open_model(folder, folder, "auto").state_dict().items():
        assert torch.equal(tensor, state[name])
    split(folder, tmp_path / "out")
    assert Checkpoint(tmp_path / "out").unwrapped.removed == ()
    assert Checkpoint(tmp_path / "out").shapes.keys() == state.keys()
