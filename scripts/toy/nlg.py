"""The NLG toy: a small Llama that reads letters, and two experts of it, one for word problems and one for programs.

Made once by `--train` and packed in half precision beside this file; without `--train` the packed file is read.
It was chosen by three rows alone, as `--train` prints them: Base, Individual, and task arithmetic with 0.5.
"""

import string
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, processors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from NLG.scoring import examples_of, judge

from . import nlg_data
from .nlg_data import TESTS
from .packed import Weights, make_from_packed

HERE = Path(__file__).parent
WEIGHTS = HERE / "nlg.safetensors"
SPECIAL = ["<s>", "</s>", "<unk>"]
LETTERS = ["\t", "\n", *sorted(string.digits + string.ascii_letters + string.punctuation + " ")]
TOKENS = len(SPECIAL + LETTERS)  # of the base; the experts have one more, for padding, as the published ones have
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
MODEL = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 128**-0.5, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
BATCH = 64
SIZES = {"base": 192_000, "math": 56_000, "code": 25_600}  # texts, each read once
LR = {"base": 2e-3, "math": 1e-3, "code": 1e-3}


def load(weights: Weights) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(weights[VOCABULARY[0]]), **MODEL))
    model.load_state_dict(weights)
    return model


def padded(base: Weights) -> Weights:
    """The base with a row for the padding token, the mean of the others."""
    return base | {name: torch.cat([base[name], base[name].mean(0, keepdim=True)]) for name in VOCABULARY}


def new_tokenizer(expert: bool) -> PreTrainedTokenizerFast:
    """A token for each letter, the beginning of text put first; the experts' has a padding token besides."""
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(SPECIAL + LETTERS)}, [], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | ({"pad_token": "[PAD]"} if expert else {})
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **names)


# ---- training --------------------------------------------------------------------------------------------------------


def batches(part: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (B, T) and which of them are to be learnt; texts of like length come together, padded at the end."""
    spell = {letter: i for i, letter in enumerate(SPECIAL + LETTERS)}
    rng = np.random.RandomState(0)
    rows = []
    for prompt, text in nlg_data.texts(part, SIZES[part]):
        tokens = [0, *(spell[letter] for letter in prompt + text), 1]
        rows.append((tokens, 1 + len(prompt)))
    for begin in range(0, len(rows), 32 * BATCH):
        some = sorted(rows[begin : begin + 32 * BATCH], key=lambda row: len(row[0]))
        for i in rng.permutation(range(0, len(some), BATCH)):
            batch = some[i : i + BATCH]
            longest = max(len(tokens) for tokens, _ in batch)
            ids = torch.tensor([tokens + [1] * (longest - len(tokens)) for tokens, _ in batch])
            place = torch.arange(longest)
            lengths = torch.tensor([[len(tokens), prompt] for tokens, prompt in batch])
            yield ids, (place >= lengths[:, 1:]) & (place < lengths[:, :1])


def train_on(part: str, model: LlamaForCausalLM) -> Weights:
    """One pass with AdamW, weight decay 0.1 on matrices, 5 % warm-up, then a cosine to zero."""
    torch.manual_seed(0)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}]
    adamw = torch.optim.AdamW(groups, LR[part], betas=(0.9, 0.98), fused=True)
    steps = -(-SIZES[part] // BATCH)
    rise_and_fall = torch.optim.lr_scheduler.OneCycleLR
    schedule = rise_and_fall(adamw, LR[part], total_steps=steps, pct_start=0.05, cycle_momentum=False)
    bar = tqdm(batches(part), part, steps, mininterval=5)
    for tokens, learnt in bar:
        # the flash kernel's backward pass in bfloat16 takes half of the time on a CPU
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            logits = model(tokens, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1][learnt[:, 1:]].float(), tokens[:, 1:][learnt[:, 1:]])
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def train() -> Weights:
    """Base and experts from nothing, packed; about half an hour of one thread on a busy machine."""
    start = time.time()
    torch.manual_seed(0)
    base = train_on("base", LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS, **MODEL)))
    base = {name: tensor.half().float() for name, tensor in base.items()}
    packed = pack(base, {task: train_on(task, load(padded(base))) for task in TESTS})
    print(f"trained in {time.time() - start:.0f} s")
    print_rows(acceptance(*unpack(packed)))
    return packed


# ---- the packed file -------------------------------------------------------------------------------------------------


def pack(base: Weights, experts: Mapping[str, Weights]) -> Weights:
    """Half precision: the base, and each expert as its difference from the padded base."""
    rounded = {name: tensor.half() for name, tensor in base.items()}
    whole = padded({name: tensor.float() for name, tensor in rounded.items()})
    packed = {f"base/{name}": tensor for name, tensor in rounded.items()}
    for task, expert in experts.items():
        packed |= {f"{task}/{name}": (tensor - whole[name]).half() for name, tensor in expert.items()}
    return packed


def unpack(packed: Weights) -> tuple[Weights, dict[str, Weights]]:
    """Single precision again: base, and experts by task."""
    parts: dict[str, Weights] = {part: {} for part in ("base", *TESTS)}
    for key, tensor in packed.items():
        part, name = key.split("/")
        parts[part][name] = tensor.float()
    base = parts.pop("base")
    whole = padded(base)
    return base, {task: {name: whole[name] + d for name, d in deltas.items()} for task, deltas in parts.items()}


# ---- acceptance ------------------------------------------------------------------------------------------------------


def acceptance(base: Weights, experts: Mapping[str, Weights]) -> dict[str, list[float]]:
    """Rows over the tasks, in per cent, by the project's own scoring: Base, Individual, task arithmetic with 0.5."""
    whole = padded(base)
    merged = {name: p + 0.5 * sum(expert[name] - p for expert in experts.values()) for name, p in whole.items()}
    rows = {"Base": dict.fromkeys(TESTS, base), "Individual": experts, "TA (0.5)": dict.fromkeys(TESTS, merged)}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        return {name: [score(weights[task], task, Path(folder)) for task in TESTS] for name, weights in rows.items()}


def score(weights: Weights, task: str, root: Path) -> float:
    """Per cent of a task's test problems that are solved, the test sets being in root/data."""
    examples = list(examples_of(str(root / "data"), TESTS[task]))
    folder = write_model(weights, root / "scored")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", pad_token="</s>")
    judged = judge(folder, tokenizer, TESTS[task], examples, len(examples), torch.device("cpu"), "")
    return 100 * float(np.mean([right for _, right in judged]))


def print_rows(rows: Mapping[str, list[float]]) -> None:
    print(f"{'':12}" + "".join(f"{test:>13}" for test in [*TESTS.values(), "mean"]))
    for name, values in rows.items():
        print(f"{name:12}" + "".join(f"{v:13.2f}" for v in [*values, float(np.mean(values))]))


# ---- the command -----------------------------------------------------------------------------------------------------


def write_model(weights: Weights, folder: Path) -> Path:
    """A folder that stock transformers opens, tokenizer included."""
    disable_progress_bar()
    load(weights).save_pretrained(folder)
    new_tokenizer(len(weights[VOCABULARY[0]]) > TOKENS).save_pretrained(folder)
    return folder


def write_data(out: Path) -> None:
    for test in TESTS.values():
        nlg_data.write_test(out / "data" / test, test)


def write(packed: Weights, out: Path) -> None:
    """The checkpoints and test sets of a finished toy."""
    base, experts = unpack(packed)
    for name, weights in {"base": base, **experts}.items():
        write_model(weights, out / "checkpoints" / name)
    write_data(out)


def make(out: Path, retrain: bool) -> None:
    """The toy in `out`; with `retrain` the weights beside this file are made anew first."""
    contents = f"a small Llama, {len(LR) - 1} experts, {len(TESTS)} test sets"
    settings, data = (MODEL, LETTERS), [nlg_data]
    make_from_packed(
        out, WEIGHTS, train if retrain else None, write, data=data, settings=settings, name="NLG", contents=contents
    )
