"""A recipe of mergekit as a config: what it asks for in this project's words, or a sentence on what is not understood.

Read are linear, slerp, task_arithmetic, ties, dare_linear, dare_ties and breadcrumbs over whole models, with one number
for each weight, density and t. Not read are gradients of them, filters by tensor name, slices of layers, and what the
merge method here cannot do: TIES with unlike weights, say. tests/test_mergekit_recipe.py compares with what mergekit
0.1.5 makes. Beyond rounding these differ:
- What DARE drops is drawn by another generator, and rescaled by 1/density, where mergekit restores the sum of |τ|.
- A dtype is that of the result, as out_dtype; mergekit computes in it too, so its task vectors are rounded.
- Where trimmed task vectors cancel to the last bit, TIES is 0 here and takes the positive ones there; of changes of
  equal size at the threshold all are kept here, and some there.
int8_mask says how mergekit keeps a mask, and name what it calls a result: both are passed over.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config import Adapt, Anchors, Compare, Config, Eval, Model, Run, Start
from common.core.annotations import require_finite
from common.core.errors import InputError
from common.core.notices import warn
from common.io.yaml_files import read_yaml_file
from mergekit_start import METHODS, start_of

KNOWN = ("base_model", "dtype", "merge_method", "models", "name", "out_dtype", "parameters", "tokenizer_source")
OF_MODEL = ("model", "parameters")
SWITCHES = {"normalize", "rescale", "int8_mask"}
NUMBERS = {"lambda", "t", "density", "weight", "gamma"}
OWN = {"density", "weight", "gamma"}  # of a model
WHOLE = ("linear", "slerp")  # mix models, not differences from a base
VOCABULARIES = {"base": "base", "union": "union"}


def read_recipe(file: Path) -> dict[str, Any]:
    """The fields of a recipe; InputError if it is no YAML of one, or has parts that are not read."""
    recipe = read_yaml_file(file)
    if not isinstance(recipe, dict) or not isinstance(recipe.get("merge_method"), str):
        raise InputError(f"{file} is no recipe of mergekit: it names no merge_method")
    refuse_unknown(recipe, KNOWN, f"{file}: ")
    if recipe["merge_method"] not in METHODS:
        method, known = recipe["merge_method"], ", ".join(METHODS)
        raise InputError(f"{file}: merge_method {method!r} is not understood; read are {known}")
    for name in ("base_model", "dtype", "out_dtype", "tokenizer_source"):
        if not isinstance(recipe.get(name), str | None):
            raise InputError(f"{file}: {name} is {recipe[name]!r}; a text is understood")
    return recipe


def refuse_unknown(said: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    """InputError with the keys that are not among the known ones."""
    if unknown := [str(key) for key in said if key not in set(known)]:
        raise InputError(f"{where}{', '.join(unknown)} is not understood; read are {', '.join(sorted(known))}")


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
    said["lambda"] = float(said["lambda"])
    say_passed_over(recipe, models, str(file))
    if method in WHOLE:  # the base is one of what is mixed, listed or not, and the first of two for slerp
        if recipe.get("base_model") and not any(same_place(name, base) for name in models):
            models[recipe["base_model"]] = {}
        models = dict(sorted(models.items(), key=lambda named: method == "slerp" and not same_place(named[0], base)))
    else:
        models = {name: own for name, own in models.items() if not same_place(name, base)}
        if not models:
            raise InputError(f"{file}: models lists the base_model alone; {method} needs a model that differs from it")
    method, hyper = start_of(method, models, said, str(file))
    named = dict(zip(task_names([place(name) for name in models]), map(place, models), strict=True))
    model = Model(base=base, experts=named, **types_of(recipe, domain, str(file)))
    start = Start(method=method, hyper={method: hyper} if hyper else {})
    return Config(domain, model, list(named), Anchors(), start, Adapt(), Eval(), Compare(), run)  # type: ignore[arg-type]


def entries(recipe: Mapping[str, Any], file: str) -> dict[str, dict[str, float]]:
    """{model: its numbers} in order; those of the recipe where a model has none of its own."""
    models = recipe.get("models")
    listed = models if isinstance(models, list) else []
    names = [each.get("model") if isinstance(each, dict) else None for each in listed]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{file}: models should be a list of entries with a model each, a path or a name as text")
    own: dict[str, dict[str, float]] = {}
    for name, entry in zip(names, listed, strict=True):
        refuse_unknown(entry, OF_MODEL, f"{file}: {name}: ")
        if any(same_place(name, other) for other in own):
            raise InputError(f"{file} names a model twice: {name}")
        own[name] = parameters(entry, f"{name}: ", file)
        if unlike := sorted(set(own[name]) - OWN):
            raise InputError(f"{file}: {name}: {', '.join(unlike)} is understood of the recipe alone, not of one model")
    return own


def say_passed_over(recipe: Mapping[str, Any], models: Mapping[str, Any], file: str) -> None:
    """Name the parameters that are without effect on the merge in mergekit, and so here."""
    method, base = recipe["merge_method"], recipe.get("base_model")
    heard = METHODS[method] | {"int8_mask"}
    for where, said in {"": recipe.get("parameters") or {}, **models}.items():
        of_base = where and method not in WHOLE and same_place(where, base)
        if idle := sorted(set(said) if of_base else set(said) - heard):
            whose = f"{where}: " if where else ""
            which = f"{', '.join(idle)} of its base_model" if of_base else ", ".join(idle)
            warn(f"{file}: {whose}{method} does not use {which}, here as in mergekit")


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
    found = entry.get("parameters")
    if not isinstance(found, dict | None):
        raise InputError(f"{file}: {where}parameters is {found!r}; a mapping is understood, as in {{weight: 0.5}}")
    refuse_unknown(found or {}, SWITCHES | NUMBERS, f"{file}: {where}")
    for name, value in (found or {}).items():
        if name in SWITCHES and value not in (True, False):  # 0 and 1 among them
            raise InputError(f"{file}: {where}{name} is {value!r}; true or false is understood")
        if not isinstance(value, bool | int | float):
            raise InputError(f"{file}: {where}{name} is {value!r}; one number for all tensors is understood")
        require_finite(value, f"{file}: {where}{name}")
    return dict(found or {})


def place(name: str) -> str:
    """Where a model is: a path that is there, else a place on the hub if it looks like one; without a last slash."""
    name = name.rstrip("/") or name
    if "://" in name or Path(name).expanduser().exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return name
    return f"hf://{name}"


def same_place(name: str, other: str | None) -> bool:
    """Whether two names are of one model, however they spell its path."""
    return other is not None and whole_place(name) == whole_place(other)


def whole_place(name: str) -> str:
    """Where a model is, as an absolute path or on the hub."""
    where = place(name)
    return where if "://" in where else os.path.abspath(Path(where).expanduser())


def task_names(places: Sequence[str]) -> list[str]:
    """What experts are called: the last part of their place, or all of it where two have the same, each another."""
    wholes = [whole_place(each).strip("/").replace("://", "-").replace("/", "-") for each in places]
    lasts = [whole_place(each).rpartition("/")[2] for each in places]
    names = [last if lasts.count(last) == 1 and last else whole for last, whole in zip(lasts, wholes, strict=True)]
    return names if len(set(names)) == len(names) else [f"{name}-{i}" for i, name in enumerate(names, start=1)]


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
