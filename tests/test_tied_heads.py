"""Embeddings and output heads that are one tensor or two: merged models answer as stock transformers and peft do.

Expected: the logits of peft's own model, or of transformers' model with the weights put together by hand.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from common.config import Adapt, Anchors, Compare, Config, Eval, Model, Run, Start
from common.core.errors import InputError
from common.opening import open_experiment
from common.pipeline import merge_alone
from NLG import domain
from NLG.scoring import open_model
from pico_nlg import PICO, VOCABULARY, pico_model, pico_tokenizer, save

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.arange(3, 35)[None]
KINDS = {
    "lora on the embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "lora on the head": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "lora on both": ({"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, False),
    "lora on both as one": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
    "embedding saved": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "head saved": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "both saved": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "both saved as one": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "lora on the embedding, head saved": (
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        False,
    ),
    "neither": ({"target_modules": ["q_proj", "down_proj"]}, True),
}


SEEING = {
    "llava": ({"model_type": "qwen2"}, {"model_type": "clip_vision_model"}, {"image_token_index": 3}),
    "paligemma": ({"model_type": "gemma"}, {"model_type": "siglip_vision_model"}, {"image_token_index": 3}),
    "idefics3": ({"model_type": "llama"}, {}, {"image_token_id": 3, "scale_factor": 2}),
    "qwen2_vl": (
        {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}},
        {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        {},
    ),
}


def write_seeing(root: Path, kind: str) -> None:
    """A base and two experts of a pico model that sees images, its head not tied."""
    text, eye, more = SEEING[kind]
    eye = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2} | eye
    fields = {
        "text_config": PICO | text | {"tie_word_embeddings": False},
        "vision_config": {"image_size": 16, "patch_size": 8, "projection_dim": 16} | eye,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(kind, **fields | more)
    for name in ("base", "a", "b"):
        AutoModelForImageTextToText.from_config(config).save_pretrained(root / name)


@pytest.mark.parametrize("lost", ["a", "base", "all"])
@pytest.mark.parametrize("kind", SEEING)
def test_a_model_that_sees_and_lost_its_head_is_refused(tmp_path, kind, lost):
    """As any language model; stock transformers would draw a head at random."""
    write_seeing(tmp_path, kind)
    for name in ("base", "a", "b") if lost == "all" else (lost,):
        (file,) = (tmp_path / name).glob("*.safetensors")
        save_file({n: t for n, t in load_file(file).items() if "lm_head" not in n}, file, {"format": "pt"})
    config = config_of(tmp_path, "a", "b")
    config = replace(config, model=replace(config.model, family="auto"))
    who = "base" if lost == "all" else lost
    with pytest.raises(InputError, match=rf"{who} has no tensor \S*lm_head.weight, and its config.json says .* lost"):
        merge_alone(config, domain)
    assert not config.run.dir.exists()


def config_of(root: Path, *tasks: str, scale: float = 1.0, **model) -> Config:
    return Config(
        domain="nlg",
        model=Model(family="qwen2", root=str(root), base="base", expert="{task}", **model),
        tasks=list(tasks),
        anchors=Anchors(number=4, steps=3),
        adapt=Adapt(),
        eval=Eval(tests={task: [] for task in tasks}),
        compare=Compare(),
        start=Start(method="ta", hyper={"ta": {"scale": scale}}),
        run=Run(name="-".join(tasks), root=str(root / "runs"), device="cpu", score=False),
    )


def write_base(root: Path, tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    base = pico_model("qwen2", tie_word_embeddings=tied)
    save(base, pico_tokenizer(), root / "base")
    return base


def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits[..., :VOCABULARY]


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def write_trained_adapter(root: Path, more_tokens: int, **settings) -> torch.Tensor:
    """An adapter of the base in root/expert with random factors and trained modules; what peft's model answers."""
    torch.manual_seed(1)
    model = opened(root / "base")
    if more_tokens:
        model.resize_token_embeddings(VOCABULARY + more_tokens, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_" in name:
                weight.normal_(0, 0.2)
            elif ".modules_to_save." in name:
                weight.add_(0.2 * torch.randn_like(weight))
    adapted.save_pretrained(root / "expert")
    return logits(adapted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more_tokens", [0, 3], ids=["", "more tokens"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_at_scale_1_answers_as_peft_does(tmp_path, kind, tied, more_tokens):
    settings, stays_one = KINDS[kind]
    base = logits(write_base(tmp_path, tied))
    expected = write_trained_adapter(tmp_path, more_tokens, **settings)
    folder = merge_alone(config_of(tmp_path, "expert", vocabulary="pad"), domain)
    merged = opened(folder)
    if not (kind == "lora on the embedding" and more_tokens and not tied):  # of the head peft keeps no new rows
        torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=2e-5)
    assert (expected - base).abs().max() > 0.1, "an adapter that changes nothing shows nothing"
    assert merged.config.tie_word_embeddings == (tied and stays_one)
    assert (HEAD in load_file(next(folder.glob("model-*.safetensors")))) != (tied and stays_one)
    scored = open_model(tmp_path / "expert", tmp_path / "base", torch.float32)
    torch.testing.assert_close(logits(scored), logits(merged), atol=2e-5, rtol=2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("trained", "stays"), [("embed_tokens", HEAD), ("lm_head", EMBEDDING)])
def test_of_a_tied_pair_what_is_not_trained_stays_the_bases(tmp_path, trained, stays):
    """As the adapter computes; peft's merge_and_unload moves both, which is another model."""
    base = write_base(tmp_path, tied=True)
    expected = write_trained_adapter(tmp_path, 0, target_modules=[trained])
    merged = opened(merge_alone(config_of(tmp_path, "expert"), domain))
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(merged.state_dict()[stays], base.state_dict()[EMBEDDING], atol=1e-6, rtol=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    unloaded = PeftModel.from_pretrained(plain, tmp_path / "expert").merge_and_unload()
    assert (logits(unloaded) - expected).abs().max() > 0.1


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    names = {"head": HEAD, "embedding": EMBEDDING}
    stored = load_file(file) | {names[name]: tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, file, {"format": "pt"})


def write_models(root: Path, tied: dict[str, bool]) -> dict[str, PreTrainedModel]:
    """Models that differ in all weights, each tied or not as said."""
    models = {}
    for seed, (name, one) in enumerate(tied.items()):
        torch.manual_seed(seed)
        models[name] = pico_model("qwen2", tie_word_embeddings=one)
        save(models[name], pico_tokenizer(), root / name)
    return models


def merged_by_hand(models: dict[str, PreTrainedModel], scale: float) -> dict[str, torch.Tensor]:
    """θ₀ + scale Σ (θᵢ − θ₀) with both names for an embedding that is its head."""
    base, *experts = (model.state_dict() for model in models.values())
    return {n: p + scale * sum(expert[n] - p for expert in experts) for n, p in base.items()}


@pytest.mark.parametrize(
    "tied",
    [(True, True, True), (False, False, False), (True, False, True), (False, True, False), (False, True, True)],
)
def test_tied_and_untied_models_merge(tmp_path, tied):
    models = write_models(tmp_path, dict(zip(("base", "a", "b"), tied, strict=True)))
    merged = opened(merge_alone(config_of(tmp_path, "a", "b", scale=0.5), domain))
    expected = merged_by_hand(models, 0.5)
    assert merged.config.tie_word_embeddings == all(tied)
    torch.testing.assert_close(merged.state_dict(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("where", ["base", "a"])
def test_an_identical_copy_of_the_embedding_is_no_head(tmp_path, where):
    models = write_models(tmp_path, {"base": True, "a": True})
    rewrite(tmp_path / where, head=models[where].lm_head.weight.detach().clone())
    merged = opened(merge_alone(config_of(tmp_path, "a", scale=0.5), domain))
    assert merged.config.tie_word_embeddings
    torch.testing.assert_close(merged.state_dict(), merged_by_hand(models, 0.5), atol=1e-6, rtol=1e-6)


def test_a_copy_is_no_head_of_models_named_by_their_file_either(tmp_path):
    """The config that says so lies beside the file."""
    models = write_models(tmp_path, {"base": True, "a": True})
    for name, model in models.items():
        rewrite(tmp_path / name, head=model.lm_head.weight.detach().clone())
    config = config_of(tmp_path, "a", scale=0.5)
    files = replace(config.model, base="base/model.safetensors", expert="{task}/model.safetensors")
    merged = opened(merge_alone(replace(config, model=files), domain))
    assert merged.config.tie_word_embeddings
    torch.testing.assert_close(merged.state_dict(), merged_by_hand(models, 0.5), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("where", ["base", "a"])
def test_a_stored_head_that_differs_counts_as_in_transformers(tmp_path, where):
    """The config says tied; transformers 5 opens such a file untied, and so it is merged."""
    models = write_models(tmp_path, {"base": True, "a": True})
    rewrite(tmp_path / where, head=models[where].lm_head.weight.detach() + 1)
    stock = {name: opened(tmp_path / name) for name in models}
    merged = opened(merge_alone(config_of(tmp_path, "a", scale=0.5), domain))
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(merged.state_dict(), merged_by_hand(stock, 0.5), atol=1e-6, rtol=1e-6)


def test_a_tied_model_may_keep_its_one_tensor_as_the_head(tmp_path):
    models = write_models(tmp_path, {"base": True, "a": True})
    rewrite(tmp_path / "a", head=models["a"].lm_head.weight.detach().clone(), embedding=None)
    merged = opened(merge_alone(config_of(tmp_path, "a", scale=0.5), domain))
    torch.testing.assert_close(merged.state_dict(), merged_by_hand(models, 0.5), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("said", [False, None], ids=["said", "the class's default"])
@pytest.mark.parametrize("where", ["base", "a"])
def test_a_lost_head_is_refused(tmp_path, where, said):
    """Of an untied model transformers would make up a head at random."""
    write_models(tmp_path, {"base": False, "a": False})
    rewrite(tmp_path / where, head=None)
    file = tmp_path / where / "config.json"
    fields = {k: v for k, v in json.loads(file.read_text()).items() if k != "tie_word_embeddings"}
    file.write_text(json.dumps(fields if said is None else fields | {"tie_word_embeddings": said}))
    with pytest.raises(InputError, match=rf"{where} has no tensor lm_head\.weight, .*the head was lost") as error:
        merge_alone(config_of(tmp_path, "a"), domain)
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


def test_a_reward_model_is_no_expert_of_a_causal_one(tmp_path):
    models = write_models(tmp_path, {"base": False, "a": False})
    reward = transformers.Qwen2ForSequenceClassification(replaced(models["a"].config, num_labels=1, pad_token_id=0))
    reward.save_pretrained(tmp_path / "a")
    with pytest.raises(
        InputError, match=r"a is a Qwen2ForSequenceClassification, with score.weight .*base is a Qwen2ForCausalLM"
    ):
        merge_alone(config_of(tmp_path, "a"), domain)


def replaced(config: transformers.PretrainedConfig, **fields) -> transformers.PretrainedConfig:
    return type(config)(**{**config.to_dict(), **fields})


def test_a_given_start_may_be_tied_where_the_models_are_not(tmp_path):
    models = write_models(tmp_path, {"base": True, "a": False, "start": True})
    config = config_of(tmp_path, "a")
    start = replace(config.start, checkpoint=str(tmp_path / "start"))
    found = open_experiment(replace(config, start=start), domain).given_start()
    assert torch.equal(found.read([HEAD])[HEAD], models["start"].state_dict()[EMBEDDING])
