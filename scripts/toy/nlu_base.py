"""How the NLU toy's tokenizer and base come to be: byte-level words, and masked language modelling."""

import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

from .packed import Weights

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
START, PAD, END, _, MASK = range(len(SPECIAL))
VOCABULARY, LENGTH = 2000, 64
MODEL = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 512, "max_position_embeddings": 130, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
    "initializer_range": 0.05,  # RoBERTa's 0.02 is for a width of 768; here attention would not get going
}  # fmt: skip
STEPS, TOKENS, LR = 4000, 2048, 1e-3  # pretraining; tokens of a batch


# ---- tokens ----------------------------------------------------------------------------------------------------------


def learn_words(lines: list[str]) -> dict:
    """Byte-level BPE of the lines: vocabulary and merges."""
    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    bpe.train_from_iterator(lines, VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    model = json.loads(bpe._tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": model["merges"]}


def new_tokenizer(words: dict) -> RobertaTokenizer:
    """RoBERTa's tokenizer; the space in front makes a word the same token at the start of a text as elsewhere."""
    merges = [tuple(pair) for pair in words["merges"]]
    return RobertaTokenizer(dict(words["vocab"]), merges, add_prefix_space=True, model_max_length=LENGTH)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ...]]) -> list[dict[str, list[int]]]:
    """Tokens of each example, at most LENGTH."""
    tokens = tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=LENGTH)
    return [{key: tokens[key][i] for key in tokens} for i in range(len(texts))]


# ---- training --------------------------------------------------------------------------------------------------------


def optimiser(model: torch.nn.Module, lr: float, steps: int) -> tuple[torch.optim.Optimizer, object]:
    """AdamW, weight decay 0.01 on matrices, with 6 % warm-up and then a straight line to zero."""
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim > 1 and "embeddings" not in name]
    others = [p for name, p in named if p.ndim <= 1 or "embeddings" in name]
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0}], lr)
    warm = round(0.06 * steps)
    rise = lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))  # noqa: E731
    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, rise)


def descend(model: torch.nn.Module, loss: Tensor, adamw: torch.optim.Optimizer, schedule: object) -> None:
    adamw.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adamw.step()
    schedule.step()


def pretrain(lines: list[str], tokenizer: RobertaTokenizer) -> Weights:
    """Masked language modelling without dropout, of the lines in a row and of texts with their paraphrase in turn.

    Rows are short in the first three quarters, as BERT's were: what attention has to find is nearer then.
    """
    torch.manual_seed(0)
    model = RobertaForMaskedLM(RobertaConfig(**MODEL)).eval()
    tokens = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for line in tokens for token in (*line, END)])
    adamw, schedule = optimiser(model, LR, STEPS)
    bar = tqdm(range(STEPS), "pretraining", mininterval=5)
    for step in bar:
        length = LENGTH // 2 if step < 0.75 * STEPS else LENGTH
        rows = paraphrased(stream, length - 2) if step % 2 else pieces(stream, length - 2, TOKENS // length)
        shown, guess = masked(F.pad(F.pad(rows, (1, 0), value=START), (0, 1), value=END))
        loss = F.cross_entropy(model.lm_head(model.roberta(shown).last_hidden_state[guess >= 0]), guess[guess >= 0])
        descend(model, loss, adamw, schedule)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return own(model)


def pieces(stream: Tensor, length: int, number: int) -> Tensor:
    """Pieces of the stream, (number, length)."""
    return stream[torch.randint(len(stream) - length, (number, 1)) + torch.arange(length)]


def paraphrased(stream: Tensor, length: int) -> Tensor:
    """Two texts in each row: the second is the first with a fifth left out and a seventh of other words.

    The pairs teach attention to look for the same word in the other text, as two languages do in translation language
    modelling (Lample and Conneau 2019, arXiv 1901.07291).
    """
    n, number = length // 2, TOKENS // (length + 2)
    m = (length - 2 - n) * 4 // 5
    first, other = pieces(stream, n, number), pieces(stream, m, number)
    kept = torch.rand(first.shape).topk(m, 1).indices.sort(1).values
    second = torch.where(torch.rand(other.shape) < 0.15, other, first.gather(1, kept))
    return torch.cat([first, torch.full((number, 2), END), second], 1)


def masked(ids: Tensor) -> tuple[Tensor, Tensor]:
    """A fifth of the places is to be guessed: of these 80 % show <mask>, 10 % any token, 10 % their own.

    Returns: what is shown, and the token to be guessed or -1.
    """
    guess = (torch.rand(ids.shape) < 0.2) & (ids >= len(SPECIAL))
    luck = torch.rand(ids.shape)
    shown = ids.masked_fill(guess & (luck < 0.8), MASK)
    shown = torch.where(guess & (luck > 0.9), torch.randint(len(SPECIAL), VOCABULARY, ids.shape), shown)
    return shown, ids.masked_fill(~guess, -1)


def own(model: torch.nn.Module) -> Weights:
    """A model's weights without the second names of tied ones."""
    return {n: t.detach().clone() for n, t in model.state_dict().items() if not n.startswith("lm_head.decoder.")}
