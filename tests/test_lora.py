"""Experts as LoRA adapters, in folders that are written here as peft 0.21 writes them.

Expected everywhere: W + s B A, computed here in float64 with numpy.
Source of the layout: huggingface.co/docs/peft/developer_guides/checkpoint and folders of peft 0.21 itself.
"""

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from common.config import Adapt, Anchors, Compare, Config, Eval, Model, Run, Start
from common.core import notices
from common.core.errors import InputError
from common.evaluation.rows import read_results
from common.io.adapters import BESIDE, WEIGHT_FILE
from common.io.checkpoints import Checkpoint
from common.io.lora import LoraCheckpoint, open_checkpoint
from common.opening import open_experiment
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import describe
from common.provenance import inputs_of
from NLG import domain as nlg
from NLG.scoring import open_model, stock_model
from NLU import domain as nlu
from NLU.heads import class_name, read_head
from pico_decoders import fields_of
from pico_lora import write_adapter
from tests import pico_nlg, pico_nlu
from Vision import domain as vision
from Vision import open_clip_models

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Q, UP, EMBED, HEAD = "layers.0.q", "layers.10.up", "embed", "lm_head"
MATRICES = {Q: (6, 6), UP: (8, 6), EMBED: (10, 6), HEAD: (10, 6)}


def random(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.normal(size=shape).astype(np.float32)


def pair(module: str, shape: tuple[int, int], rank: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """A and B of a matrix (out, in)."""
    generator = np.random.default_rng(seed)
    a, b = random(generator, rank, shape[1]), random(generator, shape[0], rank)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def embedding_pair(module: str, shape: tuple[int, int], rank: int = 2) -> dict[str, np.ndarray]:
    """A and B of an embedding (V, D)."""
    a, b = pair(module, shape[::-1], rank).values()
    return {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}


def product(factors: dict[str, np.ndarray], key: str = "lora_") -> np.ndarray:
    """B A in float64."""
    a, b = (tensor.astype(np.float64) for name, tensor in factors.items() if key in name)
    return b @ a


@pytest.fixture
def base(tmp_path) -> Path:
    generator = np.random.default_rng(1)
    tensors = {f"{name}.weight": random(generator, *shape) for name, shape in MATRICES.items()}
    tensors |= {"layers.0.q.bias": random(generator, 6), "norm.weight": random(generator, 6)}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def weight(base: Path, name: str) -> np.ndarray:
    return load_file(base / "model.safetensors")[name].astype(np.float64)


def read(expert: Checkpoint, name: str) -> np.ndarray:
    tensor = expert.read([name])[name]
    assert tensor.dtype == torch.float32
    return tensor.double().numpy()


# ---- whether the file is what its settings say -----------------------------------------------------------------------


def test_an_adapter_without_a_tensor_is_refused(base, tmp_path):
    with pytest.raises(InputError, match=r"adapter_model\.safetensors holds no tensor"):
        LoraCheckpoint(write_adapter(tmp_path / "lora", {}), base)


def test_an_adapter_of_other_modules_than_named_is_refused(base, tmp_path):
    folder = write_adapter(tmp_path / "lora", pair(Q, MATRICES[Q]), target_modules=["up", "down_proj"])
    with pytest.raises(InputError, match=r"has nothing of layers\.10\.up, which target_modules of \S+ names: one"):
        LoraCheckpoint(folder, base)


def test_modules_that_the_file_leaves_out_are_said(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    factors = pair(Q, MATRICES[Q])
    LoraCheckpoint(write_adapter(tmp_path / "all", factors, target_modules=["q", "down_proj"]), base)
    LoraCheckpoint(write_adapter(tmp_path / "some", factors, target_modules=["q", "up"], layers_to_transform=0), base)
    LoraCheckpoint(write_adapter(tmp_path / "pattern", factors, target_modules=r".*\.(q|up)"), base)
    assert capsys.readouterr().err == ""
    expert = LoraCheckpoint(write_adapter(tmp_path / "left", factors, target_modules=["q", "up"]), base)
    assert "has nothing of layers.10.up, which target_modules" in capsys.readouterr().err
    assert np.array_equal(read(expert, f"{UP}.weight"), weight(base, f"{UP}.weight"))


# ---- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "rank", "scale"),
    [
        ({}, 2, 6 / 2),
        ({"r": 4}, 4, 6 / 4),
        ({"use_rslora": True}, 2, 6 / 2**0.5),
        ({"rank_pattern": {"up": 3}}, 3, 6 / 3),
        ({"alpha_pattern": {"layers.0.up": 5}}, 2, 6 / 2),  # of another module; "layers.0.up" does not match layers.10
        ({"alpha_pattern": {r"layers\.\d+\.up": 5, "up": 7}}, 2, 5 / 2),  # the first that matches
        ({"alpha_pattern": {"p": 5}}, 2, 6 / 2),  # the end of a word is no match
        ({"alpha_pattern": {"up": 5}, "rank_pattern": {"up": 3}, "use_rslora": True}, 3, 5 / 3**0.5),
    ],
)
def test_a_matrix_is_w_plus_scaled_b_a(base, tmp_path, settings, rank, scale):
    factors = pair(UP, MATRICES[UP], rank)
    expert = LoraCheckpoint(write_adapter(tmp_path / "lora", factors, **settings), base)
    expected = weight(base, f"{UP}.weight") + scale * product(factors)
    np.testing.assert_allclose(read(expert, f"{UP}.weight"), expected, rtol=0, atol=3e-6)
    assert expert.changed == [f"{UP}.weight"]


def test_fan_in_fan_out_adds_the_transpose(base, tmp_path):
    """Of a layer stored (in, out), as GPT-2 has them, A is (r, in) and B is (out, r)."""
    factors = pair(UP, MATRICES[UP][::-1])
    expert = LoraCheckpoint(write_adapter(tmp_path / "lora", factors, fan_in_fan_out=True), base)
    expected = weight(base, f"{UP}.weight") + 3 * product(factors).T
    np.testing.assert_allclose(read(expert, f"{UP}.weight"), expected, rtol=0, atol=3e-6)


def test_an_embedding_adds_the_transpose(base, tmp_path):
    factors = embedding_pair(EMBED, MATRICES[EMBED])
    expert = LoraCheckpoint(write_adapter(tmp_path / "lora", factors), base)
    expected = weight(base, f"{EMBED}.weight") + 3 * product(factors).T
    np.testing.assert_allclose(read(expert, f"{EMBED}.weight"), expected, rtol=0, atol=3e-6)


def test_an_attention_is_moved_as_peft_moves_it(tmp_path):
    """The fused projection by s B A, the output projection by twice that: so peft's layer trains and merges both."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(6, 2, batch_first=True)})
    save_torch(model.state_dict(), tmp_path / "base.safetensors")
    settings = {"target_modules": ["attn"], "r": 2, "lora_alpha": 6, "rank_pattern": {"attn": 3}}
    adapted = peft.get_peft_model(deepcopy(model), peft.LoraConfig(**settings, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    merged = adapted.merge_and_unload().state_dict()
    expert = LoraCheckpoint(tmp_path / "lora", tmp_path / "base.safetensors")
    stored = {n.removeprefix("base_model.model."): t for n, t in load_file(tmp_path / "lora" / WEIGHT_FILE).items()}
    for name, module, times in (("in_proj_weight", "", 1), ("out_proj.weight", "base_layer.out_proj.", 2)):
        factors = {n: t for n, t in stored.items() if n.startswith(f"attn.{module}lora")}
        expected = model.state_dict()[f"attn.{name}"].double().numpy() + times * 6 / 3 * product(factors)
        np.testing.assert_allclose(read(expert, f"attn.{name}"), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(merged[f"attn.{name}"], expected, rtol=0, atol=1e-6)
    assert expert.changed == ["attn.in_proj_weight", "attn.out_proj.weight"]


def test_a_convolution_is_moved_by_the_product_of_its_factors(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"patches": torch.nn.Conv2d(3, 5, kernel_size=(2, 4), bias=False)})
    save_torch(model.state_dict(), tmp_path / "base.safetensors")
    adapted = peft.get_peft_model(
        deepcopy(model), peft.LoraConfig(target_modules=["patches"], r=2, lora_alpha=6, init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "lora")
    expected = adapted.merge_and_unload().state_dict()["patches.weight"]
    expert = LoraCheckpoint(tmp_path / "lora", tmp_path / "base.safetensors")
    np.testing.assert_allclose(read(expert, "patches.weight"), expected, rtol=0, atol=1e-6)


def test_half_precision_is_a_storage_format(base, tmp_path):
    factors = pair(UP, MATRICES[UP])
    halves = {f"base_model.model.{name}": torch.tensor(t).bfloat16() for name, t in factors.items()}
    folder = write_adapter(tmp_path / "lora", factors)
    save_torch(halves, folder / "adapter_model.safetensors")
    expected = weight(base, f"{UP}.weight") + 3 * product({n: t.float().numpy() for n, t in halves.items()})
    np.testing.assert_allclose(read(LoraCheckpoint(folder, base), f"{UP}.weight"), expected, rtol=0, atol=3e-6)


def test_what_has_no_factors_is_the_base_s(base, tmp_path):
    expert = LoraCheckpoint(write_adapter(tmp_path / "lora", pair(UP, MATRICES[UP])), base)
    stored = Checkpoint(base)
    assert expert.shapes == stored.shapes
    for name in stored.names():
        assert (read(expert, name) == read(stored, name)).all() == (name != f"{UP}.weight")


@pytest.mark.parametrize(
    "key", ["lm_head.weight", "lm_head.modules_to_save.weight", "lm_head.modules_to_save.default.weight"]
)
def test_a_module_trained_whole_replaces_the_base_s(base, tmp_path, key):
    head = random(np.random.default_rng(5), *MATRICES[HEAD])
    folder = write_adapter(tmp_path / "lora", {key: head} | pair(Q, MATRICES[Q]), modules_to_save=["lm_head"])
    assert (read(LoraCheckpoint(folder, base), "lm_head.weight") == head).all()


def test_a_module_that_the_base_lacks_comes_with_the_adapter(base, tmp_path):
    tensors = {"classifier.dense.weight": random(np.random.default_rng(5), 3, 6)} | pair(Q, MATRICES[Q])
    folder = write_adapter(tmp_path / "lora", tensors, modules_to_save=["classifier", "score"])
    expert = LoraCheckpoint(folder, base)
    assert expert.shapes["classifier.dense.weight"] == (3, 6)
    assert (read(expert, "classifier.dense.weight") == tensors["classifier.dense.weight"]).all()


def test_an_embedding_with_more_rows_and_factors(base, tmp_path):
    """peft stores such an embedding whole as base_layer; its factors are added to that. Then rows are cut or filled."""
    grown = random(np.random.default_rng(5), 12, 6)
    factors = embedding_pair(EMBED, (12, 6))
    expert = LoraCheckpoint(write_adapter(tmp_path / "lora", {"embed.base_layer.weight": grown} | factors), base)
    expected = grown.astype(np.float64) + 3 * product(factors).T
    np.testing.assert_allclose(read(expert, "embed.weight"), expected, rtol=0, atol=3e-6)
    expert.resize({"embed.weight": (10, 6), "lm_head.weight": (12, 6)})
    np.testing.assert_allclose(read(expert, "embed.weight"), expected[:10], rtol=0, atol=3e-6)
    head = weight(base, "lm_head.weight")
    np.testing.assert_allclose(read(expert, "lm_head.weight")[10:], [head.mean(0)] * 2, rtol=0, atol=1e-6)


def test_names_are_mapped_as_those_of_any_checkpoint(base, tmp_path):
    """The adapter's model has a prefix that the base's file lacks; what the family leaves out is left out."""
    factors = pair("model." + UP, MATRICES[UP]) | pair("model." + HEAD, MATRICES[HEAD])

    def names(stored: str) -> str | None:
        name = stored.removeprefix("model.")
        return None if name.startswith(("lm_head", "embed", "score")) else name

    folder = write_adapter(
        tmp_path / "lora", factors | {"score.weight": np.ones((2, 6), "f4")}, modules_to_save=["score"]
    )
    expert = LoraCheckpoint(folder, base, names)
    assert expert.changed == [f"{UP}.weight"]
    assert expert.shapes == {f"{UP}.weight": (8, 6), f"{Q}.weight": (6, 6), f"{Q}.bias": (6,), "norm.weight": (6,)}


def test_the_fingerprint_covers_settings_adapter_and_base(base, tmp_path):
    def fingerprint(shift: float = 0.0, base: Path = base, **settings) -> str:
        factors = {name: t + np.float32(shift) for name, t in pair(UP, MATRICES[UP]).items()}
        return LoraCheckpoint(write_adapter(tmp_path / "lora", factors, **settings), base).fingerprint()

    shutil.copytree(base, tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"norm.weight": tensors["norm.weight"] + 1}, tmp_path / "other" / "model.safetensors")
    found = [fingerprint(), fingerprint(1.0), fingerprint(lora_alpha=7), fingerprint(base=tmp_path / "other")]
    assert len(set(found)) == 4 and fingerprint() == found[0]


def test_opening_reads_headers_only_and_a_read_touches_what_it_needs(base, tmp_path, monkeypatch):
    folder = write_adapter(tmp_path / "lora", pair(UP, MATRICES[UP]) | pair(Q, MATRICES[Q]))
    log = logged(monkeypatch)
    expert = open_checkpoint(folder, base)
    assert log == []
    expert.read([f"{UP}.weight", "norm.weight"])
    assert log == [f"{UP}.weight", "norm.weight", *(f"base_model.model.{UP}.lora_{x}.weight" for x in "BA")]


def logged(monkeypatch) -> list[str]:
    """The names of the tensors that are read from files from now on."""
    log, plain = [], Checkpoint.read

    def read(self, names):
        names = list(names)
        log.extend(names)
        return plain(self, names)

    monkeypatch.setattr(Checkpoint, "read", read)
    return log


# ---- what is refused -------------------------------------------------------------------------------------------------


UP_PAIR = pair(UP, MATRICES[UP])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is True"),
        (
            {"layer_replication": [[0, 2], [1, 3]]},
            r"layer_replication is \[\[0, 2\], \[1, 3\]\]; .*leave this expert out",
        ),
        ({"arrow_config": {"top_k": 2}}, "arrow_config is {'top_k': 2}; .*, so leave this expert out"),
        ({"peft_type": "XLORA"}, "peft_type is 'XLORA'; only plain LoRA, .*, so leave this expert out"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; only plain LoRA, .* merge_and_unload"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'; only plain LoRA, .*, so leave this expert out"),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens is .3, 4.; .*, so leave this expert out"),
        ({"use_next": True}, "use_next is True, a setting unknown here, .*take it out if it does not, else let peft"),
        ({"next_config": {"scale": 2}}, "next_config is {'scale': 2}, a setting unknown here"),
        ({"r": None}, "is no adapter config, JSON with peft_type, r and lora_alpha"),
        ({"r": 0}, "r and lora_alpha must be above zero"),
    ],
)
def test_settings_that_make_it_no_plain_lora_are_refused(base, tmp_path, settings, message):
    folder = write_adapter(tmp_path / "lora", UP_PAIR, **settings)
    with pytest.raises(InputError, match=message) as error:
        LoraCheckpoint(folder, base)
    assert "\n" not in str(error.value) and str(folder / "adapter_config.json") in str(error.value)


@pytest.mark.parametrize("kind", sorted({kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING}))
def test_kinds_of_adapters_that_are_no_layers_are_left_out(kind):
    """Those that peft has as inputs of a model have no merge_and_unload."""
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING[PeftType(kind)], "merge_and_unload"):
        assert kind in BESIDE


def test_an_adapter_beside_a_whole_model_is_taken_and_said(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notices, "_said", set())
    folder = write_adapter(tmp_path / "lora", UP_PAIR)
    alone = LoraCheckpoint(folder, base).read([f"{UP}.weight"])
    assert capsys.readouterr().err == ""
    shutil.copy(base / "model.safetensors", folder)
    assert torch.equal(LoraCheckpoint(folder, base).read([f"{UP}.weight"])[f"{UP}.weight"], alone[f"{UP}.weight"])
    assert f"{folder} holds an adapter and a whole model, model.safetensors: the adapter" in capsys.readouterr().err


def test_settings_that_leave_it_a_plain_lora_are_passed_over(base, tmp_path):
    """Those that are switched off, that are numbers or words, or that say how the factors were found."""
    plain = LoraCheckpoint(write_adapter(tmp_path / "plain", UP_PAIR), base).read([f"{UP}.weight"])
    settings = {"use_next": False, "next_config": {}, "group_size": 16, "revision": "main", "eva_config": {"rho": 2.0}}
    found = LoraCheckpoint(write_adapter(tmp_path / "more", UP_PAIR, **settings), base).read([f"{UP}.weight"])
    assert torch.equal(found[f"{UP}.weight"], plain[f"{UP}.weight"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair("layers.1.q", (6, 6)), r"layers\.1\.q\.lora_A\.weight matches no tensor of the base .*/base"),
        ({"score.weight": np.ones((2, 6), "f4")}, "score.weight matches no tensor of the base"),
        ({f"{UP}.lora_magnitude_vector": np.ones(8, "f4")}, "lora_magnitude_vector matches no tensor"),
        ({f"{UP}.lora_A.weight": UP_PAIR[f"{UP}.lora_A.weight"]}, r"has .*lora_A\.weight, but lacks .*lora_B\.weight"),
        ({f"{UP}.lora_B.weight": UP_PAIR[f"{UP}.lora_B.weight"]}, r"has .*lora_B\.weight, but lacks .*lora_A\.weight"),
        (
            pair(UP, (6, 8)),
            rf"{UP}\.lora_A\.weight is for \(6, 8\), {UP}\.weight is \(8, 6\) in .*/base; model\.base must be the "
            "model it was trained from, nowhere/nothing",
        ),
        (pair(UP, (8, 6), rank=3), r"have ranks \(3, 3\), adapter_config.json says 2"),
    ],
)
def test_keys_that_do_not_fit_the_base_are_named(base, tmp_path, tensors, message):
    folder = write_adapter(tmp_path / "lora", tensors)
    with pytest.raises(InputError, match=message) as error:
        LoraCheckpoint(folder, base)
    assert "\n" not in str(error.value) and str(folder / "adapter_model.safetensors") in str(error.value)


def test_a_key_without_peft_s_prefix_is_named(base, tmp_path):
    folder = write_adapter(tmp_path / "lora", UP_PAIR)
    save_file(UP_PAIR, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=rf"{UP}\.lora_A\.weight matches no tensor of the base"):
        LoraCheckpoint(folder, base)


def test_an_adapter_of_another_architecture_is_refused_by_its_names(base, tmp_path):
    folder = write_adapter(tmp_path / "lora", pair("distilbert.q_lin", (6, 6)))
    with pytest.raises(InputError, match=r"distilbert\.q_lin\.lora_A\.weight matches no tensor"):
        LoraCheckpoint(folder, base, lambda stored: stored if stored.startswith("layers.") else None)


def test_nan_in_a_factor_is_named(base, tmp_path):
    expert = LoraCheckpoint(write_adapter(tmp_path / "lora", {n: t * np.nan for n, t in UP_PAIR.items()}), base)
    with pytest.raises(InputError, match=r"lora_B\.weight holds NaN or Inf"):
        expert.read([f"{UP}.weight"])


def test_a_pickled_adapter_is_not_opened(base, tmp_path):
    folder = write_adapter(tmp_path / "lora", UP_PAIR)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin, a pickle; save it as adapter_model\.safetensors"):
        LoraCheckpoint(folder, base)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"there is no checkpoint at .*adapter_model\.safetensors"):
        LoraCheckpoint(folder, base)


def test_an_adapter_is_no_base(tmp_path):
    with pytest.raises(InputError, match="holds an adapter, which can be an expert only"):
        Checkpoint(write_adapter(tmp_path / "lora", UP_PAIR))


# ---- the whole way, beside the same expert as a whole model ----------------------------------------------------------


def nlu_inputs(root: Path, family: str = "roberta") -> Config:
    """STS-B's expert is an adapter in lora/ and the same model whole in full/; CoLA's is whole in both."""
    for kind in ("full", "lora"):
        pico_nlu.write_pico_encoders(root / kind, family, ["CoLA", "STS-B"])
    pico_nlu.write_pico_texts(root / "data", ["CoLA", "STS-B"])
    base = load_file(root / "full" / "base" / "model.safetensors")
    whole = load_file(root / "full" / "stsb" / "model" / "model.safetensors")
    factors, whole = {}, {n: base.get(n, t) for n, t in whole.items()}
    for seed, name in enumerate(n for n in base if n.endswith(("query.weight", "output.dense.weight")) and n in whole):
        own = pair(name.removesuffix(".weight"), base[name].shape, seed=seed)
        whole[name] = (base[name] + 0.1 / 2 * product(own)).astype(np.float32)
        factors |= own
    save_file(whole, root / "full" / "stsb" / "model" / "model.safetensors", {"format": "pt"})
    shutil.rmtree(root / "lora" / "stsb" / "model")
    factors |= {n: t for n, t in whole.items() if not n.startswith(f"{family}.")}
    settings = {"lora_alpha": 0.1, "modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}
    write_adapter(root / "lora" / "stsb" / "model", factors, **settings)
    config = pico_nlu.pico_config(root, root, family)
    return replace(config, tasks=["CoLA", "STS-B"], model=replace(config.model, root=str(root / "lora")))


def nlg_inputs(root: Path) -> Config:
    """The expert for code is an adapter in lora/ and the same model whole in full/; one token more than the base."""
    for kind in ("full", "lora"):
        pico_nlg.write_pico_models(root / kind, "llama")
    pico_nlg.write_pico_tests(root / "data")
    base = load_file(root / "full" / "base" / "model.safetensors")
    whole = load_file(root / "full" / "code" / "model.safetensors")
    grown = {n: whole[n] for n in ("model.embed_tokens.weight", "lm_head.weight")}
    factors, whole = dict(grown), base | grown
    for seed, name in enumerate(n for n in base if n.endswith(("q_proj.weight", "down_proj.weight"))):
        own = pair(name.removesuffix(".weight"), base[name].shape, seed=seed)
        whole[name] = (base[name] + 0.1 / 2 * product(own)).astype(np.float32)
        factors |= own
    save_file(whole, root / "full" / "code" / "model.safetensors", {"format": "pt"})
    for file in ("model.safetensors", "config.json"):
        (root / "lora" / "code" / file).unlink()  # the tokenizer stays, as trainers save it beside an adapter
    write_adapter(root / "lora" / "code", factors, lora_alpha=0.1, task_type="CAUSAL_LM")
    config = pico_nlg.pico_config(root, root)
    return replace(config, model=replace(config.model, root=str(root / "lora")))


def with_full(config: Config) -> Config:
    model: Model = replace(config.model, root=config.model.root.removesuffix("lora") + "full")
    return replace(config, model=model, run=replace(config.run, name="full"))


@pytest.mark.parametrize(("inputs", "domain"), [(nlu_inputs, nlu), (nlg_inputs, nlg)], ids=["nlu", "nlg"])
def test_an_adapter_gives_what_the_same_expert_whole_gives(tmp_path, inputs, domain):
    """Construct, adapt and score: the same merged models and the same rows, but for the fingerprints."""
    config = inputs(tmp_path)
    config = replace(config, start=replace(config.start, method="ta"))
    results = []
    for each in (config, with_full(config)):
        construct(each, domain)
        start, adapted = merge_alone(each, domain), adapt(each, domain)
        rows = read_results(each.run.dir / "results.json")[0]
        scores = {(r["method"], r["task"]): r["value"] for r in rows}
        for file in each.run.dir.rglob("completions/*/*.jsonl"):  # full-code.jsonl and lora-code.jsonl
            scores[file.parent.name, file.name.split("-", 1)[1]] = file.read_text()
        results.append((Checkpoint(start).read_under(""), Checkpoint(adapted).read_under(""), scores))
    (start, adapted, scores), (full_start, full_adapted, full_scores) = results
    torch.testing.assert_close(start, full_start, rtol=0, atol=1e-6)
    for name in (n for n in adapted if not n.endswith("key.bias")):  # which has no gradient, and Adam follows noise
        torch.testing.assert_close(adapted[name], full_adapted[name], rtol=0, atol=1e-4)
    assert scores == pytest.approx(full_scores, abs=1e-6)
    assert len(set(scores.values())) > 4, "models that all answer alike show nothing"


def test_a_merge_forms_each_tensor_once(tmp_path, monkeypatch):
    config = nlu_inputs(tmp_path)
    log = logged(monkeypatch)
    config = replace(config, start=replace(config.start, method="ta"), run=replace(config.run, score=False))
    merge_alone(config, nlu)
    factors = [name for name in log if "encoder" in name and ".lora_" in name]
    assert len(factors) == len(set(factors)) == 2 * 2 * 3  # A and B; two layers; query and the two output.dense


def test_the_dry_run_says_that_it_is_an_adapter(tmp_path):
    config = nlg_inputs(tmp_path)
    assert f"found      expert code: {tmp_path}/lora/code (LoRA adapter, 10 tensors)" in describe(config, nlg).text
    (tmp_path / "lora" / "code" / "adapter_model.safetensors").unlink()
    assert "MISSING    expert code: there is no checkpoint at" in describe(config, nlg).text


def test_provenance_changes_with_the_adapter(tmp_path):
    config = nlg_inputs(tmp_path)
    before = inputs_of(open_experiment(config, nlg))
    settings = json.loads((tmp_path / "lora" / "code" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "code" / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 0.2}))
    assert inputs_of(open_experiment(config, nlg)) != before


# ---- heads and models for scoring ------------------------------------------------------------------------------------


def test_the_head_of_a_classifier_comes_from_the_adapter(tmp_path):
    config = nlu_inputs(tmp_path)
    head, whole = read_head(config.model, "STS-B"), read_head(with_full(config).model, "STS-B")
    assert head["classifier.out_proj.weight"].shape == (1, 16)
    torch.testing.assert_close(head, whole, rtol=0, atol=0)
    heads = replace(config.model, heads=("STS-B",))
    merged = merge_alone(replace(config, model=heads, start=replace(config.start, method="ta")), nlu)
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(merged / "heads" / "STS-B")
    torch.testing.assert_close(opened.state_dict()["classifier.out_proj.weight"], head["classifier.out_proj.weight"])


@pytest.mark.parametrize("bare", [False, True])
def test_the_pooler_of_a_bert_is_the_base_s_with_the_adapter_s_part(tmp_path, bare):
    """peft keeps no pooler that was not trained; a bare base calls it pooler, a classifier bert.pooler."""
    config = nlu_inputs(tmp_path, "bert")
    folder, file = tmp_path / "lora" / "stsb" / "model", tmp_path / "lora" / "base" / "model.safetensors"
    pooler = pair("bert.pooler.dense", (16, 16))
    head = {"classifier.weight": np.ones((1, 16), "f4"), "classifier.bias": np.ones(1, "f4")}
    write_adapter(folder, head | pooler, modules_to_save=["classifier", "score"])
    with pytest.raises(InputError, match=r"bert\.pooler\.dense\.lora_A\.weight matches no tensor of the base"):
        read_head(config.model, "STS-B")
    generator = np.random.default_rng(0)
    prefix = "" if bare else "bert."
    own = {
        f"{prefix}pooler.dense.weight": random(generator, 16, 16),
        f"{prefix}pooler.dense.bias": random(generator, 16),
    }
    save_file(load_file(file) | own, file, {"format": "pt"})
    found = read_head(config.model, "STS-B")
    expected = own[f"{prefix}pooler.dense.weight"] + 3 * product(pooler)
    np.testing.assert_allclose(found["bert.pooler.dense.weight"].numpy(), expected, rtol=0, atol=3e-6)
    assert (found["bert.pooler.dense.bias"].numpy() == own[f"{prefix}pooler.dense.bias"]).all()
    open_experiment(config, nlu)


def test_the_head_of_an_adapter_without_a_config_tells_its_outputs(tmp_path):
    """As peft saves it: of a task that tasks.yaml does not list, the saved classifier says how many there are."""
    config = nlu_inputs(tmp_path)
    folder = tmp_path / "lora" / "own" / "model"
    shutil.copytree(tmp_path / "lora" / "stsb" / "model", folder)
    (folder / "config.json").unlink(missing_ok=True)
    torch.testing.assert_close(read_head(config.model, "own"), read_head(config.model, "STS-B"), rtol=0, atol=0)
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "out_proj" not in name}
    save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match="own/model has an adapter without classifier.out_proj.weight, classifier.out_"
    ):
        read_head(config.model, "own")


@pytest.mark.parametrize(
    ("task", "kind"), [("TOKEN_CLS", "TokenClassification"), ("QUESTION_ANS", "QuestionAnswering")]
)
def test_the_head_of_an_adapter_is_of_the_kind_that_peft_names(tmp_path, task, kind):
    config, folder = nlu_inputs(tmp_path, "bert"), tmp_path / "lora" / "own" / "model"
    name, rows = ("classifier", 5) if task == "TOKEN_CLS" else ("qa_outputs", 2)
    head = {f"{name}.weight": np.ones((rows, 16), "f4"), f"{name}.bias": np.ones(rows, "f4")}
    write_adapter(folder, head, modules_to_save=[name], task_type=task)
    assert {n: tuple(t.shape) for n, t in read_head(config.model, "own").items()} == {
        f"{name}.weight": (rows, 16), f"{name}.bias": (rows,)
    }  # fmt: skip
    assert class_name(config.model, "own") == f"BertFor{kind}"


def test_a_head_with_another_number_of_outputs_is_refused(tmp_path):
    config = nlu_inputs(tmp_path)
    shutil.move(tmp_path / "lora" / "stsb", tmp_path / "lora" / "mnli")
    with pytest.raises(InputError, match=r"the head in .*mnli/model: classifier\.out_proj\.\w+: \(1.*\) against \(3"):
        read_head(config.model, "MNLI")


def test_a_model_for_scoring_is_the_base_with_the_formed_tensors(tmp_path):
    nlg_inputs(tmp_path)
    model = open_model(tmp_path / "lora" / "code", tmp_path / "lora" / "base", torch.float32)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "code")
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=1e-6)


def test_a_head_that_was_not_kept_gets_the_mean_for_new_tokens(tmp_path):
    """peft keeps the grown embedding alone where that is adapted; rows of the head then follow the one policy."""
    nlg_inputs(tmp_path)
    folder, base = tmp_path / "lora" / "code", tmp_path / "lora" / "base"
    grown = np.zeros((pico_nlg.VOCABULARY + 1, 16), "f4")
    name = "model.embed_tokens"
    write_adapter(folder, {f"{name}.base_layer.weight": grown} | embedding_pair(name, grown.shape))
    head = open_model(folder, base, torch.float32).state_dict()["lm_head.weight"]
    stored = load_file(base / "model.safetensors")["lm_head.weight"]
    np.testing.assert_allclose(head[-1], stored.mean(0), rtol=0, atol=1e-6)


def test_the_harness_is_told_to_use_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr("NLG.scoring.check_backend", lambda *_: None)
    config = nlg_inputs(tmp_path)
    config = replace(config, eval=replace(config.eval, backend="lm-eval-hf"))
    with pytest.raises(InputError, match=r"lm-eval-hf needs whole models, .*/code is an adapter; use transformers"):
        next(nlg.score(config, "functions", {"individual": tmp_path / "lora" / "code"}, torch.device("cpu")))


def test_an_adapter_of_a_clip_is_merged_and_scored(pico_config, tmp_path):
    module = "visual.transformer.resblocks.0.mlp.c_fc"
    for seed, task in enumerate(pico_config.tasks):
        write_adapter(tmp_path / "experts" / task, pair(module, (64, 16), seed=seed))
    config = replace(pico_config, model=replace(pico_config.model, expert=str(tmp_path / "experts" / "{task}")))
    base = Checkpoint(config.model.path("base")).read([f"{module}.weight"])[f"{module}.weight"]
    empty, *_ = open_clip_models.classifier(config, "SVHN")
    tower = vision.filled(empty, "", config.model, config.model.path("expert", "SVHN"), torch.device("cpu")).visual
    formed = base.numpy() + 3 * product(pair(module, (64, 16), seed=1))
    np.testing.assert_allclose(tower.transformer.resblocks[0].mlp.c_fc.weight.detach(), formed, rtol=1e-5, atol=1e-6)
    construct(config, vision)
    adapt(config, vision)
    rows, _ = read_results(config.run.dir / "results.json")
    assert {r["task"] for r in rows if r["method"] == "individual"} == set(config.tasks)


@pytest.mark.parametrize("targets", [["attn.c_proj", "lm_head"], ["c_attn", "lm_head"], ["c_fc", "c_proj"]], ids=str)
def test_whether_a_change_is_turned_is_told_of_each_module(tmp_path, targets):
    """peft writes fan_in_fan_out for all modules as it is of the last: false with a head that is a linear map behind
    the layers of a GPT-2, which are none. Expected is what peft itself makes of both."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**fields_of("gpt2"))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = deepcopy(model.state_dict())
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "code")
    expected = adapted.merge_and_unload().state_dict()
    assert settings.fan_in_fan_out == ("lm_head" not in targets)
    model = Model(root=str(tmp_path), base="base", expert="{task}")
    start, run = Start("ta", hyper={"ta": {"scale": 1.0}}), Run(name="turned", root=str(tmp_path / "runs"), score=False)
    merged = merge_alone(Config("nlg", model, ["code"], Anchors(), start, Adapt(), Eval(), Compare(), run), nlg)
    opened = open_model(tmp_path / "code", tmp_path / "base", torch.float32), stock_model(merged, torch.float32)
    for found in opened:
        torch.testing.assert_close(found.state_dict(), expected, rtol=0, atol=1e-6)
    changed = {name for name in expected if not torch.equal(expected[name], before[name])}
    assert len(changed) == sum(name.endswith(tuple(f"{t}.weight" for t in targets)) for name in before)
