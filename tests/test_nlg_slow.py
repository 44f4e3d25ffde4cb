"""The language wing at the width of Llama-2-13B, and under power cuts; minutes, and 20 GB of disk."""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.command import parse
from common.config import ROOT
from common.core.task_vectors import LazyTensor
from common.io.checkpoints import Checkpoint
from common.io.shards import publish_shards, stage_shards, stored_when_made
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import describe
from helpers import files_of
from NLG import domain
from NLG.split_model import split
from pico_nlg import pico_config, write_pico_models

pytestmark = pytest.mark.slow

MIB = 2**20
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 5120, "intermediate_size": 13824,
    "num_hidden_layers": 2, "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000,
    "tie_word_embeddings": False, "dtype": "float16",
}  # fmt: skip


MEASURED = """
import atexit, runpy, sys
import {libraries}
kib = lambda what: int(open("/proc/self/status").read().split(what + ":")[1].split()[0])
libraries = kib("VmRSS")
atexit.register(lambda: print(kib("VmHWM"), libraries))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def peak(*command, libraries="common.command, common.pipeline, NLG.domain"):
    """Run a command; its peak memory in MiB, mapped files counted, how much of it are libraries, and its seconds."""
    began = time.monotonic()
    run = [sys.executable, "-c", MEASURED.format(libraries=libraries), *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    most, loaded = (int(kib) / 1024 for kib in done.stdout.split()[-2:])
    return most, loaded, time.monotonic() - began


def write_wide(folder, vocabulary, seed, base=None):
    """Two layers in float16 and shards of 1 GB; an expert is its base and noise, and the rows that it has more."""
    folder.mkdir(parents=True)
    config = LLAMA | {"vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config)).named_parameters()}  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def made(name):
        noise = torch.randn(shapes[name], generator=generator) * (0.02 if base is None else 0.002)
        if base is not None:
            stored = Checkpoint(base).read([name])[name]
            noise[: len(stored)] += stored
        return noise.half()

    lazy = {name: LazyTensor(tuple(shape), (partial(made, name),)) for name, shape in shapes.items()}
    stage_shards({n: stored_when_made(t, torch.float16) for n, t in lazy.items()}, folder, 1000 * MIB)
    publish_shards(folder)


def test_the_whole_chain_at_the_width_of_llama_2_13b(tmp_path):
    """Split peaks below an input shard and 500 MB, all else below 12 GiB and where the dry run says; with figures."""
    models = tmp_path / "models"
    write_wide(models / "base", 32000, 0)
    for seed, task in enumerate(("math", "code"), start=1):
        write_wide(models / task, 32001, seed, models / "base")
    shard = max(f.stat().st_size for f in (models / "math").glob("*.safetensors")) / MIB
    command = ("NLG/split_model.py", models / "math", "--out", tmp_path / "split")
    figures = {"split": peak(*command, libraries="NLG.split_model")}
    options = [
        "--config", "configs/nlg/llama2_13b.yaml", "--model.root", models, "--model.base", "base",
        "--run.root", tmp_path, "--model.tokenizers", "[]", "--anchors.number", "256", "--anchors.steps", "3",
        "--adapt.batch_size", "256", "--adapt.epochs", "3", "--run.score", "false", "--run.device", "cpu",
    ]  # fmt: skip
    figures["construct"] = peak("NLG/construct_fda.py", *options)
    figures["merge"] = peak("scripts/merge.py", *options)
    figures["adapt"] = peak("NLG/adapt.py", *options)
    plan = describe(parse("", list(map(str, options))), domain).text
    promised = dict(re.findall(r"(\w+), memory .* ([\d.]+) GiB on a CPU alone", plan))
    for stage, (memory, libraries, seconds) in figures.items():
        foreseen = f"{float(promised[stage]) * 1024:.0f}" if stage in promised else "-"
        beside = f"{memory - libraries:.0f} beside the libraries, foreseen {foreseen}"
        print(f"{stage:10} {memory:6.0f} MiB at most, {beside}, {seconds:.0f} s")
    print(f"{'a shard':10} {shard:7.0f} MiB")
    assert figures["split"][0] < shard + 500
    assert max(memory for memory, *_ in figures.values()) < 12 * 1024
    for stage, gib in promised.items():
        assert figures[stage][0] - figures[stage][1] == pytest.approx(float(gib) * 1024, rel=0.2)
    merged = Checkpoint(tmp_path / "llama2_13b" / "merged" / "fda-ta-weight")
    assert merged.shapes["lm_head.weight"] == (32001, 5120)


# ---- power cuts ------------------------------------------------------------------------------------------------------


KILLS = 200  # of each stage, a thousand in all
STAGES = {
    "split": lambda config: split(config.model.path("base"), config.run.dir / "split"),
    "construct": lambda config: construct(config, domain),
    "merge": lambda config: merge_alone(config, domain),
    "adapt": lambda config: adapt(config, domain),
    "assembly": lambda config: adapt(replace(config, adapt=replace(config.adapt, epochs=1)), domain),
}
BEFORE = {"adapt": ["construct"], "assembly": ["construct", "merge"]}


def work(stage, config, ready):
    stage_shards.__defaults__ = (4000,)  # several shards even of a pico model
    torch.set_num_threads(1)
    ready.set()
    STAGES[stage](config)


@pytest.mark.parametrize("stage", STAGES)
def test_two_hundred_kills_change_no_byte(tmp_path, stage):
    """SIGKILL at random moments of the work itself: the processes are forked from one that has imported everything.

    Each time the work gets through in spite of them, its bytes are those of a run left alone.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["common.pipeline", "NLG.domain", "NLG.split_model"])
    write_pico_models(tmp_path / "llama", "llama")
    plain = pico_config(tmp_path, tmp_path)
    plain = replace(
        plain,
        model=replace(plain.model, tokenizers=("math", "code")),
        anchors=replace(plain.anchors, steps=60),
        adapt=replace(plain.adapt, epochs=60),
    )
    configs = {name: replace(plain, run=replace(plain.run, name=name, score=False)) for name in ("alone", "killed")}

    def start(what, name):
        ready = processes.Event()
        process = processes.Process(target=work, args=(what, configs[name], ready))
        process.start()
        ready.wait()
        return process

    def finish(what, name):
        process = start(what, name)
        began = time.monotonic()
        process.join()
        assert process.exitcode == 0
        return time.monotonic() - began

    for name in configs:
        for earlier in BEFORE.get(stage, []):
            finish(earlier, name)
    prepared = files_of(configs["killed"].run.dir)
    takes = finish(stage, "alone")
    kills, finished, moments, met = 0, 0, random.Random(0), set()

    def compare():
        whole, again = ({f: b for f, b in files_of(tmp_path / n).items() if f != "run.json"} for n in configs)
        assert whole == again
        assert len(whole) > len(prepared)

    while kills < KILLS:
        process = start(stage, "killed")
        process.join(moments.uniform(0, 1) * takes)
        if process.is_alive():
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            met.add(frozenset(files_of(tmp_path / "killed") if (tmp_path / "killed").exists() else ()))
        if process.exitcode == 0:  # it got through before the blow: begin anew
            compare()
            finished += 1
            for file in set(files_of(tmp_path / "killed")) - set(prepared):
                (tmp_path / "killed" / file).unlink()
    print(f"{stage}: {takes:.1f} s, {finished} times whole, killed in {len(met)} different states of its folder")
    finish(stage, "killed")
    compare()
