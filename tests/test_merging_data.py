"""Merge methods that use data: formulas against independent evaluation in float64, identities, and the whole path."""

import json
import re
import shutil
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModel

import helpers
from common.config import Eval
from common.core.errors import InputError
from common.core.seeding import seeded
from common.core.task_vectors import add
from common.io.checkpoints import Checkpoint
from common.io.examples import Sample, load_sample, load_scored
from common.layout import SAME_REST
from common.merging.calibration import BlockInputs, CalibrationTask, first_block_inputs, next_block_inputs
from common.merging.fisher import fisher_information, fisher_mean
from common.merging.pact import pact
from common.merging.registry import METHODS, hyperparameters
from common.merging.starts import check_hyper, merge
from common.merging.svc import svc
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import describe
from common.validation import check_choices
from NLG import domain as nlg
from NLU import domain as nlu
from pico_nlu import CONFIGS, pico_config
from Vision import domain as vision

DEFAULTS = {
    "fisher": {"examples": 256, "exact": 10, "normalize": True, "floor": 1e-6, "power": 1.0, "keep": 1.0, "seed": 0},
    "regmean": {"examples": 256, "alpha": 0.9},
    "regmean_pp": {"examples": 256, "alpha": 0.95},
    "adamerging": {
        "examples": None,
        "wise": "layer",
        "plus": False,
        "density": 0.2,
        "initial": 0.3,
        "lr": 1e-3,
        "steps": 500,
        "seed": 0,
    },
    "concrete": {"examples": None, "scale": 0.3, "temperature": 0.5, "lr": 1e-3, "steps": 2000, "seed": 0},
    "fw_merging": {"examples": 100, "scale": 0.3, "step": 0.1, "rounds": 10, "seed": 0},
    "adarank": {
        "examples": None,
        "start": "cart",
        "initial": None,
        "rank_fraction": None,
        "temperature": 10.0,
        "lr": 1e-3,
        "steps": 10000,
        "seed": 0,
    },
    "expert_merging": {
        "examples": 5,
        "initial": 0.1,
        "hidden": 1.0,
        "anchor": 5.0,
        "lr": 0.5,
        "epochs": 1,
        "seed": 0,
    },
    "prodistill": {"examples": 64, "initial": 0.3, "lr": 1e-2, "epochs": 100, "seed": 0},
}
SPLITS = dict.fromkeys(["fisher", "regmean", "regmean_pp", "prodistill", "expert_merging"], "train")
SPLITS |= dict.fromkeys(["adamerging", "concrete", "fw_merging", "adarank"], "test")
WITH_DATA = [name for name, method in METHODS.items() if method.data]
CPU = torch.device("cpu")


assert_close = partial(helpers.assert_close, rtol=1e-9, atol=1e-12)


# --- a network of two blocks -----------------------------------------------------------------------------------------
#
# x₁ = x Eᵀ, xₗ₊₁ = xₗ + tanh(xₗ Wₗᵀ + bₗ), logits = the class means of x₃ under a head that is fixed.

WIDTH, TOKENS, CLASSES = 5, 3, 4
SHAPES = {
    "embed": (WIDTH, WIDTH), "blocks.0.w": (WIDTH, WIDTH), "blocks.0.b": (WIDTH,),
    "blocks.1.w": (WIDTH, WIDTH), "blocks.1.b": (WIDTH,),
}  # fmt: skip


def draw(seed, *shape, size=1.0):
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(tasks, size=0.3):
    base = {name: draw(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
    return base, [
        {name: draw(100 + 10 * t + i, *shape, size=size) for i, (name, shape) in enumerate(SHAPES.items())}
        for t in range(tasks)
    ]


def embed(theta, batch):
    return BlockInputs(F.linear(batch["x"], theta["embed"]), (), {})


def block(theta, entrance):
    return entrance.x_ATD + torch.tanh(F.linear(entrance.x_ATD, theta["w"], theta["b"]))


def calibration_task(seed, classes=CLASSES, batches=2, examples=8):
    head = draw(1000 + seed, classes, WIDTH)

    def answer(theta, batch):
        entrance = embed(theta, batch)
        for index in range(2):
            own = {name: theta[f"blocks.{index}.{name}"] for name in ("w", "b")}
            entrance = replace(entrance, x_ATD=block(own, entrance))
        return F.linear(entrance.x_ATD.mean(1), head)

    inputs = [{"x": draw(2000 + 10 * seed + i, examples, TOKENS, WIDTH)} for i in range(batches)]
    return CalibrationTask(answer, embed, block, ["blocks.0.", "blocks.1."], inputs, batches * examples)


def merged(method, base, deltas, calibration, **hyper):
    return METHODS[method].function(base, deltas, calibration, **hyper)


# --- formulas --------------------------------------------------------------------------------------------------------


def softmax_classifier(seed, classes, examples=6):
    """logits = x Wᵀ: its Fisher information is known."""
    inputs = [{"x": draw(seed + i, 1, WIDTH)} for i in range(examples)]
    return CalibrationTask(lambda theta, batch: F.linear(batch["x"], theta["w"]), embed, block, [], inputs, examples)


def fisher_by_hand(w, inputs):
    """Mean over x of Σ_y p_y ((1[c = y] − p_c) x_d)²."""
    total = np.zeros_like(w)
    for x in inputs:
        logits = w @ x
        p = np.exp(logits) / np.exp(logits).sum()
        for y in range(len(w)):
            total += p[y] * np.outer((np.arange(len(w)) == y) - p, x) ** 2
    return total / len(inputs)


@pytest.mark.parametrize("normalize", [True, False])
def test_fisher_is_its_formula(normalize):
    base, deltas = {"w": draw(1, 3, WIDTH)}, [{"w": draw(2 + i, 3, WIDTH)} for i in range(3)]
    calibration = [softmax_classifier(50 * i, 3) for i in range(3)]
    fishers = []
    for delta, task in zip(deltas, calibration, strict=True):
        fishers.append(fisher_by_hand((base["w"] + delta["w"]).numpy(), [b["x"][0].numpy() for b in task.batches]))
        if normalize:
            fishers[-1] /= np.sqrt(np.square(fishers[-1]).sum())
    fishers = np.maximum(fishers, 0.02)
    taus = np.stack([delta["w"].numpy() for delta in deltas])
    ours = merged("fisher", base, deltas, calibration, normalize=normalize, floor=0.02)
    assert_close(ours["w"], (fishers * taus).sum(0) / fishers.sum(0))


def test_fisher_of_a_regression_is_the_squared_gradient():
    task = softmax_classifier(0, 1)
    ours = fisher_information({"w": draw(1, 1, WIDTH)}, task, 10, torch.Generator())
    assert_close(ours["w"], np.mean([b["x"].numpy() ** 2 for b in task.batches], axis=0))


def test_drawn_labels_give_the_fisher_information_on_average():
    """3000 draws for one input: off by a fiftieth of the largest entry, six times that nowhere."""
    w, x = draw(1, 3, WIDTH), draw(2, 1, WIDTH)
    task = CalibrationTask(
        lambda theta, batch: F.linear(batch["x"], theta["w"]), embed, block, [], [{"x": x}] * 3000, 3000
    )
    drawn = fisher_information({"w": w}, task, exact=2, generator=torch.Generator().manual_seed(0))["w"]
    exact = fisher_by_hand(w.numpy(), [x[0].numpy()])
    assert 0 < np.abs(drawn.numpy() - exact).max() < 6 / 3000**0.5 * exact.max()


def regression_by_hand(taus, inputs, alpha):
    """From rows of inputs of each task: token by token sums, what is off the diagonal shrunk, one solve."""
    grams = []
    for rows in inputs:
        gram = sum(np.outer(row, row) for row in rows) / len(rows)
        grams.append(np.where(np.eye(len(gram)) > 0, gram, alpha * gram))
    return np.linalg.solve(sum(grams), sum(g @ t.T for g, t in zip(grams, taus, strict=True))).T


def numpy_of(theta):
    return {name: p.numpy() for name, p in theta.items()}


def rows(x):
    return x.reshape(-1, WIDTH)


def numpy_block(theta, index, x):
    return x + np.tanh(x @ theta[f"blocks.{index}.w"].T + theta[f"blocks.{index}.b"])


@pytest.mark.parametrize("method", ["regmean", "regmean_pp"])
def test_regmean_is_its_formula(method):
    """RegMean: the inputs of every map in its own expert. RegMean++: in the expert's block, behind the merged ones."""
    base, deltas = network(3)
    calibration, alpha = [calibration_task(i) for i in range(3)], 0.8
    theta_0, taus = numpy_of(base), [numpy_of(delta) for delta in deltas]
    x = [np.concatenate([b["x"].numpy() for b in task.batches]) for task in calibration]
    expected = {name: sum(tau[name] for tau in taus) / 3 for name in base}
    experts = [{name: theta_0[name] + tau[name] for name in theta_0} for tau in taus]
    if method == "regmean":
        expected["embed"] = regression_by_hand([tau["embed"] for tau in taus], map(rows, x), alpha)
        x = [xi @ expert["embed"].T for xi, expert in zip(x, experts, strict=True)]
    else:
        x = [xi @ (theta_0["embed"] + expected["embed"]).T for xi in x]
    for index in range(2):
        name = f"blocks.{index}.w"
        expected[name] = regression_by_hand([tau[name] for tau in taus], map(rows, x), alpha)
        so_far = {n: theta_0[n] + expected[n] for n in theta_0}
        through = experts if method == "regmean" else [so_far] * 3
        x = [numpy_block(theta, index, xi) for theta, xi in zip(through, x, strict=True)]
    ours = merged(method, base, deltas, calibration, alpha=alpha)
    assert ours.keys() == base.keys()
    for name in base:
        assert_close(ours[name], expected[name])


def test_adamerging_is_its_formula():
    """Against autograd through the whole sum, with a step so large that some λ are cut; task 3 is a regression."""
    base, deltas = network(3)
    calibration = [calibration_task(0), calibration_task(1), calibration_task(2, classes=1)]
    lambdas = {name: torch.full((3,), 0.4, dtype=torch.float64, requires_grad=True) for name in base}
    adam = torch.optim.Adam(lambdas.values(), lr=0.1)

    def theta():
        return {n: p + sum(lambdas[n][i].clamp(0, 1) * deltas[i][n] for i in range(3)) for n, p in base.items()}

    for step in range(12):
        adam.zero_grad()
        loss = 0
        for task in calibration[:2]:
            p = task.answer(theta(), task.batches[step % 2]).softmax(1)
            loss = loss - (p * p.log()).sum(1).mean()
        loss.backward()
        adam.step()
    raw = torch.stack(list(lambdas.values()))
    assert ((raw < 0) | (raw > 1)).any() and ((raw > 0) & (raw < 1)).any()
    ours = merged("adamerging", base, deltas, calibration, initial=0.4, lr=0.1, steps=12)
    for name, expected in theta().items():
        assert_close(ours[name], (expected - base[name]).detach())


def test_adamerging_makes_answers_surer_and_needs_a_classification():
    base, deltas = network(2)
    calibration = [calibration_task(0, batches=1), calibration_task(1, batches=1)]

    def uncertainty(steps):
        theta = add(base, merged("adamerging", base, deltas, calibration, lr=0.02, steps=steps))
        p = [task.answer(theta, task.batches[0]).softmax(1) for task in calibration]
        return -sum((each * each.log()).sum(1).mean() for each in p).item()

    assert uncertainty(40) < 0.9 * uncertainty(0)
    with pytest.raises(InputError, match="adamerging: every task is a regression"):
        merged("adamerging", base, deltas, [calibration_task(0, classes=1), calibration_task(1, classes=1)], steps=1)


def test_prodistill_is_its_formula():
    """Against autograd over all α, with one batch a task; inputs from the merged and from the expert model apart."""
    base, deltas = network(2)
    calibration, settings = (
        [calibration_task(i, batches=1) for i in range(2)],
        {"initial": 0.3, "lr": 0.05, "epochs": 15},
    )
    expected = {name: 0.3 * sum(delta[name] for delta in deltas) for name in base}
    inputs = [task.batches[0]["x"] for task in calibration]
    x = [xi @ (base["embed"] + expected["embed"]).T for xi in inputs]
    z = [xi @ (base["embed"] + delta["embed"]).T for xi, delta in zip(inputs, deltas, strict=True)]

    def run(own, xi):
        return xi + torch.tanh(xi @ own["w"].T + own["b"])

    for index in range(2):
        theta_0 = {n: base[f"blocks.{index}.{n}"] for n in ("w", "b")}
        taus = [{n: delta[f"blocks.{index}.{n}"] for n in ("w", "b")} for delta in deltas]
        z = [run({n: theta_0[n] + tau[n] for n in tau}, zi) for tau, zi in zip(taus, z, strict=True)]
        alphas = [{n: torch.full_like(t, 0.3, requires_grad=True) for n, t in tau.items()} for tau in taus]
        adam = torch.optim.Adam([a for alpha in alphas for a in alpha.values()], lr=0.05)

        def combined(taus=taus, alphas=alphas):
            return {n: sum(a[n] * t[n] for a, t in zip(alphas, taus, strict=True)) for n in ("w", "b")}

        for _ in range(15):
            adam.zero_grad()
            own = {n: theta_0[n] + delta for n, delta in combined().items()}
            sum((run(own, xi) - zi).square().sum() for xi, zi in zip(x, z, strict=True)).backward()
            adam.step()
        final = {n: delta.detach() for n, delta in combined().items()}
        expected |= {f"blocks.{index}.{n}": delta for n, delta in final.items()}
        x = [run({n: theta_0[n] + final[n] for n in final}, xi) for xi in x]
    ours = merged("prodistill", base, deltas, calibration, **settings)
    for name in base:
        assert_close(ours[name], expected[name])


def entropies(calibration, theta, step=0):
    """The sum over tasks of the mean entropy, by plain formulas."""
    loss = 0
    for task in calibration:
        p = task.answer(theta, task.batches[step % len(task.batches)]).softmax(1)
        loss = loss - (p * p.log()).sum(1).mean()
    return loss


def plus(base, deltas):
    return {name: p + deltas[name] for name, p in base.items()}


@pytest.mark.parametrize("trimmed", [False, True])
def test_adamerging_by_task_has_one_coefficient_for_each(trimmed):
    """With ++, on what one threshold a task vector and the sign of the sum leave."""
    base, deltas = network(2)
    calibration = [calibration_task(0), calibration_task(1)]
    used = deltas
    if trimmed:
        kept = []
        for delta in deltas:
            sizes = np.sort(np.concatenate([t.abs().numpy().ravel() for t in delta.values()]))[::-1]
            kept.append({n: t * (t.abs() >= sizes[int(0.5 * len(sizes)) - 1]) for n, t in delta.items()})
        used = [{n: t * (t * sum(k[n] for k in kept) > 0) for n, t in delta.items()} for delta in kept]
    lam = torch.full((2,), 0.4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([lam], lr=0.05)
    for step in range(6):
        adam.zero_grad()
        entropies(
            calibration, plus(base, {n: lam[0] * used[0][n] + lam[1] * used[1][n] for n in base}), step
        ).backward()
        adam.step()
    hyper = {"initial": 0.4, "lr": 0.05, "steps": 6, "wise": "task", "plus": trimmed, "density": 0.5}
    ours = merged("adamerging", base, deltas, calibration, **hyper)
    for name in base:
        assert_close(ours[name], (lam[0] * used[0][name] + lam[1] * used[1][name]).detach())


def test_concrete_is_its_formula():
    """Against autograd, with the draws of each step made here."""
    base, deltas = network(2)
    calibration, scale = [calibration_task(0), calibration_task(1)], 0.4
    x = {name: torch.zeros_like(p, requires_grad=True) for name, p in base.items()}
    adam = torch.optim.Adam(x.values(), lr=0.1)

    def delta(step):
        found = {}
        for name, logits in x.items():
            u = torch.rand(logits.shape, generator=seeded(7, "concrete", name, step), dtype=torch.float64)
            m = 1 / (1 + torch.exp(-((u / (1 - u)).log() + logits) / 0.5))
            found[name] = scale * m / m.mean() * (deltas[0][name] + deltas[1][name])
        return found

    for step in range(5):
        adam.zero_grad()
        entropies(calibration, plus(base, delta(step)), step).backward()
        adam.step()
    ours = merged("concrete", base, deltas, calibration, scale=scale, lr=0.1, steps=5, seed=7)
    for name, expected in delta(5).items():
        assert_close(ours[name], expected.detach())


def test_fw_merging_is_its_formula():
    base, deltas = network(3, size=2.0)
    calibration = [calibration_task(i) for i in range(3)]
    delta = {n: 0.3 * sum(d[n] for d in deltas) for n in base}
    vertices, chosen = [*deltas, dict(delta)], []
    for t in range(7):
        theta = {n: p.clone().requires_grad_() for n, p in plus(base, delta).items()}
        for batch in range(2):
            (entropies(calibration, theta, batch) / 2).backward()
        scores = [
            sum(
                torch.cosine_similarity(p.grad.flatten(), (base[n] + v[n]).flatten(), dim=0).item()
                for n, p in theta.items()
            )
            for v in vertices
        ]
        chosen.append(int(np.argmin(scores)))
        gamma = 0.3 * 3.2 * 2 / (t + 2)
        delta = {n: d + gamma * (vertices[chosen[-1]][n] - d) for n, d in delta.items()}
    assert len(set(chosen)) > 1
    ours = merged("fw_merging", base, deltas, calibration, step=3.2, rounds=7)
    for name in base:
        assert_close(ours[name], delta[name])


@pytest.mark.parametrize(("start", "fraction"), [("cart", 0.4), ("ta", 0.8)])
def test_adarank_is_its_formula(start, fraction):
    """Against autograd with a straight-through mask; the steps are long enough for components to come and go."""
    base, deltas = network(2)
    calibration = [calibration_task(0), calibration_task(1)]
    origin = {n: (deltas[0][n] + deltas[1][n]) / 2 * (start == "cart") for n in base}
    taus = [{n: d[n] - origin[n] for n in base} for d in deltas]
    cut = ["blocks.0.w", "blocks.1.w"]
    svds = [{n: torch.linalg.svd(tau[n]) for n in cut} for tau in taus]
    lam = {n: torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True) for n in base}
    began = torch.where(torch.arange(WIDTH) < int(fraction * WIDTH + 1e-9), 0.1, -0.1).double()
    x = [{n: began.clone().requires_grad_() for n in cut} for _ in taus]
    adam = torch.optim.Adam([*lam.values(), *(p for each in x for p in each.values())], lr=0.06)

    def delta():
        found = {}
        for n in base:
            found[n] = origin[n]
            for i, tau in enumerate(taus):
                part = tau[n]
                if n in cut:
                    u, s, vt = svds[i][n]
                    soft = (x[i][n] / 10).sigmoid()
                    part = u @ torch.diag(s * ((x[i][n] > 0).double() + soft - soft.detach())) @ vt
                found[n] = found[n] + lam[n][i] * part
        return found

    for step in range(8):
        adam.zero_grad()
        entropies(calibration, plus(base, delta()), step).backward()
        adam.step()
    kept = [(p > 0).sum().item() for each in x for p in each.values()]
    assert any(count != int(fraction * WIDTH + 1e-9) for count in kept)
    hyper = {"start": start, "rank_fraction": fraction, "initial": 0.5, "lr": 0.06, "steps": 8}
    ours = merged("adarank", base, deltas, calibration, **hyper)
    for name, expected in delta().items():
        assert_close(ours[name], expected.detach(), rtol=1e-7)


def test_expert_merging_is_its_formula():
    """Against autograd over σ(x), with hidden states by hand; one step of three batches, the third a regression's."""
    base, deltas = network(3)
    calibration = [calibration_task(i, classes=1 if i == 2 else CLASSES, batches=1) for i in range(3)]
    x = {n: torch.full((3,), 0.25, dtype=torch.float64).logit().requires_grad_() for n in base}
    adam = torch.optim.Adam(x.values(), lr=0.3)

    def delta():
        return {n: sum(x[n][i].sigmoid() * deltas[i][n] for i in range(3)) for n in base}

    def states(theta, batch):
        h, found = batch["x"] @ theta["embed"].T, []
        for index in range(2):
            h = h + torch.tanh(h @ theta[f"blocks.{index}.w"].T + theta[f"blocks.{index}.b"])
            found.append(h)
        return found

    for _ in range(2):
        adam.zero_grad()
        loss = 0
        for i, task in enumerate(calibration):
            batch, theta, expert = task.batches[0], plus(base, delta()), plus(base, deltas[i])
            ours, wanted = task.answer(theta, batch), task.answer(expert, batch)
            soft = -(wanted.softmax(1) * ours.log_softmax(1)).sum(1).mean()
            loss = loss + (soft if i < 2 else (ours - wanted).square().mean())
            gaps = [(a - b).square().mean() for a, b in zip(states(theta, batch), states(expert, batch), strict=True)]
            loss = loss + 0.7 * sum(gaps) / 2 + 2.0 * sum((v.sigmoid() - 0.25).abs().sum() for v in x.values()) / len(x)
        (loss / 3).backward()
        length = torch.stack([v.grad.square().sum() for v in x.values()]).sum().sqrt()
        for v in x.values():
            v.grad *= min(1.0, 1 / (length + 1e-6))
        adam.step()
    hyper = {"initial": 0.25, "hidden": 0.7, "anchor": 2.0, "lr": 0.3, "epochs": 2}
    ours = merged("expert_merging", base, deltas, calibration, **hyper)
    for name, expected in delta().items():
        assert_close(ours[name], expected.detach(), rtol=1e-7)


def test_fisher_with_a_power_and_a_mask_is_ota_and_ffg():
    """p ½; of each row two of four weights are kept, by F τ²; where none is left δ is 0."""
    taus = [torch.tensor([1.0, 2.0, 3.0, 0.1]), torch.tensor([4.0, -1.0, 1.0, 0.1])]
    fishers = [torch.tensor([4.0, 9.0, 1.0, 1.0]), torch.tensor([1.0, 16.0, 1.0, 1.0])]
    assert_close(fisher_mean(taus, fishers, power=0.5, keep=0.5), [4.0, (3 * 2 - 4 * 1) / 7, 3.0, 0.0], rtol=1e-6)
    assert_close(fisher_mean(taus, fishers, power=0.5), [6 / 3, (6 - 4) / 7, 2.0, 0.1], rtol=1e-6)


# --- identities ------------------------------------------------------------------------------------------------------

QUICK = {
    "adamerging": {"steps": 5}, "prodistill": {"epochs": 5}, "concrete": {"steps": 3}, "adarank": {"steps": 3},
    "fw_merging": {"rounds": 3},
}  # fmt: skip
# With these, one task is merged into its expert; with `initial` 1/3, three identical ones are. The steps of ProDistill
# are short: Adam makes long ones even where the gradient is but rounding.
KEEPS = {"fisher": {}, "regmean": {}, "regmean_pp": {}, "prodistill": {"initial": 1.0, "epochs": 3, "lr": 1e-9}}


@pytest.mark.parametrize("method", KEEPS)
def test_one_task_and_identical_experts_give_that_expert(method):
    base, (delta,) = network(1)
    for tasks in (1, 3):
        hyper = KEEPS[method] | ({"initial": 1 / tasks} if "initial" in KEEPS[method] else {})
        ours = merged(method, base, [delta] * tasks, [calibration_task(i, batches=1) for i in range(tasks)], **hyper)
        for name in base:
            assert_close(ours[name], delta[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", WITH_DATA)
def test_the_order_of_tasks_does_not_matter_and_inputs_stay_as_they_are(method):
    base, deltas = network(3)
    copies = [{name: p.clone() for name, p in theta.items()} for theta in (base, *deltas)]
    calibration, hyper = [calibration_task(i, batches=1) for i in range(3)], QUICK.get(method, {})
    ours = merged(method, base, deltas, calibration, **hyper)
    turned = merged(method, base, deltas[1:] + deltas[:1], calibration[1:] + calibration[:1], **hyper)
    for name in base:
        assert_close(ours[name], turned[name], rtol=1e-7)
        assert not ours[name].requires_grad and ours[name].isfinite().all()
        assert all(torch.equal(x[name], copy[name]) for x, copy in zip((base, *deltas), copies, strict=True))


@pytest.mark.parametrize("method", WITH_DATA)
def test_zero_task_vectors_stay_zero(method):
    base, deltas = network(2, size=0.0)
    for tensor in merged(
        method, base, deltas, [calibration_task(0), calibration_task(1)], **QUICK.get(method, {})
    ).values():
        assert not tensor.any()


def test_a_method_that_uses_data_can_be_joined_with_steps():
    base, deltas = network(2)
    calibration = [calibration_task(0), calibration_task(1)]
    own = merged("adamerging", base, pact(base, deltas), calibration, steps=2)
    ours = merge("pact+adamerging+svc", base, deltas, {"adamerging": {"steps": 2}}, calibration=calibration)
    for name, expected in svc(base, pact(base, deltas), own).items():
        assert_close(ours[name], expected)


# --- what a calibration task gives ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vision_inputs(pico_inputs, tmp_path_factory):
    """The pico images with a training set."""
    root = tmp_path_factory.mktemp("with_train")
    shutil.copytree(pico_inputs / "data", root, dirs_exist_ok=True)
    for file in sorted(root.glob("*/test-*.parquet")):
        shutil.copy(file, file.with_name(file.name.replace("test", "train")))
    return root


@pytest.fixture
def vision_config(pico_config, vision_inputs):
    return replace(pico_config, eval=replace(pico_config.eval, data=str(vision_inputs)))


def expert_weights(config, task, domain):
    family = domain.family(config.model)
    checkpoint = Checkpoint(config.model.path("expert", task), family.names)
    return checkpoint.read(checkpoint.names(family.scope))


@pytest.mark.parametrize("size", [1, 7])
def test_a_calibration_tasks_answers_give_the_score_of_images(vision_config, size):
    task = vision.calibration_task(vision_config, "SVHN", Sample("test", None, size, seed=3), CPU)
    with torch.no_grad():
        theta = expert_weights(vision_config, "SVHN", vision)
        answers = torch.cat([task.answer(theta, batch) for batch in task.batches]).argmax(1)
    order = np.random.RandomState(3).permutation(20)
    path = {"x": vision_config.model.path("expert", "SVHN")}
    hits = (answers.numpy() == order % 10).mean()
    score = dict(vision.score(vision_config, "SVHN", path, CPU))["x"]
    assert score[:2] == (pytest.approx(hits), task.examples)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_calibration_task_answers_as_stock_transformers_block_by_block(nlu_inputs, tmp_path, family):
    config = pico_config(nlu_inputs, tmp_path, family)
    task = nlu.calibration_task(config, "MNLI", Sample("train", 9, 4), CPU)
    theta, path = expert_weights(config, "MNLI", nlu), config.model.path("expert", "MNLI")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    encoder, batches = AutoModel.from_pretrained(path).eval(), list(task.batches)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 1] and task.examples == 9
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    with torch.no_grad():
        flow = first_block_inputs(task, theta)
        for prefix in task.prefixes:
            flow = next_block_inputs(
                task, {n.removeprefix(prefix): p for n, p in theta.items() if n.startswith(prefix)}, flow
            )
        for batch, entrance in zip(batches, flow, strict=True):
            torch.testing.assert_close(task.answer(theta, batch), classifier(**batch).logits)
            torch.testing.assert_close(entrance.x_ATD, encoder(**batch).last_hidden_state)


def test_calibration_and_validation_cut_share_no_example(nlu_inputs):
    options = Eval(data=str(nlu_inputs / "data"))
    row = nlu.TASKS["STS-B"]
    whole = load_sample(options, "STS-B", row, ["label"], Sample("train", None, 1))["label"]
    cut = load_scored(replace(options, split="validation_cut"), "STS-B", row, ["label"])["label"]
    assert (len(whole), len(cut), len({*whole, *cut})) == (27, 3, 30)  # the labels are drawn, no two alike
    few = [
        list(load_sample(replace(options, limit=2), "STS-B", row, ["label"], Sample("train", 5, 1, seed))["label"])
        for seed in (0, 1, 5)
    ]
    assert few == [list(whole)[:5], list(whole)[5:10], [*whole, *whole][25:30]], "other inputs with each seed"
    test = load_scored(options, "STS-B", row, ["label"])["label"]
    drawn = [list(load_sample(options, "STS-B", row, ["label"], Sample("test", 9, 1, s))["label"]) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and {*drawn[0], *drawn[2]} <= {*test} and len({*drawn[0]}) == 9


# --- whole checkpoints -----------------------------------------------------------------------------------------------


def with_method(config, method, **hyper):
    quick = QUICK.get(method, {}) | {"examples": 6} | hyper
    return replace(config, start=replace(config.start, method=method, hyper={method: quick}))


@pytest.mark.parametrize("domain", [vision, nlu], ids=["vision", "nlu"])
@pytest.mark.parametrize("method", WITH_DATA)
def test_every_method_merges_a_checkpoint_and_says_what_data_it_used(method, domain, request):
    """Finite, complete, off the base everywhere; asking for more than there is uses what there is."""
    config = request.getfixturevalue(f"{domain.NAME}_config")
    config = with_method(config, method, examples=6 if domain is vision else 1000)
    config = replace(config, run=replace(config.run, score=False))
    folder = merge_alone(config, domain)
    family = domain.family(config.model)
    made, base = Checkpoint(folder), Checkpoint(config.model.path("base"), family.names)
    for name in base.names(family.scope):
        assert not torch.equal(made.read([name])[name], base.read([name])[name]), name
    used = 6 if domain is vision else 30 if SPLITS[method] == "test" else 27
    expected = {"split": SPLITS[method], "examples": dict.fromkeys(config.tasks, used)}
    assert json.loads((folder / "provenance.json").read_text())["data"] == expected


def test_a_chain_with_data_says_what_it_used(vision_config):
    start = replace(vision_config.start, method="regmean+svc", hyper={"regmean": {"examples": 6}})
    config = replace(vision_config, start=start, run=replace(vision_config.run, score=False))
    made = json.loads((merge_alone(config, vision) / "provenance.json").read_text())
    assert made["data"] == {"split": "train", "examples": dict.fromkeys(config.tasks, 6)}
    assert made["start"]["hyper"] == {"regmean": {"examples": 6, "alpha": 0.9}, "svc": {"alpha": 0.1}}
    with pytest.raises(InputError, match="regmean needs data of the tasks; nlg has none for it"):
        check_choices(replace(config, domain="nlg", tasks=["GSM8K"]), nlg)


def test_a_merge_with_data_is_made_once_and_starts_an_adaptation(vision_config):
    config = with_method(vision_config, "regmean")
    construct(config, vision)
    times = []
    for _ in range(2):
        adapt(config, vision)
        times.append([file.stat().st_mtime_ns for file in sorted(config.run.dir.glob("merged/*/*.safetensors"))])
    assert times[0] == times[1] and len(times[0]) == 3  # the start, FDA, and the start with FDA's rest
    rows = json.loads((config.run.dir / "results.json").read_text())["rows"]
    used = {"split": "train", "examples": {"MNIST": 6, "SVHN": 6}}
    assert {row["method"]: row.get("data") for row in rows if row["label"] != SAME_REST} == {
        "pretrained": None, "individual": None, "regmean": used, "fda": used,
    }  # fmt: skip
    with pytest.raises(InputError, match=r"start\.hyper\.examples = 6, now it is 7"):
        merge_alone(with_method(vision_config, "regmean", examples=7), vision)


def test_a_merge_of_other_data_is_not_taken_for_this_one(vision_config, tmp_path):
    config = helpers.change(with_method(vision_config, "regmean"), "run", score=False)
    config = helpers.change(config, "eval", data=str(tmp_path / "data"))
    shutil.copytree(vision_config.eval.data, config.eval.data)
    made = merge_alone(config, vision)
    before = (made / "provenance.json").stat().st_mtime_ns
    (tmp_path / "data" / "MNIST" / ".DS_Store").touch()
    assert (merge_alone(config, vision) / "provenance.json").stat().st_mtime_ns == before
    (tmp_path / "data" / "MNIST" / "more.csv").write_text("image,label")
    with pytest.raises(InputError, match=r"data_sets\.MNIST = sha256:\w+, now it is sha256:\w+;"):
        merge_alone(config, vision)


def test_which_data_set_is_of_which_task_decides_a_merge(vision_config):
    """With the test sets of two tasks exchanged each task is merged by the other's inputs."""
    config = helpers.change(with_method(vision_config, "regmean"), "run", score=False)
    exchanged = helpers.change(config, "eval", tests={"MNIST": ["SVHN"], "SVHN": ["MNIST"]})
    made = merge_alone(config, vision)
    with pytest.raises(InputError, match=r"tests\.SVHN = None, now it is MNIST"):
        merge_alone(exchanged, vision)
    shutil.rmtree(made)
    merge_alone(exchanged, vision)
    with pytest.raises(InputError, match=r"was made with tests\.SVHN = MNIST, now it is None"):
        merge_alone(config, vision)


# --- the door --------------------------------------------------------------------------------------------------------


def test_every_method_has_its_defaults_and_its_split():
    assert {method: {n: p.default for n, p in hyperparameters(method).items()} for method in WITH_DATA} == DEFAULTS
    assert {method: METHODS[method].data.split for method in WITH_DATA} == SPLITS
    for method in WITH_DATA:
        check_hyper(method, DEFAULTS[method], tasks=2)
        text = sys.modules[METHODS[method].function.__module__].__doc__
        assert re.search(r"Source: .*?arXiv \d{4}\.\d{5}", text, re.DOTALL) and "Default" in text


@pytest.mark.parametrize(
    ("method", "hyper", "sentence"),
    [
        ("fisher", {"labels": 3}, "fisher: unknown hyperparameter 'labels', accepted: examples, exact, normalize, "),
        ("fisher", {"examples": None}, "fisher: examples must be a whole number, it is None"),
        ("fisher", {"power": 0.0}, "fisher: power must be above 0, it is 0.0"),
        ("fisher", {"keep": 0}, r"fisher: keep must lie in \(0, 1\], it is 0"),
        ("adamerging", {"wise": "block"}, "adamerging: wise must be 'layer' or 'task', it is 'block'"),
        ("adamerging", {"density": 0}, r"adamerging: density must lie in \(0, 1\], it is 0"),
        ("concrete", {"temperature": 0}, "concrete: temperature > 0, lr > 0, steps ≥ 0 are needed: 0, 0.001, 2000"),
        (
            "fw_merging",
            {"step": 9.0},
            r"fw_merging: scale times step in \[0, 1\] and rounds ≥ 0 are needed, they are 0.3",
        ),
        ("adarank", {"rank_fraction": 0}, r"adarank: rank_fraction must lie in \(0, 1\], it is 0"),
        ("adarank", {"lr": 0}, "adarank: temperature > 0, lr > 0, steps ≥ 0 are needed: 10.0, 0, 10000"),
        (
            "expert_merging",
            {"initial": 1},
            r"expert_merging: initial in \(0, 1\), lr > 0, epochs, hidden and anchor ≥ 0",
        ),
        ("fisher", {"floor": 0.0}, "fisher: floor > 0 and exact ≥ 1 are needed, they are 0.0 and 10"),
        ("regmean", {"examples": 0}, "regmean: examples must be at least 1, it is 0"),
        ("regmean", {"alpha": 1.1}, r"regmean: alpha must lie in \(0, 1\], it is 1.1"),
        ("regmean_pp", {"alpha": 0}, r"regmean_pp: alpha must lie in \(0, 1\], it is 0"),
        ("adamerging", {"lr": -1.0}, r"adamerging: initial in \[0, 1\], lr > 0, steps ≥ 0 are needed: 0.3, -1.0, 500"),
        ("prodistill", {"epochs": -1}, "prodistill: lr > 0 and epochs ≥ 0 are needed, they are 0.01 and -1"),
    ],
)
def test_hyperparameters_are_refused_before_anything_is_loaded(vision_config, method, hyper, sentence):
    config = replace(vision_config, start=replace(vision_config.start, method=method, hyper={method: hyper}))
    with pytest.raises(InputError, match=sentence):
        check_choices(config, vision)


def test_where_there_is_no_data_the_method_is_refused(vision_config):
    elsewhere = replace(vision_config, domain="nlg", tasks=["GSM8K"])
    for config in (
        with_method(elsewhere, "fisher"),
        replace(elsewhere, compare=replace(elsewhere.compare, starts=["ta", "fisher"])),
    ):
        with pytest.raises(InputError, match="fisher needs data of the tasks; nlg has none for it"):
            check_choices(config, nlg)
    untested = replace(vision_config, eval=replace(vision_config.eval, tests={"MNIST": []}))
    with pytest.raises(
        InputError, match=r"regmean needs data of every task, and there is no test set for MNIST; eval.tests"
    ):
        check_choices(with_method(untested, "regmean"), vision)
    with pytest.raises(InputError, match="unknown start 'fischer'; choose from .*, widen, fisher, regmean, "):
        check_choices(with_method(vision_config, "fischer"), vision)


def test_the_dry_run_says_that_whole_models_are_held(vision_config):
    assert "merge, data" in describe(with_method(vision_config, "fisher"), vision).text
    assert "merge, data" not in describe(vision_config, vision).text
