"""The language wing at the width of Llama-2-13B, and under power cuts; minutes, and 20 GB of disk."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from pico_nlg import pico_config, write_pico_models

from common.checkpoints import Checkpoint
from common.config import as_dict
from common.runtime import ROOT
from common.shards import publish_shards, stage_shards
from NLG import domain

pytestmark = pytest.mark.slow

MIB = 2**20
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 5120, "intermediate_size": 13824,
    "num_hidden_layers": 2, "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000,
    "tie_word_embeddings": False, "dtype": "float16",
}  # fmt: skip


MEASURED = """
import atexit, runpy, sys
atexit.register(lambda: print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def peak(*command):
    """Run a command; its peak memory in MiB, mapped files counted, and its seconds."""
    began = time.monotonic()
    run = [sys.executable, "-c", MEASURED, *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024, time.monotonic() - began


def write_wide(folder, vocabulary, seed, base=None):
    """Two layers in float16 and shards of 1 GB; an expert is its base and noise, and the rows that it has more."""
    folder.mkdir(parents=True)
    config = LLAMA | {"vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in domain.AutoModelForCausalLM.from_config(
            domain.AutoConfig.for_model(**config)).named_parameters()}  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def tensors():
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator) * (0.02 if base is None else 0.002)
            if base is not None:
                stored = Checkpoint(base).read([name])[name]
                noise[: len(stored)] += stored
            yield name, noise.half()

    stage_shards(tensors(), folder, 1000 * MIB)
    publish_shards(folder)


def test_the_whole_chain_at_the_width_of_llama_2_13b(tmp_path):
    """Split peaks below an input shard and 500 MB, all else below 12 GiB; the figures are printed."""
    models = tmp_path / "models"
    write_wide(models / "base", 32000, 0)
    for seed, task in enumerate(("math", "code"), start=1):
        write_wide(models / task, 32001, seed, models / "base")
    shard = max(f.stat().st_size for f in (models / "math").glob("*.safetensors")) / MIB
    figures = {"split": peak("NLG/split_model.py", models / "math", "--out", tmp_path / "split")}
    options = [
        "--config", "configs/nlg/llama2_13b.yaml", "--model.root", models, "--model.base", "base",
        "--run.root", tmp_path, "--model.tokenizers", "[]", "--anchors.number", "256", "--anchors.steps", "3",
        "--adapt.batch_size", "256", "--adapt.epochs", "3", "--run.score", "false", "--run.device", "cpu",
    ]  # fmt: skip
    figures["construct"] = peak("NLG/construct_fda.py", *options)
    figures["merge"] = peak("scripts/merge.py", *options)
    figures["adapt"] = peak("NLG/adapt.py", *options)
    for stage, (memory, seconds) in figures.items():
        print(f"{stage:10} {memory:7.0f} MiB at most, {seconds:5.0f} s")
    print(f"{'a shard':10} {shard:7.0f} MiB")
    assert figures["split"][0] < shard + 500
    assert max(memory for memory, _ in figures.values()) < 12 * 1024
    merged = Checkpoint(tmp_path / "llama2_13b" / "merged" / "fda-ta-weight")
    assert merged.shapes["lm_head.weight"] == (32001, 5120)


@pytest.mark.parametrize("stage", ["construct_fda", "adapt"])
def test_five_kills_change_no_byte(tmp_path, stage):
    write_pico_models(tmp_path / "llama", "llama")
    settings = {k: v for k, v in as_dict(pico_config(tmp_path, tmp_path)).items() if k != "dry_run"}
    settings["anchors"] |= {"steps": 300}
    settings["adapt"] |= {"epochs": 200}
    settings["run"]["score"] = False
    settings["model"]["tokenizers"] = ["math", "code"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))

    def command(name, what=stage):
        recipe = [sys.executable, str(ROOT / "NLG" / f"{what}.py"), "--config", str(tmp_path / "config.yaml")]
        return [*recipe, "--run.name", name]

    for name in ("alone", "killed"):
        if stage == "adapt":
            subprocess.run(command(name, "construct_fda"), check=True, capture_output=True)
    began = time.monotonic()
    subprocess.run(command("alone"), check=True, capture_output=True)
    takes = time.monotonic() - began
    kills, moments = 0, random.Random()
    while kills < 5:
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.6, 1) * takes)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if process.returncode == 0:  # it got through before the blow: begin anew
            folder = "merged" if stage == "adapt" else "."
            subprocess.run(["rm", "-r", str(tmp_path / "killed" / folder)], check=False)
    subprocess.run(command("killed"), check=True, capture_output=True)
    for folder in ("anchors", "merged"):
        alone, killed = (
            {
                f.relative_to(tmp_path / n / folder): f.read_bytes()
                for f in (tmp_path / n / folder).rglob("*")
                if f.is_file()
            }
            for n in ("alone", "killed")
        )
        assert alone == killed
