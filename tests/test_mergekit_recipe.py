"""Recipes of mergekit: what is read gives what the recipe's formula gives by hand, what is not is named."""

import itertools
import json

import pytest
import torch
import yaml

from common.config import Run
from common.core import notices
from common.core.errors import InputError
from common.io.checkpoints import Checkpoint
from common.pipeline import merge_alone
from mergekit_recipe import config_of, place
from NLG import domain
from pico_nlg import write_pico_models
from pico_recipes import KEPT, RECIPES, dropped, looked_at, recipe_of, write_recipe_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two experts of one vocabulary: their folder, and their tensors by name."""
    root = tmp_path_factory.mktemp("recipe")
    write_pico_models(root, "llama", extra_tokens=0)
    return root, {name: Checkpoint(root / name).read_under("") for name in ("base", "math", "code")}


def merged(root, tmp_path, **recipe):
    """The tensors that a recipe makes."""
    file = tmp_path / "recipe.yaml"
    models = [{"model": str(root / name), **own} for name, own in recipe.pop("models").items()]
    file.write_text(yaml.safe_dump({"base_model": str(root / "base"), "models": models, **recipe}))
    config = config_of(file, "nlg", Run(name="recipe", root=str(tmp_path), device="cpu", score=False))
    return Checkpoint(merge_alone(config, domain)).read_under("")


def weighted(weight, **more):
    return {"parameters": {"weight": weight, **more}}


def ties_of(taus, density):
    """mergekit's TIES of equal weights, normalized: trimmed by magnitude, the sign of the sum, mean of who agrees."""
    kept = [tau.where(tau.abs() >= tau.abs().flatten().topk(int(density * tau.numel())).values[-1], 0) for tau in taus]
    sign = sum(kept).sign()
    agree = [(tau.sign() == sign) & (tau != 0) for tau in kept]
    count = sum(mask.float() for mask in agree).clamp(min=1)
    return sum(tau * mask for tau, mask in zip(kept, agree, strict=True)) / count


def test_recipes_merge_as_their_formulas_say(models, tmp_path):
    root, theta = models
    cases = itertools.count()

    def check(expected, **recipe):
        found = merged(root, tmp_path / str(next(cases)), **recipe)
        for name, tensor in found.items():
            own = {model: weights[name] for model, weights in theta.items()}
            torch.testing.assert_close(tensor, expected(own["base"], own["math"], own["code"]), atol=1e-6, rtol=1e-5)

    for case in range(5):
        (tmp_path / str(case)).mkdir()
    check(
        lambda base, math, code: (base + 3 * math) / 4,
        merge_method="linear", models={"base": weighted(1), "math": weighted(3)},
    )  # fmt: skip
    check(
        lambda base, math, code: base + 0.5 * (0.4 * (math - base) + 0.2 * (code - base)),
        merge_method="task_arithmetic", models={"math": weighted(0.4), "code": weighted(0.2)},
        parameters={"lambda": 0.5},
    )  # fmt: skip
    check(
        lambda base, math, code: base + (2 * (math - base) + (code - base)) / 3,
        merge_method="task_arithmetic", models={"math": weighted(2), "code": weighted(1)},
        parameters={"normalize": True},
    )  # fmt: skip
    check(
        lambda base, math, code: base + 0.9 * ties_of([math - base, code - base], 0.5),
        merge_method="ties", parameters={"lambda": 0.9},
        models={"base": {}} | dict.fromkeys(("math", "code"), weighted(0.5, density=0.5)),
    )  # fmt: skip
    check(slerp_of, merge_method="slerp", models={"math": {}, "base": {}}, parameters={"t": 0.25})


@pytest.fixture(scope="module")
def integers(tmp_path_factory):
    """The models that mergekit merged."""
    root = tmp_path_factory.mktemp("integers")
    write_recipe_models(root)
    return root


def by_recipe(name, root, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_of(name, root)))
    config = config_of(file, "nlg", Run(name="recipe", root=str(tmp_path), device="cpu", score=False))
    return Checkpoint(merge_alone(config, domain)).read_under("")


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "dare_linear"])
def test_merges_are_those_of_mergekit(integers, tmp_path, name):
    """To rounding in float32; to one of bfloat16 where the result is in it, to two where mergekit computes in it."""
    expected = json.loads(KEPT.read_text())[name]
    found = looked_at(by_recipe(name, integers, tmp_path))
    assert found.keys() == expected.keys() and len(found) == 21
    places = {"task_arithmetic, out bfloat16": 2**-8, "task_arithmetic, bfloat16": 2**-7}.get(name, 1e-6)
    sums = {"task_arithmetic, bfloat16": 0.1, "task_arithmetic, out bfloat16": 1e-3}.get(name, 1e-5)
    for tensor, values in expected.items():
        assert found[tensor][2:] == pytest.approx(values[2:], rel=places, abs=places / 4), tensor
        assert found[tensor][:2] == pytest.approx(values[:2], rel=sums, abs=sums), tensor


def test_dare_keeps_and_rescales_as_mergekit_does_on_the_whole(integers, tmp_path):
    """Which changes are dropped is drawn; a share of 1/2 of 5,712 is kept to 4 standard deviations, 0.026. Ours are
    doubled; mergekit's have the sum of |τ| that all had, so that the factor is near 2."""
    base, math = (Checkpoint(integers / name).read_under("") for name in ("base", "math"))
    kept, factor = json.loads(KEPT.read_text())["dare_linear"]
    ours = dropped(by_recipe("dare_linear", integers, tmp_path), base, {n: math[n] - base[n] for n in base})
    assert ours[0] == pytest.approx(0.5, abs=0.026) and kept == pytest.approx(0.5, abs=0.026)
    assert ours[1] == pytest.approx(2, abs=1e-4) and factor == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("of", ["vision", "nlu"])
def test_types_and_tokens_are_for_language_models(tmp_path, of):
    file = tmp_path / "recipe.yaml"
    plain = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "a", **weighted(1)}]}
    for more, said in [
        ({"dtype": "bfloat16"}, f"dtype is for language models; a merged model of {of} has its base's type"),
        ({"out_dtype": "float16"}, "dtype is for language models"),
        ({"tokenizer_source": "union"}, "tokenizer_source 'union' is for language models"),
    ]:
        file.write_text(yaml.safe_dump(plain | more))
        with pytest.raises(InputError, match=said):
            config_of(file, of, Run(name="x"))
    file.write_text(yaml.safe_dump(plain | {"tokenizer_source": "base"}))
    assert config_of(file, of, Run(name="x")).domain == of


def slerp_of(base, math, code):
    """A quarter of the way from base to math on the arc, by angles in float64."""
    a, b = base.double().flatten(), math.double().flatten()
    omega = torch.arccos((a @ b / a.norm() / b.norm()).clamp(-1, 1))
    if omega.cos() > 0.9995:
        return (0.75 * base + 0.25 * math).float()
    mixed = (torch.sin(0.75 * omega) * a + torch.sin(0.25 * omega) * b) / torch.sin(omega)
    return mixed.view_as(base).float()


def test_dare_and_breadcrumbs_are_this_project_s(models, tmp_path):
    root, _ = models
    file = tmp_path / "recipe.yaml"
    for method, expected in {
        "dare_linear": ("dare_ta", {"drop": 0.75, "scale": [0.5, 0.5]}),
        "dare_ties": ("dare_ties", {"drop": 0.75, "density": 1.0, "scale": 1.0}),
        "breadcrumbs": ("breadcrumbs", {"keep": 0.25, "outliers": 0.01, "scale": 0.5}),
    }.items():
        entries = [{"model": str(root / name), **weighted(0.5, density=0.25)} for name in ("math", "code")]
        recipe = {"merge_method": method, "base_model": str(root / "base"), "models": entries, "dtype": "bfloat16"}
        normalize = {"parameters": {"normalize": True}} if method == "dare_ties" else {}
        file.write_text(yaml.safe_dump(recipe | normalize))
        config = config_of(file, "nlg", Run(name="x"))
        assert (config.start.method, config.start.hyper[config.start.method]) == expected
        assert config.model.dtype == "bfloat16" and config.tasks == ["math", "code"]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"merge_method": "model_stock"}, "merge_method 'model_stock' is not understood; read are linear, slerp"),
        ({"slices": []}, "slices is not understood; read are base_model"),
        ({"models": [{"model": "a", "parameters": {"weight": [0, 1]}}]}, r"a: weight is \[0, 1\]; one number for all"),
        ({"parameters": {"select": 1}}, "select is not understood; read are density"),
        ({"merge_method": "ties", "parameters": {"normalize": False}}, "ties is understood with normalize: true"),
        ({"merge_method": "slerp", "models": [{"model": "a"}]}, "slerp needs parameters.t"),
        ({"base_model": None}, "task_arithmetic needs a base_model"),
        (
            {"merge_method": "dare_linear", "parameters": {"rescale": False}},
            "rescale as it is by default, not False",
        ),
        ({"models": [{"model": "a", "parameters": {"lambda": 2}}]}, "a: lambda is understood of the recipe alone"),
        ({"tokenizer_source": "model:a"}, "tokenizer_source 'model:a' is not understood; read are base, union"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "names a model twice"),
        ({"merge_method": 3}, "is no recipe of mergekit: it names no merge_method"),
        (
            {"merge_method": "ties", "models": [{"model": "a", **weighted(1)}, {"model": "b", **weighted(2)}]},
            "ties is understood with equal weights, not 1.0, 2.0",
        ),
        ({"models": [{"model": "a"}]}, "task_arithmetic needs a weight for a"),
        ({"merge_method": "linear"}, "linear needs a weight for base"),
        (
            {"merge_method": "slerp", "parameters": {"t": 0.5}},
            "slerp mixes the base_model and one other.* not 3 in all",
        ),
        (
            {"merge_method": "breadcrumbs", "parameters": {"density": 0.9, "gamma": 0.2}},
            r"density \+ gamma of at most 1, not 0.9 \+ 0.2",
        ),
        (
            {"merge_method": "ties", "models": [{"model": "a", **weighted(0)}]},
            "ties is understood with weights that are not zero",
        ),
        (
            {"merge_method": "linear", "base_model": None, "models": [{"model": "a", **weighted(0)}]},
            "the weights of linear add up to 0, so they cannot be divided by their sum; give a model a weight",
        ),
        (
            {"merge_method": "linear", "base_model": None, "parameters": {"normalize": False}},
            "linear add up to 2, with normalize: false they must add up to 1; without that line they are divided by",
        ),
        (
            {"models": [{"model": "base+lora", **weighted(1)}]},
            r"base\+lora is a model and an adapter of it; here .*: name lora in the list, and base as the base_model",
        ),
    ],
)
def test_what_is_not_understood_is_named(recipe, said, tmp_path):
    file = tmp_path / "recipe.yaml"
    models = [{"model": name, **weighted(1)} for name in ("a", "b")]
    plain = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    file.write_text(yaml.safe_dump(plain | recipe))
    with pytest.raises(InputError, match=f"recipe.yaml.*{said}"):
        config_of(file, "nlg", Run(name="x"))


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_base_that_is_one_of_the_mixed_models_is_no_mistake(models, tmp_path, method, capsys, monkeypatch):
    root, theta = models
    monkeypatch.setattr(notices, "_said", set())
    listed = [{"model": str(root / name), **weighted(0.5)} for name in ("math", "code")]
    recipe = {"merge_method": method, "models": listed, "parameters": {"t": 0.5} if method == "slerp" else {}}
    recipe |= {"base_model": str(root / "math")} if method == "slerp" else {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = config_of(tmp_path / "recipe.yaml", "nlg", Run(name="x", root=str(tmp_path), device="cpu", score=False))
    found = Checkpoint(merge_alone(config, domain)).read_under("")
    if method == "linear":
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, (theta["math"][name] + theta["code"][name]) / 2, atol=1e-6, rtol=1e-5)
    assert "one model" not in capsys.readouterr().err


def test_models_are_local_or_of_the_hub(tmp_path):
    assert place("org/name") == "hf://org/name" and place("./org/name") == "./org/name"
    assert place(str(tmp_path)) == str(tmp_path) and place("hf://a/b@main") == "hf://a/b@main"
