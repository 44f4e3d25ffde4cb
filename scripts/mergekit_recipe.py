"""A recipe of mergekit as a config: what it asks for in this project's words, or a sentence on what is not understood.

Read are linear, slerp, task_arithmetic, ties, dare_linear, dare_ties and breadcrumbs over whole models, with one number
for each weight, density and t. Not read are gradients of them, filters by tensor name, slices of layers, and what the
merge method here cannot do: TIES with unlike weights, say. tests/test_mergekit_recipe.py compares with what mergekit
0.1.5 makes. Beyond rounding these differ:
- What DARE drops is drawn by another generator, and rescaled by 1/density, where mergekit restores the sum of |τ|.
- A dtype is that of the result, as out_dtype; mergekit computes in it too, so its task vectors are rounded.
- Where trimmed task vectors cancel to the last bit, TIES is 0 here and takes the positive ones there; of changes of
  equal size at the threshold all are kept here, and some there.
int8_mask says how mergekit keeps a mask, and is passed over.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config import Adapt, Anchors, Compare, Config, Eval, Model, Run, Start
from common.core.errors import InputError
from common.io.yaml_files import read_yaml_file

KNOWN = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source", "name"}
GLOBAL = {"normalize", "lambda", "t", "density", "weight", "gamma", "rescale", "int8_mask"}
OWN = {"density", "weight", "gamma"}  # of a model
# Whether the weights are divided by their sum where the recipe does not say so, as mergekit has it.
NORMALIZED = {"linear": True, "ties": True}
WHOLE = ("linear", "slerp")  # mix models, not differences from a base
VOCABULARIES = {"base": "base", "union": "union"}


def read_recipe(file: Path) -> dict[str, Any]:
    """The fields of a recipe; InputError if it is no YAML of one, or has parts that are not read."""
    recipe = read_yaml_file(file)
    if not isinstance(recipe, dict) or not isinstance(recipe.get("merge_method"), str):
        raise InputError(f"{file} is no recipe of mergekit: it names no merge_method")
    if unknown := sorted(set(recipe) - KNOWN):
        raise InputError(f"{file}: {', '.join(unknown)} is not understood; read are {', '.join(sorted(KNOWN))}")
    return recipe


def config_of(file: Path, domain: str, run: Run) -> Config:
    """The config that merges as a recipe says; its result is in runs/<name>/merged/<method>/."""
    recipe = read_recipe(file)
    models = entries(recipe, str(file))
    method = recipe["merge_method"]
    if method != "linear" and not recipe.get("base_model"):
        raise InputError(f"{file}: {method} needs a base_model")
    refuse_joined([*models, *filter(None, [recipe.get("base_model")])], str(file))
    base = place(recipe.get("base_model") or next(iter(models)))
    said = {"normalize": None, "lambda": 1.0} | parameters(recipe, "", str(file))
    if method in WHOLE:  # the base is one of what is mixed, listed or not, and the first of two for slerp
        if recipe.get("base_model") and base not in map(place, models):
            models[recipe["base_model"]] = {}
        models = dict(sorted(models.items(), key=lambda named: method == "slerp" and place(named[0]) != base))
    else:
        models = {name: own for name, own in models.items() if place(name) != base}
    method, hyper = start_of(method, models, said, str(file))
    experts = {name: place(name) for name in models}
    named = {task_name(path, experts): path for path in experts.values()}
    model = Model(base=base, experts=named, **types_of(recipe, domain, str(file)))
    start = Start(method=method, hyper={method: hyper} if hyper else {})
    return Config(domain, model, list(named), Anchors(), start, Adapt(), Eval(), Compare(), run)  # type: ignore[arg-type]


def entries(recipe: Mapping[str, Any], file: str) -> dict[str, dict[str, float]]:
    """{model: its numbers} in order; those of the recipe where a model has none of its own."""
    models = recipe.get("models")
    if not isinstance(models, list) or not all(isinstance(m, dict) and isinstance(m.get("model"), str) for m in models):
        raise InputError(f"{file}: models should be a list of entries with a model each")
    names = [entry["model"] for entry in models]
    if len(set(names)) < len(names):
        raise InputError(f"{file} names a model twice")
    own = {entry["model"]: parameters(entry, f"{entry['model']}: ", file) for entry in models}
    for name, said in own.items():
        if unlike := sorted(set(said) - OWN):
            raise InputError(f"{file}: {name}: {', '.join(unlike)} is understood of the recipe alone, not of one model")
    return own


def refuse_joined(names: Sequence[str], file: str) -> None:
    """InputError if a model is named as mergekit names one with an adapter, MODEL+ADAPTER."""
    for name in names:
        model, plus, adapter = name.partition("+")
        if plus and not Path(name).expanduser().exists():
            raise InputError(
                f"{file}: {name} is a model and an adapter of it; here the adapter's own folder is a model: "
                f"name {adapter} in the list, and {model} as the base_model"
            )


def parameters(entry: Mapping[str, Any], where: str, file: str) -> dict[str, Any]:
    """The parameters of a recipe or of one of its models; InputError on one that is not read, or is no number."""
    found = entry.get("parameters") or {}
    for name, value in found.items():
        if name not in GLOBAL:
            raise InputError(f"{file}: {where}{name} is not understood; read are {', '.join(sorted(GLOBAL))}")
        if not isinstance(value, bool | int | float):
            raise InputError(f"{file}: {where}{name} is {value!r}; one number for all tensors is understood")
    return dict(found)


def start_of(
    method: str, models: Mapping[str, Mapping[str, float]], said: Mapping[str, Any], file: str
) -> tuple[str, dict[str, Any]]:
    """(start.method, its hyperparameters) that do what the recipe asks for."""
    if method == "slerp":
        if len(models) != 2:
            raise InputError(f"{file}: slerp mixes the base_model and one other model, not {len(models)} in all")
        return "slerp", {"t": number(said, "t", method, file)}
    for name, own in models.items():
        if "weight" not in own and "weight" not in said:
            raise InputError(f"{file}: {method} needs a weight for {name}")
    weights = [float(own.get("weight", said.get("weight"))) for own in models.values()]
    normalize = NORMALIZED.get(method, False) if said["normalize"] is None else bool(said["normalize"])
    if normalize and not math.isclose(sum(weights), 0):
        shares = [weight / sum(weights) for weight in weights]
    else:
        shares = weights
    if said.get("rescale", method.startswith("dare_")) != method.startswith("dare_"):
        raise InputError(f"{file}: {method} is understood with rescale as it is by default, not {said['rescale']}")
    if method == "linear":
        if not math.isclose(sum(shares), 1):
            step = (
                "so they cannot be divided by their sum; give a model a weight that is not 0"
                if normalize
                else "with normalize: false they must add up to 1; without that line they are divided by their sum"
            )
            raise InputError(f"{file}: the weights of linear add up to {sum(weights):g}, {step}")
        return "ta", {"scale": shares}
    if method == "task_arithmetic":
        return "ta", {"scale": [said["lambda"] * share for share in shares]}
    density = one(models, said, "density", 1.0, file)
    if method == "dare_linear":
        return "dare_ta", {"drop": 1 - density, "scale": [said["lambda"] * share for share in shares]}
    if len(set(weights)) > 1:
        raise InputError(f"{file}: {method} is understood with equal weights, not {', '.join(map(str, weights))}")
    if method in ("ties", "dare_ties"):
        if not all(weights):
            raise InputError(f"{file}: {method} is understood with weights that are not zero")
        if not normalize:
            raise InputError(f"{file}: {method} is understood with normalize: true, the mean of those that agree")
        if method == "ties":
            return "ties", {"density": density, "scale": said["lambda"], "granularity": "tensor"}
        return "dare_ties", {"drop": 1 - density, "density": 1.0, "scale": said["lambda"]}
    if method == "breadcrumbs":
        gamma = one(models, said, "gamma", 0.01, file)
        if density >= 1:  # then no outlier is removed either
            return "breadcrumbs", {"keep": 1.0, "outliers": 0.0, "scale": said["lambda"] * shares[0]}
        if density + gamma > 1:
            raise InputError(
                f"{file}: breadcrumbs is understood with density + gamma of at most 1, not {density} + {gamma}"
            )
        return "breadcrumbs", {"keep": density, "outliers": gamma, "scale": said["lambda"] * shares[0]}
    known = "linear, slerp, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs"
    raise InputError(f"{file}: merge_method {method!r} is not understood; read are {known}")


def one(
    models: Mapping[str, Mapping[str, float]], said: Mapping[str, Any], name: str, otherwise: float, file: str
) -> float:
    """A number that must be the same for all models."""
    values = {float(p.get(name, said.get(name, otherwise))) for p in models.values()}
    if len(values) > 1:
        raise InputError(
            f"{file}: {name} is understood where it is the same for all, not {', '.join(map(str, values))}"
        )
    return values.pop()


def number(said: Mapping[str, Any], name: str, method: str, file: str) -> float:
    """A number that the recipe must have."""
    if name not in said:
        raise InputError(f"{file}: {method} needs parameters.{name}")
    return float(said[name])


def place(name: str) -> str:
    """Where a model is: a path that is there, else a place on the hub if it looks like one."""
    if "://" in name or Path(name).expanduser().exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return name
    return f"hf://{name}"


def task_name(path: str, experts: Mapping[str, str]) -> str:
    """What an expert is called: the last part of its place, or all of it where two have the same."""
    last = path.rstrip("/").rpartition("/")[2]
    alike: Sequence[str] = [each for each in experts.values() if each.rstrip("/").rpartition("/")[2] == last]
    return last if len(alike) == 1 else path.strip("/").replace("://", "-").replace("/", "-")


def types_of(recipe: Mapping[str, Any], domain: str, file: str) -> dict[str, Any]:
    """What the recipe says of the type and tokens of the merged model, which are options of language models."""
    dtype, tokens = recipe.get("out_dtype") or recipe.get("dtype"), recipe.get("tokenizer_source")
    if domain != "nlg":
        if dtype is not None:
            raise InputError(f"{file}: dtype is for language models; a merged model of {domain} has its base's type")
        if tokens not in (None, "base"):
            raise InputError(f"{file}: tokenizer_source {tokens!r} is for language models, not for {domain}")
        return {}
    if tokens is not None and tokens not in VOCABULARIES:
        raise InputError(f"{file}: tokenizer_source {tokens!r} is not understood; read are {', '.join(VOCABULARIES)}")
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise InputError(f"{file}: dtype {dtype!r} is not understood; read are float32, float16, bfloat16")
    return {"dtype": dtype or ""} | ({"vocabulary": VOCABULARIES[tokens]} if tokens else {})
