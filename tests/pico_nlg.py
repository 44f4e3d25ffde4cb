"""Pico causal language models in Hugging Face folders, with a tokenizer, as base and experts of unlike vocabularies."""

from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from common.config import Adapt, Anchors, Compare, Config, Eval, Model, Run, Start

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
PICO_TASKS = ["math", "code"]
SPECIAL = ["<s>", "</s>", "<unk>"]
LETTERS = [
    *"abcdefghijklmnopqrstuvwxyz0123456789",
    "Ġ",
    "Ċ",
]  # the last two are how byte-level tokens spell blank and newline
VOCABULARY = len(SPECIAL + LETTERS)  # 41; the experts have one token more, as those of the paper
PICO = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
TIED = {"gemma"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.norm.weight"


def pico_architecture(family: str, **changes) -> PretrainedConfig:
    return AutoConfig.for_model(family, **PICO | {"tie_word_embeddings": family in TIED} | changes)


def pico_tokenizer(pad: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(SPECIAL + LETTERS)}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if pad:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def pico_model(family: str, **changes) -> PreTrainedModel:
    """Random weights large enough that no two inputs answer alike."""
    model = AutoModelForCausalLM.from_config(pico_architecture(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def write_pico_models(root: Path, family: str, extra_tokens: int = 1) -> None:
    """A base in root/base, experts near it in root/math and root/code, with so many tokens more, the last at random."""
    torch.manual_seed(0)
    base = pico_model(family)
    save(base, pico_tokenizer(), root / "base")
    for task in PICO_TASKS:
        expert = pico_model(family)
        expert.load_state_dict({n: t + 0.1 * torch.randn_like(t) for n, t in base.state_dict().items()})
        if extra_tokens:
            expert.resize_token_embeddings(VOCABULARY + extra_tokens, mean_resizing=False)
        save(expert, pico_tokenizer(pad=extra_tokens > 0), root / task)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_pico_tests(root: Path) -> None:
    """Two word problems and two programming problems in the columns of GSM8K and MBPP."""
    rows = {
        "arithmetic": {"question": ["one", "two"], "answer": ["#### 3", "so #### 1,000"]},
        "functions": {
            "text": ["add one", "two"],
            "test_list": [["assert True"], ["assert f(1) == 2", "assert f(2) == 3"]],
        },
    }
    for test, columns in rows.items():
        datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)}).save_to_disk(str(root / test))


def pico_config(inputs: Path, out: Path, family: str = "llama") -> Config:
    """A complete experiment that ends in a second or two, reading inputs/<family> and inputs/data."""
    return Config(
        domain="nlg",
        model=Model(
            family=family,
            root=str(inputs / family),
            base="base",
            expert="{task}",
            vocabulary="pad",
            tokenizers=("code",),
        ),
        tasks=PICO_TASKS,
        anchors=Anchors(number=12, steps=5),
        start=Start(method="ta", hyper={"ta": {"scale": 0.5}, "wudi": {"steps": 3}}),
        adapt=Adapt(rest="start", per_task=False, epochs=2, batch_size=8, by_start={"pretrained": {"lr": 1e-5}}),
        eval=Eval(
            data=str(inputs / "data"),
            tests={"math": ["arithmetic"], "code": ["functions"]},
            allow_code_execution=True,
        ),
        compare=Compare(),
        run=Run(name="pico", root=str(out), device="cpu"),
    )
