"""Greedy completions by transformers, in batches, up to stop strings; and the tokenizer of an expert."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from common.config import Model
from common.core.errors import InputError
from common.io.tokenizer_files import VOCABULARIES
from common.io.vocabulary import tokenizer_folder
from common.run.progress import counted


def open_tokenizer(model: Model, task: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside the task's expert, or beside the base, padding on the left with the end of text.

    A padding token of its own may be one that not every scored model knows. InputError if there is no tokenizer, or if
    it knows no end of text.
    """
    folder = tokenizer_folder(model.path("expert", task), model.path("base"), VOCABULARIES)
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, padding_side="left"
    )
    if tokenizer.eos_token is None:
        raise InputError(f"the tokenizer in {folder} has no eos_token, with which answers end")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    batch_size: int,
    name: str = "",
) -> list[str]:
    """Greedy completions of the prompts, each cut at the first stop string; `name` is what the bar shows."""
    generation = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    completions = [""] * len(prompts)
    for batch in batches(prompts, batch_size, name):
        tokens = tokenizer([prompts[i] for i in batch], padding=True, return_tensors="pt").to(model.device)
        known = model.get_input_embeddings().num_embeddings
        if int(tokens["input_ids"].max()) >= known:
            raise InputError(f"{model.name_or_path} knows {known} tokens, too few for the tokenizer of the expert")
        begin = tokens["input_ids"].shape[1]
        stopping = StoppingCriteriaList([has_stopped(stop, tokenizer, begin)])
        answers = model.eval().generate(**tokens, generation_config=generation, stopping_criteria=stopping)
        for i, answer in zip(batch, answers[:, begin:], strict=True):
            completions[i] = before(stop, tokenizer.decode(answer, skip_special_tokens=True))
    return completions


def has_stopped(stops: Sequence[str], tokenizer: PreTrainedTokenizerBase, begin: int) -> Callable[..., Tensor]:
    """For each text of a batch, whether a stop string is among its last tokens; prompts end before token `begin`."""
    longest = max(map(len, stops), default=0)  # a stop string has no more tokens than letters

    def criterion(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        tails = tokenizer.batch_decode(tokens[:, begin:][:, -longest - 1 :]) if stops else [""] * len(tokens)
        return torch.tensor([any(stop in tail for stop in stops) for tail in tails], device=tokens.device)

    return criterion


def batches(prompts: Sequence[str], size: int, name: str) -> Iterator[list[int]]:
    """Indices of the prompts, short ones first, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for begin in counted(range(0, len(order), size), f"score {name}"):
        yield order[begin : begin + size]


def before(stops: Sequence[str], text: str) -> str:
    """The text up to the first stop string."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
