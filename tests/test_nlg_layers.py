"""Whole layers of language models as blocks: attention as the model itself calls it, from stock to stock models."""

import json
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig

from common.config import Model
from common.core.blocks import nonzero_tensors
from common.core.errors import InputError
from common.fda.matching import MatchingProblem, matching_gradient
from common.io.skeleton import decoder_of, layers_of
from common.layout import RunLayout
from common.opening import open_experiment
from common.pipeline import adapt, construct
from common.planning.cost import cost_of_step
from common.planning.dry_run import ADAPT, describe
from common.validation import check_part
from helpers import assert_same_in_bf16, change
from NLG import domain
from NLG.openers import opener_of
from NLU import domain as encoders
from pico_decoders import LAYERS, MIXTURES, fields_of
from pico_nlg import PICO_TASKS, pico_config, pico_tokenizer, save
from Vision import domain as images

TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
WINDOW = {"sliding_window": 3}  # shorter than the texts, of those that have one
KEY_BIASES = ("k_proj.bias", "key.bias", "c_attn.bias", "query_key_value.bias")


def stock_model(kind, seed=0, **fields):
    """A stock model of random weights, no two of which are alike, in float32."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**fields_of(kind) | fields)
    model = opener_of(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def write_config(folder, kind, **fields):
    """A folder with a config alone; what the domain finds in it."""
    folder.mkdir()
    config = json.dumps(fields_of(kind) | fields)
    (folder / "config.json").write_text(config)
    model = Model(base=str(folder))
    return domain.family(model, "layer"), domain.skeleton(model)


@contextmanager
def seen_by_layers(model):
    """Within: a list that gets (what each layer of a stock model is given, what it answers)."""
    decoder, seen = decoder_of(model), []

    def see(module, args, named, output):
        seen.append(((*args, *named.values())[0], output[0] if isinstance(output, tuple) else output))

    layers = decoder.get_submodule(layers_of(decoder))
    hooks = [layer.register_forward_hook(see, with_kwargs=True) for layer in layers]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_answers_as_within_its_stock_model(kind, tmp_path):
    """On texts of six tokens, with its mask, its window and its positions; no token sees one behind it; and no input
    moves the parts that are left out of the loss, while every other part is moved."""
    model = stock_model(kind, **WINDOW)
    family, skeleton = write_config(tmp_path / "base", kind, **WINDOW)
    with seen_by_layers(model) as seen, torch.no_grad():
        model(input_ids=TOKENS)
    modules = family.modules(skeleton)
    assert len(modules) == len(seen) == 2
    for function, (x_ATD, expected), layer in zip(family.functions(modules), seen, layers_in(model), strict=True):
        theta = straight(layer)
        torch.testing.assert_close(function(theta, x_ATD), expected, atol=1e-5, rtol=1e-5)
        changed = x_ATD.clone()
        changed[:, 4] += torch.randn(16, generator=torch.Generator().manual_seed(2))
        moved = (function(theta, changed) - function(theta, x_ATD)).abs().amax((0, 2))
        assert moved[:4].max() < 1e-6 < 1e-4 < moved[4:].min()
    generator = torch.Generator().manual_seed(3)
    tau = {n: 1e-3 * torch.randn(p.shape, generator=generator) for n, p in theta.items()}
    expert = {n: p + tau[n] for n, p in theta.items()}
    moved = {n: t for n, t in family.without_null_gradients(tau).items() if t.any()}
    assert_same_in_bf16(MatchingProblem(function, theta, expert, moved), x_ATD)
    check_null_gradients(family, function, theta)


def layers_in(model):
    decoder = decoder_of(model)
    return decoder.get_submodule(layers_of(decoder))


def straight(layer):
    """The parameters of a stock layer, matrices as (outputs, inputs): GPT-2 has them the other way round."""
    turned = {f"{path}.weight" for path, part in layer.named_modules() if type(part).__name__ == "Conv1D"}
    return {n: p.detach().T if n in turned else p.detach() for n, p in layer.named_parameters()}


def check_null_gradients(family, function, theta):
    """In float64, but for a softmax in float32; BLOOM has the biases of its keys head by head among others."""
    exact = {n: p.double().requires_grad_() for n, p in theta.items()}
    torch.manual_seed(1)
    x_ATD, weights = torch.randn(2, 2, 5, 16, dtype=torch.float64)
    (function(exact, x_ATD) * weights).sum().backward()
    moved = {name: p.grad for name, p in exact.items() if p.grad is not None}
    floor = 1e-5 * max(gradient.abs().max() for gradient in moved.values())
    for name, gradient in moved.items():
        group, groups = family.null_gradients.get(name, (-1, 1))
        still = [place for place, part in enumerate(gradient.chunk(groups)) if part.abs().max() < floor]
        assert still == [group] * (name in family.null_gradients), name
    assert moved.keys() == exact.keys()


REPRESENTATIVE = (
    "llama",
    "qwen3",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "phi3",
    "olmo2",
    "cohere2",
    "opt",
    "bloom",
    "gptj",
)


def config_of(root, **fields):
    config = pico_config(root, root / "runs")
    model = {"root": str(root), "family": "auto", "vocabulary": "refuse", "tokenizers": ()}
    return change(change(change(config, "model", **model), "run", score=False), "anchors", part="layer", **fields)


def write_models(root, kind):
    """A base and two experts near it; the stock models by name."""
    base = stock_model(kind)
    made = {"base": base} | {task: stock_model(kind) for task in PICO_TASKS}
    for seed, task in enumerate(PICO_TASKS):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in made[task].parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    for name, model in made.items():
        save(model, pico_tokenizer(), root / name)
    return {
        name: opener_of(model.config).from_pretrained(root / name, dtype=torch.float32, attn_implementation="eager")
        for name, model in made.items()
    }


@pytest.mark.parametrize("kind", REPRESENTATIVE)
def test_layers_go_from_stock_models_to_a_stock_model(kind, tmp_path):
    """The loss of a step and its derivative are those of plain autograd within the stock models."""
    models, config = write_models(tmp_path, kind), config_of(tmp_path)
    experiment = open_experiment(config, domain)
    assert experiment.shape == (12, 5, 16) and experiment.depth == 2
    theta_0, theta_t = (experiment.read_block(c, 1) for c in (experiment.base, experiment.experts["math"]))
    tau = nonzero_tensors(experiment.task_vector("math", theta_0, theta_t))
    x_ATD = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(3))
    losses, gradient = matching_gradient(MatchingProblem(experiment.functions[1], theta_0, theta_t, tau), x_ATD)
    expected, by_x = plain_loss(models["base"], models["math"], x_ATD, experiment.family.null_gradients)
    named = dict(zip(tau, losses.tolist(), strict=True))
    assert named == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(gradient, by_x, atol=1e-5, rtol=1e-4)
    construct(config, domain)
    folder = adapt(config, domain)
    adapted, report = opener_of(models["base"].config).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert adapted(input_ids=TOKENS).logits.isfinite().all()
    merged = opener_of(models["base"].config).from_pretrained(config.run.dir / "merged" / "ta")
    changed = [n for n, p in adapted.named_parameters() if not torch.equal(p, merged.get_parameter(n))]
    assert any("attn" in n or "attention" in n for n in changed)


def answer_of_layer(model, index, x_ATD):
    """What a layer answers within a stock model where its input is x instead."""
    layer = layers_in(model)[index]
    replaced = layer.register_forward_pre_hook(
        lambda module, args, named: ((x_ATD, *args[1:]), named) if args else (args, named | {"hidden_states": x_ATD}),
        with_kwargs=True,
    )
    with seen_by_layers(model) as seen:
        model(input_ids=torch.zeros(x_ATD.shape[:2], dtype=torch.long), use_cache=False)
    replaced.remove()
    return seen[index][1]


def plain_loss(base, expert, x_ATD, null_gradients):
    """One minus the cosine of τ and the descent direction of the outputs' cosine distance, for each tensor of a layer,
    and the derivative of their sum by the anchors."""
    x_ATD = x_ATD.clone().requires_grad_()
    y, target = answer_of_layer(base, 1, x_ATD), answer_of_layer(expert, 1, x_ATD)
    distance = (1 - F.cosine_similarity(y.flatten(1), target.flatten(1), dim=1)).sum()
    mine, theirs = (dict(layers_in(model)[1].named_parameters()) for model in (base, expert))
    gradients = torch.autograd.grad(distance, list(mine.values()), create_graph=True)
    losses = {}
    for name, gradient in zip(mine, gradients, strict=True):
        tau = (theirs[name] - mine[name]).detach()
        if name in null_gradients:
            group, groups = null_gradients[name]
            tau.chunk(groups)[group].zero_()
        if tau.any():
            losses[name] = 1 + F.cosine_similarity(tau.flatten(), gradient.flatten(), dim=0)
    (by_x,) = torch.autograd.grad(sum(losses.values()), x_ATD)
    return {name: loss.item() for name, loss in losses.items()}, by_x


def test_tasks_together_find_what_each_finds_alone(tmp_path):
    """Mask and angles are constants of the traced step; layers of two kinds are called each as its own."""
    write_models(tmp_path, "gemma3_text")
    alone, together = config_of(tmp_path), change(config_of(tmp_path, together="eager"), "run", name="together")
    for config in (alone, together):
        construct(config, domain)
    for task in PICO_TASKS:
        one, other = (load_file(RunLayout(c).anchor_file(task, 1))["anchors"] for c in (alone, together))
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_anchors_and_models_of_another_part_are_refused(tmp_path):
    write_models(tmp_path, "llama")
    layers = config_of(tmp_path, tokens=5)
    mlps = change(layers, "anchors", part="mlp")
    construct(mlps, domain)
    said = "made with anchors.part = None, now it is layer"
    for attempt in (construct, adapt):
        with pytest.raises(InputError, match=said):
            attempt(layers, domain)
    assert said in " ".join(describe(layers, domain, ADAPT).refusals)
    adapt(change(mlps, "anchors", part=None), domain)  # which is the same
    elsewhere = change(change(layers, "run", name="elsewhere"), "anchors", part="layer")
    construct(elsewhere, domain)
    with pytest.raises(InputError, match="made with anchors.part = layer, now it is None"):
        construct(change(elsewhere, "anchors", part="mlp"), domain)


def test_the_dry_run_says_which_part_is_anchored(tmp_path):
    write_models(tmp_path, "gemma3_text")
    layer = describe(config_of(tmp_path), domain).text
    assert layer.count("1 x model.layers.") == 2, "one slides a window, one does not"
    assert "anchored part layer; D 16" in layer and "12 x 5 x 16" in layer
    mlp = describe(change(config_of(tmp_path), "anchors", part=None), domain).text
    assert "2 x model.layers.N.mlp, 3 tensors" in mlp and "anchored part mlp; D 16" in mlp and "12 x 1 x 16" in mlp


def test_the_work_of_attention_is_counted(tmp_path):
    """A step of T tokens costs aT + bT²: from T = 2 and 4 follows that of 8."""
    family, skeleton = write_config(tmp_path / "base", "llama")
    ((_, layer), *_), config = family.modules(skeleton), config_of(tmp_path)
    two, four, eight = (
        cost_of_step(family.pure(layer), layer, (4, t, 16), config, "float32")[0].operations for t in (2, 4, 8)
    )
    b = (four - 2 * two) / 8
    assert b > 0 and eight == (two - 4 * b) / 2 * 8 + b * 64


@pytest.mark.parametrize("kind", MIXTURES)
def test_layers_of_mixtures_are_refused(kind, tmp_path):
    with pytest.raises(InputError, match=r"has experts \(\d.*anchors.part mlp anchors .* every expert by itself"):
        write_config(tmp_path / "base", kind)


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("gemma4_text", {}, "is called with per_layer_input, .* besides its hidden states"),
        ("apertus", {}, r"keeps mlp.act_fn.beta, which its config does not tell"),
        ("rwkv", {"attention_hidden_size": 16}, "a layer of RwkvModel is called with state besides its hidden states"),
    ],
)
def test_layers_that_cannot_be_anchored_are_refused(kind, fields, said, tmp_path):
    with pytest.raises(InputError, match=said):
        write_config(tmp_path / "base", "llama", model_type=kind, **fields)


@pytest.mark.parametrize(("of", "name"), [(encoders, "nlu"), (images, "vision")])
def test_other_domains_anchor_layers_alone(of, name, tmp_path):
    config = change(config_of(tmp_path), "anchors", part="mlp")
    with pytest.raises(InputError, match=f"anchors.part is mlp; what is anchored in {name} is the layer"):
        check_part(config, of)
