"""Merges timed against mergekit's, for scripts/benchmark.py: the same recipes, in turn, each in a process of its own.

Both read and write the same disk, with as many threads as OMP_NUM_THREADS says. A run of each that is not counted comes
first, so that all files are in the system's cache if they fit; it is also the one in which this project hashes its
inputs, which it notes, and later merges of the same files look up. Its seconds are told apart. This project's result is
on the disk when its command ends; mergekit's is when the system writes it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from common.config import ROOT
from common.core.errors import InputError
from common.core.seeding import seeded
from common.io.checkpoints import write_tensors
from common.io.model_files import weight_files

LLAMA_220M = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
RECIPES: dict[str, dict[str, Any]] = {  # of mergekit; `of` are the models besides the base
    "average": {"merge_method": "linear", "of": "abc", "parameters": {"weight": 1.0}},
    "slerp": {"merge_method": "slerp", "base_model": "a", "of": "b", "parameters": {"t": 0.5}},
    "ta": {"merge_method": "task_arithmetic", "base_model": "base", "of": "abc", "parameters": {"weight": 0.3}},
    "ties": {"merge_method": "ties", "base_model": "base", "of": "abc", "parameters": {"density": 0.2, "weight": 1.0}},
    "dare_ta": {
        "merge_method": "dare_linear",
        "base_model": "base",
        "of": "abc",
        "parameters": {"density": 0.1, "weight": 0.3},
    },
    "dare_ties": {
        "merge_method": "dare_ties",
        "base_model": "base",
        "of": "abc",
        "parameters": {"density": 0.1, "weight": 1.0, "normalize": True},
    },
}
DRAWN = ("dare_ta", "dare_ties")  # by each with another generator, so that the results differ


@dataclass(frozen=True)
class Taken:
    """What a process took: seconds of the clock and of the processor, and the most memory it occupied, in GiB."""

    seconds: float
    cpu_seconds: float
    peak_gib: float


def merges(
    mergekit: Path | None,
    folder: Path,
    repeats: int,
    recipes: Sequence[str] = tuple(RECIPES),
    size: Mapping[str, int] = LLAMA_220M,
) -> dict[str, Any]:
    """Medians of `repeats` merges of some recipes by both, and their ratios, this project's / mergekit's.

    mergekit: a python that has it; None measures this project alone.
    """
    if mergekit is None:
        print("mergekit is not measured: --mergekit names the python of an environment that has it", file=sys.stderr)
    make_models(folder / "models", size)
    result: dict[str, Any] = {"mergekit": version_in(mergekit) if mergekit else None, "model": dict(size)}
    for method in recipes:
        print(f"{method}: {repeats} times by each", file=sys.stderr, flush=True)
        file = folder / f"{method}.yaml"
        file.write_text(yaml.safe_dump(recipe_of(RECIPES[method], folder / "models")))
        commands = {"ours": ours(file, folder)}
        if mergekit:
            commands["mergekit"] = theirs(mergekit, file, folder)
        result[method] = compared(commands, folder, repeats)
        if mergekit and method not in DRAWN:
            result[method]["largest_difference"] = largest_difference(made_by_us(folder), folder / "theirs")
    return result


def make_models(folder: Path, size: Mapping[str, int]) -> None:
    """A Llama of random weights in float32, and experts a, b and c that differ from it by noise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(architectures=["LlamaForCausalLM"], dtype="float32", **size)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}

    def theta(model: str, name: str) -> Tensor:
        base = 0.02 * torch.randn(shapes[name], generator=seeded(0, "base", name))
        return base if model == "base" else base + 1e-3 * torch.randn(shapes[name], generator=seeded(0, model, name))

    for model in ("base", *"abc"):
        config.save_pretrained(folder / model)
        write_tensors(folder / model / "model.safetensors", {name: theta(model, name) for name in shapes})


def recipe_of(recipe: Mapping[str, Any], models: Path) -> dict[str, Any]:
    """A recipe as mergekit reads it, and scripts/mergekit_recipe.py."""
    names = ([recipe["base_model"]] if recipe["merge_method"] == "slerp" else []) + list(recipe["of"])
    said = {"merge_method": recipe["merge_method"], "dtype": "float32", "parameters": recipe["parameters"]}
    if "base_model" in recipe:
        said["base_model"] = str(models / recipe["base_model"])
    return said | {"models": [{"model": str(models / name)} for name in names]}


def ours(recipe: Path, folder: Path) -> list[str]:
    """The command that merges by this project."""
    named = ["--run.name", "ours", "--run.root", str(folder)]
    return [sys.executable, str(ROOT / "scripts" / "merge.py"), "--mergekit", str(recipe), *named]


def theirs(python: Path, recipe: Path, folder: Path) -> list[str]:
    """The command that merges by mergekit."""
    options = ["--lazy-unpickle", "--no-copy-tokenizer", "--quiet", "--num-threads", str(torch.get_num_threads())]
    return [str(python), str(python.with_name("mergekit-yaml")), str(recipe), str(folder / "theirs"), *options]


def version_in(python: Path) -> str:
    """Which mergekit and torch an environment has; InputError if it has none."""
    asked = "from importlib.metadata import version as v; print('mergekit', v('mergekit'), 'torch', v('torch'))"
    try:
        return subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"--mergekit {python} is no python that has mergekit ({error})") from error


def compared(commands: Mapping[str, Sequence[str]], folder: Path, repeats: int) -> dict[str, Any]:
    """Medians of commands that are run in turn, beside what the run took that is not counted, and their ratios."""
    taken: dict[str, list[Taken]] = {who: [] for who in commands}
    for _ in range(1 + repeats):
        for who, command in commands.items():
            shutil.rmtree(folder / who, ignore_errors=True)
            os.sync()  # what the other has left to be written, which mergekit does not wait for
            taken[who].append(measured(command, {"XDG_CACHE_HOME": str(folder / "cache")}))
    told = {who: medians(runs[1:]) | {"first_seconds": runs[0].seconds} for who, runs in taken.items()}
    if "mergekit" in told:
        mine, other = told["ours"], told["mergekit"]
        told["ours_in_parts_of_mergekit"] = {what: mine[what] / other[what] for what in vars(taken["ours"][0])}
    return told


def medians(runs: Sequence[Taken]) -> dict[str, float]:
    """The median of each number."""
    return {what: median(vars(run)[what] for run in runs) for what in vars(runs[0])}


def measured(command: Sequence[str], environment: Mapping[str, str]) -> Taken:
    """Run a command to its end. Raises: InputError with what it said last if it fails."""
    with NamedTemporaryFile("r") as taken:
        child = [sys.executable, str(Path(__file__).with_name("benchmark_child.py")), taken.name, *command]
        done = subprocess.run(
            child, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            said = done.stdout.strip().splitlines()[-1:]
            raise InputError(f"{' '.join(command)} ended with {done.returncode}: {said}")
        return Taken(*json.load(taken))


def made_by_us(folder: Path) -> Path:
    """The one model that the last run of ours made."""
    (made,) = (folder / "ours" / "merged").iterdir()
    return made


def largest_difference(one: Path, other: Path) -> float:
    """The largest difference of a weight between two models of the same names, one tensor in memory."""
    places = [{n: file for file in weight_files(path) for n in names_in(file)} for path in (one, other)]
    if places[0].keys() != places[1].keys():
        raise InputError(f"{one} and {other} have different tensors")

    def read(file: Path, name: str) -> Tensor:
        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(name).float()

    return max((read(places[0][n], n) - read(places[1][n], n)).abs().max().item() for n in places[0])


def names_in(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file."""
    with safe_open(file, framework="pt") as handle:
        return list(handle.keys())
