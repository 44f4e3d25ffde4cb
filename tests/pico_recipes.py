"""Pico Llamas whose weights are integers over 2^20, so that no library changes one, and recipes for them.

tests/data/mergekit.json has what mergekit 0.1.5 makes of these by each recipe. It was made, in an environment with
mergekit and this folder in PYTHONPATH, by `python tests/pico_recipes.py`.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.io.checkpoints import write_tensors
from pico_nlg import pico_architecture, pico_tokenizer

KEPT = Path(__file__).parent / "data" / "mergekit.json"
ENTRIES = 12  # of each tensor


def weighted(weight: float, **more: float) -> dict[str, Any]:
    return {"parameters": {"weight": weight, **more}}


# Each model by its name; base_model is the base but where a recipe says None.
BOTH = {"math": weighted(0.5), "code": weighted(0.5)}
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": {"base": weighted(1), "math": weighted(3), "code": weighted(2)}},
    "linear, no base": {
        "merge_method": "linear", "models": {"math": weighted(3), "code": weighted(2)}, "base_model": None,
    },
    "linear, base not listed": {
        "merge_method": "linear", "models": {"math": {}, "code": weighted(2)}, "parameters": {"weight": 0.5},
    },
    "linear, not normalized": {
        "merge_method": "linear", "models": {"math": weighted(0.25), "code": weighted(0.75)}, "base_model": None,
        "parameters": {"normalize": False},
    },
    "slerp": {"merge_method": "slerp", "models": {"math": {}, "base": {}}, "parameters": {"t": 0.25}},
    "slerp, base not listed": {"merge_method": "slerp", "models": {"math": {}}, "parameters": {"t": 0.75}},
    "task_arithmetic": {
        "merge_method": "task_arithmetic", "models": {"math": weighted(0.4), "code": weighted(0.2)},
        "parameters": {"lambda": 0.5},
    },
    "task_arithmetic, normalized": {
        "merge_method": "task_arithmetic", "models": {"math": weighted(2), "code": weighted(1)},
        "parameters": {"normalize": True},
    },
    "task_arithmetic, bfloat16": {"merge_method": "task_arithmetic", "models": BOTH, "dtype": "bfloat16"},
    "task_arithmetic, out bfloat16": {"merge_method": "task_arithmetic", "models": BOTH, "out_dtype": "bfloat16"},
    "ties": {
        "merge_method": "ties", "models": {"base": {}} | dict.fromkeys(("math", "code"), weighted(0.7, density=0.5)),
        "parameters": {"lambda": 0.9},
    },
    "ties, all": {"merge_method": "ties", "models": BOTH},
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "models": dict.fromkeys(("math", "code"), weighted(0.6, density=0.5, gamma=0.125)),
    },
    "breadcrumbs, all": {"merge_method": "breadcrumbs", "models": BOTH},
    "dare_linear, all": {"merge_method": "dare_linear", "models": {"math": weighted(0.4), "code": weighted(0.3)}},
    "dare_ties, all": {"merge_method": "dare_ties", "models": BOTH, "parameters": {"normalize": True}},
    "dare_linear": {"merge_method": "dare_linear", "models": {"math": weighted(1, density=0.5)}},
}  # fmt: skip


def integers(shape: tuple[int, ...], salt: int, below: int) -> np.ndarray:
    """Integers from -below to below that look drawn at random: a fixed mixing of their place and a salt."""
    x = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(salt * 1_000_003)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    return (x % np.uint64(2 * below + 1)).astype(np.int64).reshape(shape) - below


def write_recipe_models(root: Path) -> None:
    """A base and two experts near it in root/base, root/math and root/code, float32."""
    architecture = pico_architecture("llama")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for salt, name in enumerate(("base", "math", "code")):
        weights = {}
        for number, (tensor, shape) in enumerate(sorted(shapes.items())):
            theta = integers(shape, number, 2**18)
            if name != "base":
                theta += integers(shape, number + 1000 * salt, 2**16)
            weights[tensor] = torch.from_numpy(theta.astype(np.float64) / 2**20).float()
        write_tensors(root / name / "model.safetensors", weights)
        architecture.architectures = ["LlamaForCausalLM"]
        architecture.save_pretrained(root / name)
        pico_tokenizer().save_pretrained(root / name)


def recipe_of(name: str, root: Path) -> dict[str, Any]:
    """A recipe as mergekit reads it, for the models under a folder."""
    recipe = dict(RECIPES[name])
    base = {"base_model": str(root / "base")} if "base_model" not in recipe else {}
    recipe.pop("base_model", None)
    models = [{"model": str(root / model), **own} for model, own in recipe.pop("models").items()]
    return {**recipe, **base, "models": models}


def looked_at(weights: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Of each tensor the sums of its weights and of their squares, and some entries from its first to its last."""
    found = {}
    for name, tensor in sorted(weights.items()):
        flat = tensor.double().flatten()
        places = np.linspace(0, len(flat) - 1, ENTRIES).astype(int)
        values = [float(flat.sum()), float(flat.square().sum()), *flat[places].tolist()]
        found[name] = [float(f"{value:.8g}") for value in values]
    return found


def dropped(theta: dict[str, torch.Tensor], base: dict[str, torch.Tensor], tau: dict[str, torch.Tensor]) -> list[float]:
    """Of a merge by DARE of one expert: the share of its changes that are kept, and by what factor on the whole."""
    delta = {name: theta[name].double() - base[name].double() for name in base}
    kept = sum(int((d.abs() > 1e-9).sum()) for d in delta.values()) / sum(d.numel() for d in delta.values())
    ratio = [float(d.abs().sum() / tau[n][d.abs() > 1e-9].abs().sum().double()) for n, d in delta.items()]
    return [round(kept, 6), round(float(np.mean(ratio)), 6)]


def main() -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_recipe_models(root)
        base, math = (load_file(root / name / "model.safetensors") for name in ("base", "math"))
        for number, name in enumerate(RECIPES):
            config = MergeConfiguration.model_validate(recipe_of(name, root))
            run_merge(config, str(root / str(number)), MergeOptions(copy_tokenizer=False, random_seed=0))
            weights = load_file(root / str(number) / "model.safetensors")
            made[name] = looked_at(weights)
            if name == "dare_linear":
                made[name] = dropped(weights, base, {n: math[n] - base[n] for n in base})
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(of)}" for name, of in made.items())
    KEPT.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
