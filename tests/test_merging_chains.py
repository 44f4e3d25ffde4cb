"""Starts of several steps: how they are named and refused, what SVC and PACT compute, and the whole path."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.config import Start
from common.core.errors import InputError
from common.core.linalg import right_singular_vectors
from common.evaluation.rows import display, rank
from common.evaluation.tuning import candidates
from common.merging.pact import leading, orthonormal
from common.merging.registry import STEPS
from common.merging.starts import chain_of, check_hyper, merge
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import describe
from common.validation import check_choices
from helpers import assert_close, change
from pico_golden import GOLDEN, golden_task_vectors
from pico_task_vectors import MATRICES, OTHERS, SHAPES, task_vectors
from Vision import domain

# --- names -----------------------------------------------------------------------------------------------------------


def test_a_chain_is_filters_one_method_and_calibrations():
    chain = chain_of("pact+iso_cts+svc")
    assert (chain.before, chain.method, chain.after) == (("pact",), "iso_cts", ("svc",))
    assert chain_of("tsv").parts == ("tsv",)


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        (
            "tis+svc",
            r"tis\+svc: there is no 'tis'; before \+ stand pact, behind it svc, and between them one of average",
        ),
        ("ta+", r"ta\+: there is no ''"),
        ("svc+ta", r"svc\+ta: a chain is one merge method, before it pact, behind it svc"),
        ("ta+pact", "a chain is one merge method"),
        ("ta+tsv", "a chain is one merge method"),
        ("pact+svc", "a chain is one merge method"),
        ("ta+svc+svc", r"ta\+svc\+svc: svc stands there twice"),
        ("svc", r"svc is no merge method by itself; join it with one, as in ta\+svc: choose one of average, "),
        ("pact", r"pact is no merge method by itself; join it with one, as in pact\+ta"),
    ],
)
def test_a_chain_that_is_none_is_refused_by_name(start, sentence, pico_config):
    with pytest.raises(InputError, match=sentence):
        chain_of(start)
    with pytest.raises(InputError, match=sentence):
        check_choices(change(pico_config, "start", method=start), domain)


@pytest.mark.parametrize(
    ("start", "hyper", "sentence"),
    [
        ("ta+svc", {"scale": 1.0}, r"ta\+svc: hyperparameters are given by part, as in {ta: {…}}, not 'scale'"),
        ("ta+svc", {"svc": {"beta": 1.0}}, "svc: unknown hyperparameter 'beta', accepted: alpha"),
        ("ta+svc", {"svc": {"alpha": 0.0}}, "svc: alpha must be above 0, it is 0.0"),
        ("pact+ta", {"pact": {"kept": 1.5}}, r"pact: kept must lie in \(0, 1\], it is 1.5"),
        ("pact+ta", {"pact": {"moved": 0.0}}, r"pact: moved must lie in \(0, 1\], it is 0.0"),
        ("pact+ta", {"ta": {"scale": [0.3]}}, "ta: scale lists 1 numbers, one for each of the 2 tasks is needed"),
    ],
)
def test_hyperparameters_of_each_part_are_checked(start, hyper, sentence):
    with pytest.raises(InputError, match=sentence):
        check_hyper(start, hyper, tasks=2)


def test_a_config_names_hyperparameters_by_part(pico_config):
    def with_hyper(**hyper):
        return replace(pico_config, start=Start("ta+svc", hyper=hyper))

    check_choices(with_hyper(ta={"scale": 0.5}, svc={"alpha": 0.5}, pact={"kept": 0.9}), domain)
    for hyper, sentence in (
        ({"ta+svc": {"scale": 0.5}}, r"start\.hyper\.ta\+svc: hyperparameters are given by part, under each of "),
        ({"svc": {"alpha": "x"}}, "svc: alpha must be a number, it is 'x'"),
        ({"svk": {}}, "unknown start 'svk'"),
    ):
        with pytest.raises(InputError, match=sentence):
            check_choices(with_hyper(**hyper), domain)
    searched = change(pico_config, "compare", starts=["ta+svc"], search={"ta+svc": {"scale": [0.1]}})
    with pytest.raises(InputError, match=r"compare\.search chooses for one method at a time: ta\+svc is ta and svc"):
        candidates(searched, domain)


def test_tables_name_a_chain_by_its_parts_and_list_it_behind_its_method():
    assert display("pact+iso_cts+svc") == "PACT + Iso-CTS + SVC" and display("a+b") == "A+B"
    order = ["average", "iso_cts", "iso_cts+svc", "wudi", "wudi+svc"]
    rows = [{"method": method, "label": "", "init": None} for method in reversed(order)]
    assert [row["method"] for row in sorted(rows, key=rank)] == order


# --- SVC -------------------------------------------------------------------------------------------------------------


def stack64(deltas, name):
    return np.stack([delta[name].double().numpy() for delta in deltas])


def svc_by_direction(merged, taus, alpha):
    """One direction after the other, in the full decomposition."""
    u, s, vt = np.linalg.svd(merged, full_matrices=False)
    for r in range(len(s)):
        a = u[:, r] @ merged
        times = [a @ (u[:, r] @ tau) / np.sum((u[:, r] @ tau) ** 2) for tau in taus]
        s[r] *= len(taus) / sum(max(alpha, t) for t in times)
    return u @ np.diag(s) @ vt


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", [0.1, 1 / 3, 1.0])
def test_svc_is_its_formula(alpha, dtype):
    base, deltas = task_vectors(3, dtype=dtype)
    ours = merge("ta+svc", base, deltas, {"ta": {"scale": 0.7}, "svc": {"alpha": alpha}})
    for name in MATRICES:
        taus = stack64(deltas, name)
        assert_close(ours[name], svc_by_direction(0.7 * taus.sum(0), taus, alpha), rtol=1e-4, atol=1e-6)
    for name in OTHERS:
        assert_close(ours[name], 0.7 * stack64(deltas, name).sum(0))


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_svc_is_what_fusion_bench_computes(alpha):
    base, deltas = golden_task_vectors()
    ours = merge("ta+svc", base, deltas, {"svc": {"alpha": alpha}})
    for name, expected in GOLDEN[f"svc of ta, alpha {alpha}"].items():
        assert_close(ours[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_svc_counts_what_all_experts_share_once_whatever_the_scale(scale):
    base, (tau,) = task_vectors(1)
    ours = merge("ta+svc", base, [tau] * 3, {"ta": {"scale": scale}})
    for name in MATRICES:
        assert_close(ours[name], tau[name], atol=1e-6)


def test_svc_of_tasks_that_share_nothing_is_a_common_factor():
    """Each direction is of one task, sᵢᵣ = 1, and 0 of the other: γ = 2 / (1 + α)."""
    tau_1, tau_2 = torch.zeros(6, 8), torch.zeros(6, 8)
    tau_1[0, :3], tau_2[4:, 5] = 0.5, -2.0
    ours = merge("ta+svc", {"w": tau_1}, [{"w": tau_1}, {"w": tau_2}], {"ta": {"scale": 1.0}, "svc": {"alpha": 0.25}})
    assert_close(ours["w"], 1.6 * (tau_1 + tau_2), atol=1e-6)


# --- PACT ------------------------------------------------------------------------------------------------------------


def pact_by_svd(theta_0, taus, kept, moved):
    def leading_of(x, share):
        _, s, vt = np.linalg.svd(x)
        k = next(k for k in range(len(s) + 1) if np.sum(s[:k] ** 2) >= share * np.sum(s**2))
        return vt[:k].T

    def orth(x):
        u, s, _ = np.linalg.svd(x, full_matrices=False)
        return u[:, s > 1e-5]

    v_0 = leading_of(theta_0, kept)
    unmoved = []
    for tau in taus:
        v = leading_of(tau, moved)
        unmoved.append(orth(v_0 - v @ v.T @ v_0))
    filtered = []
    for j, tau in enumerate(taus):
        q = orth(np.hstack([r for i, r in enumerate(unmoved) if i != j]))
        filtered.append(tau @ (np.eye(len(q)) - q @ q.T))
    return np.stack(filtered)


@pytest.mark.parametrize(("kept", "moved"), [(0.85, 0.95), (0.4, 0.5), (0.2, 1.0)])
def test_pact_is_its_formula(kept, moved):
    _, (base, *deltas) = task_vectors(3, dtype=torch.float64)
    hyper = {"pact": {"kept": kept, "moved": moved}, "ta": {"scale": [1.0, 0.0]}}
    ours = merge("pact+ta", base, deltas, hyper)
    for name in MATRICES:
        expected = pact_by_svd(base[name].numpy(), stack64(deltas, name), kept, moved)
        assert_close(ours[name], expected[0], rtol=1e-7, atol=1e-12)
    for name in OTHERS:
        assert_close(ours[name], stack64(deltas, name)[0])


def test_pact_leaves_others_what_they_need_and_did_not_move():
    """θ₀ has inputs 0 and 1; task 1 moved input 1, so task 2 may touch 1 and not 0, and task 1 nothing that 2 needs."""
    theta_0 = torch.diag(torch.tensor([2.0, 2.0, 0.0]))
    tau_1, tau_2 = torch.zeros(3, 3), torch.zeros(3, 3)
    tau_1[:, 1], tau_2[:, :] = 1.0, torch.tensor([1.0, 1.0, 5.0])
    base, deltas = {"w": theta_0}, [{"w": tau_1}, {"w": tau_2}]
    full = {"kept": 1.0, "moved": 1.0}
    of_2 = merge("pact+ta", base, deltas, {"pact": full, "ta": {"scale": [0.0, 1.0]}})["w"]
    assert_close(of_2, [[0, 1, 5]] * 3, atol=1e-6)
    alone = merge("pact+ta", base, deltas[:1], {"pact": full, "ta": {"scale": 1.0}})["w"]
    assert_close(alone, tau_1)  # a single task disturbs nobody


def test_a_share_that_is_met_but_for_rounding_is_met():
    """Of four equal singular values two hold half, each changed in its last bit or not."""
    up = float(np.nextafter(np.float32(1), np.float32(2)))
    for values in ([1.0] * 4, [1.0, 1.0, up, up], [up, 1.0, 1.0, 1.0]):
        x = torch.diag(torch.tensor(values))
        assert right_singular_vectors(x)[1].shape == (4, 4) and leading(x, 0.5).shape == (4, 2)
    turned = torch.tensor([[1.0, np.cos(1e-8)], [0.0, np.sin(1e-8)]], dtype=torch.float64)
    assert orthonormal(turned).shape == (2, 1)


# --- the whole path --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["average+svc", "pact+average", "pact+iso_cts+svc"])
def test_a_chain_merges_tensor_by_tensor_and_survives_awkward_ones(start):
    base, (tau, other) = task_vectors(2, SHAPES | {"row": (1, 5), "column": (6, 1), "one": (1, 1)})
    zero = {name: torch.zeros_like(x) for name, x in tau.items()}
    opposite = {name: -x for name, x in tau.items()}
    for deltas in ([tau, other], [tau, opposite], [tau, zero], [tau, tau]):
        for theta in (base, zero):
            whole = merge(start, theta, deltas, {})
            for name, tensor in whole.items():
                assert tensor.isfinite().all() and tensor.shape == theta[name].shape and tensor.dtype == torch.float32
                alone = merge(start, {name: theta[name]}, [{name: delta[name]} for delta in deltas], {})
                assert torch.equal(alone[name], tensor)
    assert not any(tensor.any() for tensor in merge(start, base, [zero, zero], {}).values())


def test_a_chain_is_a_start_like_any_other(pico_config, no_figures):
    """Merged, scored, adapted from: its folder has its name, its provenance the hyperparameters of every part."""
    start = Start("pact+average+svc", hyper={"svc": {"alpha": 0.5}, "ta": {"scale": 0.1}})
    config = replace(pico_config, start=start)
    assert "pact+average+svc holds" in describe(config, domain).text
    folder = merge_alone(config, domain)
    assert folder == config.run.dir / "merged" / "pact+average+svc"
    said = json.loads((folder / "provenance.json").read_text())["start"]
    hyper = {"pact": {"kept": 0.85, "moved": 0.95}, "average": {"metrics": None, "power": 1.0}, "svc": {"alpha": 0.5}}
    assert said == {"method": "pact+average+svc", "hyper": hyper}
    assert (
        "start:\n  method: pact+average+svc\n  hyper:\n    svc:\n      alpha: 0.5\n"
        in (folder / "README.md").read_text()
    )
    construct(config, domain)
    assert adapt(config, domain).name == "fda-pact+average+svc-weight"
    table = (config.run.dir / "table.md").read_text()
    assert "| PACT + Average + SVC " in table and "| FDA (PACT + Average + SVC, Weight) " in table


def test_steps_have_a_source_and_defaults():
    for step in STEPS.values():
        text = __import__(step.function.__module__, fromlist=["x"]).__doc__
        assert "Source: " in text and "Default" in text and "arXiv" in text
