"""Recipes of mergekit: what is read gives what the recipe's formula gives by hand, what is not is named."""

import itertools
import json
import math

import pytest
import torch
import yaml

from common.config import Run
from common.core import notices
from common.core.errors import InputError
from common.io.checkpoints import Checkpoint
from common.pipeline import merge_alone
from mergekit_recipe import config_of, place, task_names
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
        ({"models": [{"model": "a"}, {"model": "a"}]}, "names a model twice: a"),
        ({"models": [{"model": "a"}, {"model": "./a/"}]}, "names a model twice: ./a/"),
        ({"models": [{"model": "x/y"}, {"model": "hf://x/y"}]}, "names a model twice: hf://x/y"),
        ({"models": [{"model": "a", "paramters": {"weight": 0.9}}]}, "a: paramters is not understood; read are model,"),
        ({"models": [{"model": "a", "filter": "mlp", "tokenizer": 1}]}, "a: filter, tokenizer is not understood"),
        ({"models": [{"model": "a", 3: 1}]}, "a: 3 is not understood; read are model, parameters"),
        ({"models": [{"model": "a", "parameters": {"wieght": 1}}]}, "a: wieght is not understood; read are density"),
        (
            {"models": [{"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}]},
            r"a: weight is \[{'filter': 'mlp', 'value': 1}\]; one number for all",
        ),
        ({"models": [{"model": "a", "parameters": [1]}]}, r"a: parameters is \[1\]; a mapping is understood, as in"),
        ({"parameters": "weight"}, "parameters is 'weight'; a mapping is understood"),
        ({"parameters": {"normalize": 2}}, "normalize is 2; true or false is understood"),
        ({"models": []}, "models should be a list of entries with a model each, a path or a name as text"),
        ({"models": None}, "models should be a list"),
        ({"models": {"model": "a"}}, "models should be a list"),
        ({"models": [{"model": {"model": "a", "lora": "b"}}]}, "models should be a list .*, a path or a name as text"),
        ({"models": [{"model": ""}]}, "models should be a list"),
        (
            {"models": [{"model": "base/", **weighted(1)}]},
            "lists the base_model alone; task_arithmetic needs a model that",
        ),
        ({"base_model": {"model": "base"}}, "base_model is {'model': 'base'}; a text is understood"),
        ({"base_model": 3}, "base_model is 3; a text is understood"),
        ({"tokenizer_source": {"model": "a"}}, "tokenizer_source is {'model': 'a'}; a text is understood"),
        ({"dtype": 16}, "dtype is 16; a text is understood"),
        ({"out_dtype": False}, "out_dtype is False; a text is understood"),
        ({"dtype": "float64"}, "dtype 'float64' is not understood; read are float32"),
        ({"chat_template": "auto"}, "chat_template is not understood"),
        ({"tokenizer": {"source": "union"}}, "tokenizer is not understood"),
        ({"modules": {}}, "modules is not understood"),
        ({"models": [{"model": "a", **weighted(math.nan)}]}, "a: weight is nan; it must be a finite number"),
        ({"parameters": {"lambda": math.inf}}, "lambda is inf; it must be a finite number"),
        (
            {"models": [{"model": "a", **weighted(1e308)}, {"model": "b", **weighted(1e308)}]},
            "the sum of the weights is inf; it must be a finite number",
        ),
        (
            {
                "merge_method": "linear",
                "base_model": None,
                "models": [
                    {"model": "a", **weighted(0.1)},
                    {"model": "b", **weighted(0.2)},
                    {"model": "c", **weighted(-0.3)},
                ],
            },
            "linear add up to 5.55.*e-17, so they cannot be divided by their sum; choose weights whose sum is not 0",
        ),
        ({"merge_method": "dare_linear", "parameters": {"density": 0}}, "density is 0, which leaves no change"),
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
            "the weights of linear add up to 0, so they cannot be divided by their sum; choose weights whose sum",
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


def config_for(tmp_path, **recipe):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return config_of(tmp_path / "recipe.yaml", "nlg", Run(name="x"))


@pytest.mark.parametrize("base", ["base/", "./base", "x/../base"])
def test_a_base_is_the_listed_one_however_its_path_is_spelled(tmp_path, base):
    models = [{"model": "base", **weighted(2)}, {"model": "a/", **weighted(1)}, {"model": "b", **weighted(1)}]
    linear = config_for(tmp_path, merge_method="linear", base_model=base, models=models)
    assert linear.start.hyper == {"ta": {"scale": [0.5, 0.25, 0.25]}} and linear.tasks == ["base", "a", "b"]
    added = config_for(tmp_path, merge_method="task_arithmetic", base_model=base, models=models)
    assert added.start.hyper == {"ta": {"scale": [1.0, 1.0]}} and added.model.experts == {"a": "a", "b": "b"}


def test_parameters_that_mergekit_passes_over_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    models = [{"model": "base", **weighted(2)}, {"model": "a", **weighted(1, density=0.5)}]
    said = {"lambda": 0.5, "t": 0.5, "int8_mask": True}
    config = config_for(tmp_path, merge_method="task_arithmetic", base_model="base", models=models, parameters=said)
    assert config.start.hyper == {"ta": {"scale": [0.5]}}
    file = tmp_path / "recipe.yaml"
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {file}: task_arithmetic does not use t, here as in mergekit",
        f"warning: {file}: base: task_arithmetic does not use weight of its base_model, here as in mergekit",
        f"warning: {file}: a: task_arithmetic does not use density, here as in mergekit",
    ]


def test_a_density_above_one_is_all_and_a_weight_may_have_an_exponent(tmp_path):
    models = [{"model": name, **weighted(0.5, density=2)} for name in ("a", "b")]
    config = config_for(tmp_path, merge_method="dare_linear", base_model="base", models=models)
    assert config.start.hyper == {"dare_ta": {"drop": 0.0, "scale": [0.5, 0.5]}}
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a, parameters: {weight: 5e-1}}]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert config_of(tmp_path / "recipe.yaml", "nlg", Run(name="x")).start.hyper == {"ta": {"scale": [0.5]}}


def test_weights_that_cancel_to_rounding_are_not_divided_by(tmp_path):
    """mergekit divides by 1 where the weights of differences add up to less than 1e-8."""
    models = [{"model": name, **weighted(w)} for name, w in {"a": 0.1, "b": 0.2, "c": -0.3}.items()]
    said = {"normalize": True}
    config = config_for(tmp_path, merge_method="task_arithmetic", base_model="base", models=models, parameters=said)
    assert config.start.hyper == {"ta": {"scale": [0.1, 0.2, -0.3]}}


def test_every_expert_has_a_name_of_its_own():
    assert task_names(["/x/a", "/y/b", "hf://o/c"]) == ["a", "b", "c"]
    assert task_names(["/x/a", "/y/a", "hf://o/a"]) == ["x-a", "y-a", "hf-o-a"]
    assert task_names(["/x/a", "/y/a", "/z/x-a"]) == ["x-a-1", "y-a-2", "x-a-3"]
