"""Merging: every method against its formula evaluated another way in float64, and the identities it promises."""

import numpy as np
import pytest
import torch

from common.errors import InputError
from common.merging import METHODS, SCOPE_BLOCKS, check_hyper, hyperparameters, merge
from common.merging.tsv import nearest_isometry

SHAPES = {"fc.weight": (12, 9), "fc.bias": (12,), "proj.weight": (9, 16), "conv.weight": (4, 3, 2, 2), "scale": ()}
MATRICES = ["fc.weight", "proj.weight"]


def task_vectors(tasks, shapes=SHAPES, seed=0, size=1e-2, dtype=torch.float32):
    """Random task vectors of the size that fine-tuning leaves, and a base of ones."""
    generator = torch.Generator().manual_seed(seed)
    deltas = [
        {name: size * torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for _ in range(tasks)
    ]
    return {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}, deltas


def stack64(deltas, name):
    return np.stack([delta[name].double().numpy() for delta in deltas])


def assert_close(ours, expected, rtol=1e-5, atol=1e-7):
    np.testing.assert_allclose(ours.double().numpy(), np.asarray(expected), rtol=rtol, atol=atol)


# --- formulas --------------------------------------------------------------------------------------------------------


def test_average_is_the_mean():
    base, deltas = task_vectors(3)
    for name, tensor in merge("average", base, deltas, {}).items():
        assert_close(tensor, stack64(deltas, name).mean(axis=0))


@pytest.mark.parametrize("scale", [0.3, 1, [0.5, -1.0, 2]])
def test_task_arithmetic_is_the_scaled_sum(scale):
    base, deltas = task_vectors(3)
    for name, tensor in merge("ta", base, deltas, {"scale": scale}).items():
        assert_close(tensor, np.tensordot(np.broadcast_to(scale, 3), stack64(deltas, name), axes=1))


def tsv_by_eigenvectors(taus, k):
    """TSV-M another way: Uᵢ from the eigenvectors of τᵢτᵢᵀ, and X̂ = X (XᵀX)^(-1/2)."""
    u, s, v = [], [], []
    for tau in taus:
        values, vectors = np.linalg.eigh(tau @ tau.T)
        s.append(np.sqrt(values[::-1][:k]))
        u.append(vectors[:, ::-1][:, :k])
        v.append(tau.T @ u[-1] / s[-1])
    hats = []
    for x in (np.hstack(u), np.hstack(v)):
        values, vectors = np.linalg.eigh(x.T @ x)
        hats.append(x @ vectors @ np.diag(values**-0.5) @ vectors.T)
    return hats[0] @ np.diag(np.hstack(s)) @ hats[1].T


@pytest.mark.parametrize(("fraction", "k"), [(None, 3), (0.1, 1), (0.29, 2)])
def test_tsv_is_its_formula(fraction, k):
    base, deltas = task_vectors(3)
    merged = merge("tsv", base, deltas, {"rank_fraction": fraction, "scale": 2.0})
    for name, tensor in merged.items():
        taus = stack64(deltas, name)
        expected = tsv_by_eigenvectors(taus, k) if name in MATRICES else taus.mean(axis=0)
        assert_close(tensor, 2 * expected, rtol=1e-4)


def wudi_by_autograd(taus, lr, steps):
    """The literal objective under torch.optim.Adam in float64."""
    taus = torch.tensor(taus)
    m = taus.sum(0).requires_grad_()
    adam = torch.optim.Adam([m], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        sum((((m - tau) @ tau.T) ** 2).sum() / (tau**2).sum() for tau in taus).backward()
        adam.step()
    return m.detach().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hyper", [{}, {"lr": 1e-3, "steps": 50}], ids=str)
def test_wudi_follows_adam_on_the_literal_objective(dtype, hyper):
    base, deltas = task_vectors(3, dtype=dtype)
    merged = merge("wudi", base, deltas, hyper)
    lr, steps = hyper.get("lr", 1e-5), hyper.get("steps", 300)
    tolerance = lr * (1e-2 if dtype == torch.float32 else 1e-9)
    for name in MATRICES:
        expected = wudi_by_autograd(stack64(deltas, name), lr, steps)
        assert np.abs(expected - stack64(deltas, name).sum(axis=0)).max() > 10 * lr
        assert_close(merged[name], expected, rtol=0, atol=tolerance)


def test_wudi_ends_at_the_minimiser_of_its_objective():
    """Set the gradient to zero: M = (Σ τᵢGᵢ)(Σ Gᵢ)⁻¹ with Gᵢ = τᵢᵀτᵢ / ‖τᵢ‖²."""
    base, deltas = task_vectors(3, {"w": (6, 4)}, size=1.0, dtype=torch.float64)
    taus = stack64(deltas, "w")
    grams = [tau.T @ tau / np.sum(tau**2) for tau in taus]
    minimiser = sum(tau @ gram for tau, gram in zip(taus, grams, strict=True)) @ np.linalg.inv(sum(grams))
    assert_close(merge("wudi", base, deltas, {"lr": 1e-2, "steps": 3000})["w"], minimiser, rtol=0, atol=1e-6)


# --- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_one_task_gives_its_task_vector(method):
    base, deltas = task_vectors(1)
    merged = merge(method, base, deltas, {"scale": 1.0} if method != "average" else {})
    for name in MATRICES if method == "wudi" else SHAPES:
        assert_close(merged[name], deltas[0][name], rtol=0, atol=0 if method != "tsv" else 1e-7)


@pytest.mark.parametrize(
    ("method", "hyper"), [("average", {}), ("ta", {"scale": 1 / 3}), ("tsv", {"rank_fraction": 1.0})]
)
def test_identical_experts_give_that_expert(method, hyper):
    base, (tau,) = task_vectors(1)
    for name, tensor in merge(method, base, [tau] * 3, hyper).items():
        assert_close(tensor, tau[name], rtol=0, atol=1e-7)


def test_identical_experts_are_where_wudi_goes():
    """On orthonormal columns, where Gᵢ = I/4 and Adam meets a plain bowl; it starts at three times the expert."""
    base, (tau,) = task_vectors(1, {"w": (6, 4)}, size=1.0, dtype=torch.float64)
    expert = {"w": torch.linalg.qr(tau["w"]).Q}
    assert_close(merge("wudi", base, [expert] * 3, {"lr": 1e-2, "steps": 2000})["w"], expert["w"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_tasks_does_not_matter(method):
    base, deltas = task_vectors(4)
    merged, turned = merge(method, base, deltas, {}), merge(method, base, deltas[2:] + deltas[:2], {})
    for name in SHAPES:
        assert_close(merged[name], turned[name], rtol=0, atol=2e-7)


@pytest.mark.parametrize("method", METHODS)
def test_zero_task_vectors_give_zeros_without_an_svd(method, monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("an SVD of zeros was asked for"))
    base, deltas = task_vectors(3, size=0.0)
    for tensor in merge(method, base, deltas, {}).values():
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize(("method", "hyper"), [("tsv", {"rank_fraction": 1 / 3}), ("wudi", {})])
def test_a_task_of_zeros_changes_nothing(method, hyper):
    base, deltas = task_vectors(2)
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    merged, with_zero = merge(method, base, deltas, hyper), merge(method, base, [deltas[0], zero, deltas[1]], hyper)
    for name in MATRICES:
        assert_close(merged[name], with_zero[name], rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_any_part_of_a_model_merges_alone_and_leaves_its_input_untouched(method):
    base, deltas = task_vectors(3)
    copies = [{name: tensor.clone() for name, tensor in delta.items()} for delta in deltas]
    whole = merge(method, base, deltas, {})
    assert whole.keys() == base.keys()
    for name in SHAPES:
        alone = merge(method, {name: base[name]}, [{name: delta[name]} for delta in deltas], {})
        assert alone.keys() == {name} and torch.equal(alone[name], whole[name])
        assert all(torch.equal(delta[name], copy[name]) for delta, copy in zip(deltas, copies, strict=True))
        assert all(whole[name].data_ptr() != delta[name].data_ptr() for delta in deltas)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_comes_out_as_float32(method):
    base, deltas = task_vectors(3, dtype=torch.bfloat16)
    merged = merge(method, base, deltas, {})
    wide = merge(method, base, [{name: tensor.float() for name, tensor in delta.items()} for delta in deltas], {})
    for name in SHAPES:
        assert merged[name].dtype == torch.float32 and torch.equal(merged[name], wide[name])


@pytest.mark.parametrize("method", METHODS)
def test_trainable_parameters_merge_without_a_graph(method):
    base, deltas = task_vectors(2)
    deltas = [{name: torch.nn.Parameter(tensor) for name, tensor in delta.items()} for delta in deltas]
    assert not any(tensor.requires_grad for tensor in merge(method, base, deltas, {}).values())


# --- what single methods promise -------------------------------------------------------------------------------------


def test_tsv_makes_the_tasks_directions_orthonormal():
    """δ = Û diag(S) V̂ᵀ with orthonormal Û, V̂ has exactly the kept singular values of all tasks as its own."""
    base, deltas = task_vectors(3)
    merged = merge("tsv", base, deltas, {})
    for name in MATRICES:
        kept = np.sort(np.linalg.svd(stack64(deltas, name), compute_uv=False)[:, :3].ravel())[::-1]
        assert_close(torch.linalg.svdvals(merged[name]), kept, rtol=1e-5)


def test_the_nearest_isometry_is_orthonormal_and_keeps_orthonormal_columns():
    x = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hat = nearest_isometry(x)
    assert_close(hat.T @ hat, np.eye(7), atol=1e-12)
    assert_close(nearest_isometry(hat), hat, atol=1e-12)
    assert torch.linalg.eigvalsh(x.T @ hat).min() > 0  # XᵀX̂ = (XᵀX)^(1/2): no other isometry is nearer


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (2, 8)])
def test_tsv_averages_matrices_smaller_than_the_number_of_tasks(shape):
    base, deltas = task_vectors(3, {"w": shape})
    assert_close(merge("tsv", base, deltas, {})["w"], stack64(deltas, "w").mean(axis=0))


def test_tsv_keeps_one_component_of_a_matrix_as_small_as_the_number_of_tasks():
    base, deltas = task_vectors(3, {"w": (3, 8)})
    largest = np.sort(np.linalg.svd(stack64(deltas, "w"), compute_uv=False)[:, 0])[::-1]
    assert_close(torch.linalg.svdvals(merge("tsv", base, deltas, {})["w"]), largest)


def test_tsv_of_identical_experts_is_that_expert_cut_to_the_kept_rank():
    base, (tau,) = task_vectors(1)
    merged = merge("tsv", base, [tau] * 3, {})
    for name in MATRICES:
        u, s, vh = np.linalg.svd(tau[name].double().numpy())
        assert_close(merged[name], u[:, :3] * s[:3] @ vh[:3], rtol=0)


def test_tsv_rank_is_not_lost_to_rounding():
    """0.29 · 100 is 28.999999999999996 in floats."""
    base, deltas = task_vectors(1, {"w": (100, 100)})
    assert torch.linalg.matrix_rank(merge("tsv", base, deltas, {"rank_fraction": 0.29})["w"]) == 29


def test_tsv_of_low_rank_experts_is_their_sum_where_they_do_not_overlap():
    """Rank-1 experts (LoRA) on different rows and columns: nothing to make orthogonal, nothing lost."""
    tau_1, tau_2 = torch.zeros(6, 8), torch.zeros(6, 8)
    tau_1[0, :3], tau_2[4:, 5] = 0.5, -2.0
    merged = merge("tsv", {"w": torch.ones(6, 8)}, [{"w": tau_1}, {"w": tau_2}], {})["w"]
    assert_close(merged, tau_1 + tau_2, atol=1e-6)


def test_wudi_moves_matrices_only_and_takes_no_step_when_told_none():
    base, deltas = task_vectors(3)
    merged = merge("wudi", base, deltas, {"steps": 0, "scale": 0.5})
    for name in SHAPES:
        start = stack64(deltas, name).sum(axis=0) if name in MATRICES else np.zeros(SHAPES[name])
        assert_close(merged[name], 0.5 * start)


# --- the door --------------------------------------------------------------------------------------------------------


def test_every_method_takes_its_hyperparameters_by_keyword_with_a_default():
    assert set(METHODS) == {"average", "ta", "tsv", "wudi"} and METHODS.keys() >= SCOPE_BLOCKS
    defaults = {method: {name: p.default for name, p in hyperparameters(method).items()} for method in METHODS}
    assert defaults == {
        "average": {},
        "ta": {"scale": 0.3},
        "tsv": {"rank_fraction": None, "scale": 1.0},
        "wudi": {"lr": 1e-5, "steps": 300, "scale": 1.0},
    }
    for method, hyper in defaults.items():
        check_hyper(method, hyper, tasks=2)


@pytest.mark.parametrize(
    ("method", "hyper", "sentence"),
    [
        ("tis", {}, "unknown merge method 'tis': choose one of average, ta, tsv, wudi"),
        ("tsv", {"rank": 3}, "tsv: unknown hyperparameter 'rank', accepted: rank_fraction, scale"),
        ("average", {"scale": 1.0}, "average: unknown hyperparameter 'scale', accepted: none"),
        ("ta", {"scale": "0.3"}, "ta: scale must be float .* it is '0.3'"),
        ("ta", {"scale": [0.3, None]}, r"ta: scale must be float .* it is \[0.3, None\]"),
        ("wudi", {"steps": 1.5}, "wudi: steps must be int, it is 1.5"),
        ("wudi", {"steps": True}, "wudi: steps must be int, it is True"),
    ],
)
def test_names_and_types_are_refused_before_anything_is_loaded(method, hyper, sentence):
    with pytest.raises(InputError, match=sentence):
        check_hyper(method, hyper)


@pytest.mark.parametrize(
    ("method", "hyper", "sentence"),
    [
        ("ta", {"scale": [0.3, 0.3]}, "ta: scale lists 2 numbers, one for each of the 3 tasks is needed"),
        ("tsv", {"rank_fraction": 0.0}, r"tsv: rank_fraction must lie in \(0, 1\], it is 0.0"),
        ("tsv", {"rank_fraction": 8}, r"tsv: rank_fraction must lie in \(0, 1\], it is 8"),
        ("wudi", {"lr": 0}, "wudi: lr must be above 0 and steps at least 0, they are 0 and 300"),
        ("wudi", {"steps": -1}, "wudi: lr must be above 0 and steps at least 0, they are 1e-05 and -1"),
    ],
)
def test_values_are_refused_once_the_number_of_tasks_is_known(method, hyper, sentence):
    with pytest.raises(InputError, match=sentence):
        check_hyper(method, hyper, tasks=3)


def test_merge_refuses_no_task_other_tensors_and_values_that_are_not_finite():
    base, deltas = task_vectors(2, {"w": (2, 3)})
    with pytest.raises(InputError, match="average: at least one task"):
        merge("average", base, [], {})
    with pytest.raises(InputError, match="w: missing"):
        merge("average", base, [deltas[0], {}], {})
    with pytest.raises(InputError, match=r"w: \(3,\) against \(2, 3\)"):
        merge("average", base, [deltas[0], {"w": torch.zeros(3)}], {})
    deltas[1]["w"][0, 0] = torch.nan
    with pytest.raises(InputError, match="w: the task vector of task 2 of 2 holds NaN or infinite"):
        merge("average", base, deltas, {})
