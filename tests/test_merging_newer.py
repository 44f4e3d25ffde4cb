"""The merge methods of 2024 to 2026 against their formulas, evaluated another way in float64 with numpy."""

import numpy as np
import pytest
import torch

from common.core.errors import InputError
from common.core.linalg import rank_to_reach
from common.merging.registry import hyperparameters
from common.merging.starts import merge, survey
from common.merging.tensorwise import layer_of
from helpers import assert_close
from pico_task_vectors import MATRICES, OTHERS, SHAPES, task_vectors


def stack64(deltas, name):
    return np.stack([delta[name].double().numpy() for delta in deltas])


def truncated(x, k):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return u[:, :k] @ np.diag(s[:k]) @ vt[:k]


def polar(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def check(method, formula, hyper, tasks=3, rtol=1e-4, atol=1e-7, **settings):
    """The formula on every matrix, the mean elsewhere."""
    base, deltas = task_vectors(tasks, **settings)
    for name, tensor in merge(method, base, deltas, hyper).items():
        taus = stack64(deltas, name)
        given = {n: p.default for n, p in hyperparameters(method).items()} | hyper
        assert_close(tensor, formula(taus, **given) if name in MATRICES else taus.mean(0), rtol=rtol, atol=atol)


# --- weights for experts ---------------------------------------------------------------------------------------------


def test_average_can_weigh_by_a_power_of_metrics():
    base, deltas = task_vectors(3)
    losses = [0.5, 1.0, 2.0]
    ours = merge("average", base, deltas, {"metrics": losses, "power": -2.0})
    for name in SHAPES:
        assert_close(ours[name], np.tensordot([16 / 21, 4 / 21, 1 / 21], stack64(deltas, name), axes=1))


@pytest.mark.parametrize(("power", "best"), [(4000.0, 2), (-4000.0, 0)])
def test_a_power_that_no_float_holds_leaves_the_best_expert_alone(power, best):
    base, deltas = task_vectors(3)
    ours = merge("average", base, deltas, {"metrics": [0.5, 1.0, 2.0], "power": power})
    for name in SHAPES:
        assert_close(ours[name], stack64(deltas, name)[best])


def sce_by_loop(taus, select, masked):
    flat = taus.reshape(len(taus), -1)
    v = flat.var(axis=0)
    chosen = np.argsort(-v, kind="stable")[: int(select * np.count_nonzero(v) + 1e-9)]
    mask = np.isin(np.arange(len(v)), chosen) if select < 1 else np.ones(len(v), bool)
    sizes = [np.mean((tau * mask) ** 2) for tau in flat]
    w = np.array(sizes) / sum(sizes) if sum(sizes) else np.full(len(flat), 1 / len(flat))
    delta = np.zeros(len(v))
    for j in range(len(v)):
        sign = 1 if flat[:, j].sum() >= 0 else -1
        kept = [i for i in range(len(flat)) if np.sign(flat[i, j] * (mask[j] if masked else 1)) == sign]
        if sum(w[i] for i in kept):
            delta[j] = sum(w[i] * flat[i, j] for i in kept) / sum(w[i] for i in kept)
    return delta.reshape(taus.shape[1:])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("select", [0.1, 0.5, 1.0])
def test_sce_is_its_formula(select, masked):
    base, deltas = task_vectors(4)
    for name, tensor in merge("sce", base, deltas, {"select": select, "masked": masked}).items():
        assert_close(tensor, sce_by_loop(stack64(deltas, name), select, masked))


def test_sce_selects_equal_variances_together_and_none_of_rounding():
    """(1, 3) and (3, 1) vary alike; (0.1, 0.1, 0.1) does not, whatever its mean is in floats."""
    taus = [torch.tensor([1.0, 3.0, 0.1]), torch.tensor([3.0, 1.0, 0.1]), torch.tensor([2.0, 2.0, 0.1])]
    ours = merge("sce", {"w": torch.zeros(3)}, [{"w": tau} for tau in taus], {"select": 0.5})["w"]
    w = np.array([10, 10, 8]) / 28
    assert_close(ours, [w @ [1, 3, 2], w @ [3, 1, 2], 0.1], rtol=1e-6)


def test_varm_is_its_formula():
    base, deltas = task_vectors(3)
    deltas[1] = {name: 3 * tau for name, tau in deltas[1].items()}
    for name, tensor in merge("varm", base, deltas, {}).items():
        taus = stack64(deltas, name)
        sizes = np.array([np.mean(tau**2) for tau in taus])
        assert_close(tensor, np.tensordot(sizes / sizes.sum(), taus, axes=1))


@pytest.mark.parametrize("scale", [None, 0.7])
def test_rws_adds_what_is_orthogonal_to_the_patched_expert(scale):
    base, deltas = task_vectors(3)
    lam = 1 / 2 if scale is None else scale
    for name, tensor in merge("rws", base, deltas, {"clean": 1, "scale": scale}).items():
        a, own, b = stack64(deltas, name)
        direction = own / np.sqrt(np.sum(own**2))
        rest = [x - np.sum(x * direction) * direction for x in (a, b)]
        assert_close(tensor, own + lam * sum(rest), atol=1e-8)
        if tensor.ndim:
            assert abs(np.sum((tensor.double().numpy() - own) * own)) < 1e-6 * np.sum(own**2)


LAYERS = {f"model.layers.{i}.w": (2, 2) for i in range(6)} | {"embed.w": (3, 2), "norm": (2,)}


def test_rws_keeps_to_the_first_layers():
    base, deltas = task_vectors(2, LAYERS)
    ours, whole = merge("rws", base, deltas, {"keep": 2}), merge("rws", base, deltas, {})
    for name in LAYERS:
        patched = name in ("model.layers.0.w", "model.layers.1.w")
        assert torch.equal(ours[name], (whole if patched else deltas[0])[name])


def test_layer_swap_takes_outer_layers_of_one_and_inner_ones_of_another():
    """Six layers: 0 and 1 of the outer expert, 2 and 4 the mean, 3 of the inner one, 5 of the outer one."""
    base, (a, b) = task_vectors(2, LAYERS)
    hyper = {"outer": 1, "bottom": 2, "top": 1, "unnumbered": "inner"}
    ours = merge("layer_swap", base, [a, b], hyper)
    sources = [b, b, None, a, None, b]
    for i, source in enumerate(sources):
        name = f"model.layers.{i}.w"
        assert_close(ours[name], source[name] if source else (a[name] + b[name]) / 2)
    assert torch.equal(ours["embed.w"], a["embed.w"]) and torch.equal(ours["norm"], a["norm"])
    found = survey("layer_swap", lambda: [({n: base[n]}, [{n: a[n]}, {n: b[n]}]) for n in LAYERS], hyper)
    last = "model.layers.5.w"
    assert found == 6 and torch.equal(
        merge("layer_swap", {last: base[last]}, [{last: a[last]}, {last: b[last]}], hyper, found)[last], b[last]
    )
    with pytest.raises(InputError, match="layer_swap: outer is 0 or 1, numbers of layers at least 0, not 2, 5, 2, 1"):
        merge("layer_swap", base, [a, b], {"outer": 2})


def test_the_layer_of_a_tensor_is_the_first_number_in_its_name():
    names = ["visual.transformer.resblocks.11.mlp.c_fc.weight", "model.layers.3.mlp.experts.7.w", "lm_head.weight"]
    assert [layer_of(name) for name in names] == [11, 3, None]


# --- singular directions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "rank"), [(0.2, 1), (0.25, 1), (0.26, 2), (0.75, 3), (0.751, 4), (1.0, 4)])
def test_the_rank_that_reaches_a_share_does_not_hang_on_rounding(share, rank):
    for values in ([0.1] * 4, [0.1 + 1e-8, 0.1, 0.1, 0.1 - 1e-8]):
        assert rank_to_reach(torch.tensor(values), share) == rank


@pytest.mark.parametrize("share", [0.4, 0.8])
def test_star_is_its_formula(share):
    def formula(taus, share, **_):
        kept = []
        for tau in taus:
            u, s, vt = np.linalg.svd(tau, full_matrices=False)
            k = next(k for k in range(1, len(s) + 1) if s[:k].sum() >= share * s.sum())
            kept.append(u[:, :k] @ np.diag(s[:k] / s[:k].sum() * s.sum()) @ vt[:k])
        return sum(kept) / len(kept)

    check("star", formula, {"share": share})


@pytest.mark.parametrize("hyper", [{}, {"rank_fraction": 0.5, "scale": 0.7}], ids=str)
def test_cart_is_its_formula(hyper):
    def formula(taus, rank_fraction, scale, **_):
        mean, k = taus.mean(0), max(1, int(rank_fraction * min(taus[0].shape)))
        return mean + scale * sum(truncated(tau - mean, k) for tau in taus)

    check("cart", formula, hyper)


def dc_merge_by_svd(taus, keep, smooth, rank=None, **_):
    n, side = len(taus), min(taus[0].shape)
    k = min(rank or side, side // n)
    u, s, vt = np.linalg.svd(taus, full_matrices=False)
    u, s, vt = u[..., :k], s[:, :k], vt[:, :k]
    for i in range(n):
        if smooth != "no":
            top = 1.0 if smooth == "mean" else min(5, s[i, 0] / s[i, -1])
            line = np.array([top + (1 - top) * j / max(1, k - 1) for j in range(k)])
            s[i] = line * s[i].sum() / line.sum()
    u_hat, v_hat = polar(np.hstack(u)), polar(np.vstack(vt))
    ms = [u_hat.T @ (u[i] * s[i]) @ vt[i] @ v_hat.T for i in range(n)]
    count = max(1, int(keep * side**2 + 1e-9))
    ms = [np.where(np.abs(m) >= np.sort(np.abs(m), axis=None)[-min(count, m.size)], m, 0) for m in ms]
    merged = np.zeros_like(ms[0])
    for a in range(n * k):
        for b in range(n * k):
            values = [m[a, b] for m in ms]
            agree = [x for x in values if x != 0 and np.sign(x) == np.sign(sum(values))]
            if agree and a // k == b // k:
                merged[a, b] = np.mean(agree)
    return u_hat @ merged @ v_hat


@pytest.mark.parametrize(
    "hyper", [{}, {"keep": 0.3}, {"keep": 0.3, "rank": 2, "smooth": "mean"}, {"keep": 1.0, "smooth": "ramp"}], ids=str
)
def test_dc_merge_is_its_formula(hyper):
    check("dc_merge", dc_merge_by_svd, hyper)


@pytest.mark.parametrize("method", ["dc_merge"])
def test_dc_merge_averages_matrices_smaller_than_the_number_of_tasks(method):
    base, deltas = task_vectors(3, {"w": (2, 8)})
    assert_close(merge(method, base, deltas, {})["w"], stack64(deltas, "w").mean(0))


# --- covariance of the task vectors ----------------------------------------------------------------------------------


def by_pseudo_inverse(taus, parts):
    grams = [part.T @ part for part in parts]
    return sum(tau @ gram for tau, gram in zip(taus, grams, strict=True)) @ np.linalg.pinv(sum(grams), rcond=1e-12)


def largest_half(tau):
    floor = np.sort(np.abs(tau), axis=None)[::-1][tau.size // 2 - 1]
    return np.where(np.abs(tau) >= floor, tau, 0)


def test_actmat_and_tact_are_their_formulas():
    check("actmat", lambda taus, **_: by_pseudo_inverse(taus, taus), {}, dtype=torch.float64)
    check("tact", lambda taus, **_: by_pseudo_inverse(taus, map(largest_half, taus)), {}, dtype=torch.float64)


def test_actmat_and_tact_are_switches_of_wudi_exact():
    base, deltas = task_vectors(3)
    for method, switches in (("actmat", {}), ("tact", {"density": 0.5})):
        ours, exact = (
            merge(method, base, deltas, {}),
            merge("wudi_exact", base, deltas, {"normalize": False} | switches),
        )
        assert all(torch.equal(ours[name], exact[name]) for name in MATRICES)
    averaged = merge("actmat", base, deltas, {"longest": 12})
    assert_close(averaged["proj.weight"], stack64(deltas, "proj.weight").mean(0))
    assert_close(averaged["fc.weight"], merge("actmat", base, deltas, {})["fc.weight"])


@pytest.mark.parametrize("adapters", [False, True])
def test_optmerge_follows_the_literal_objective(adapters):
    """Its gradient by autograd, on whole decompositions."""
    lr, steps = 1e-3, 20

    def formula(taus, **_):
        k, mean = min(taus[0].shape) // len(taus), taus.mean(0)
        pairs = []
        for tau in taus:
            _, s, vt = np.linalg.svd(tau)
            target = truncated(tau, k) if adapters else mean + truncated(tau - mean, k)
            pairs.append((torch.tensor(target), torch.tensor(np.diag(s[:k]) @ vt[:k]), np.sum(tau**2)))
        m = torch.tensor(mean if adapters else taus.sum(0), requires_grad=True)
        kinds = {True: lambda: torch.optim.SGD([m], lr=lr, momentum=0.9), False: lambda: torch.optim.Adam([m], lr=lr)}
        optimizer = kinds[adapters]()
        for _ in range(steps):
            optimizer.zero_grad()
            sum((((m - target) @ low.T) ** 2).sum() / size for target, low, size in pairs).backward()
            optimizer.step()
        return m.detach().numpy()

    hyper = {"lr": lr, "steps": steps, "adapters": adapters}
    check("optmerge", formula, hyper, rtol=1e-6, atol=1e-9, dtype=torch.float64)


def ace_by_inverse(taus, epsilon, uneven, share, **_):
    sizes = np.array([np.sum(tau**2) for tau in taus])
    gamma = np.var(np.log(sizes), ddof=1) / np.mean(np.log(sizes)) ** 2
    width, sigmas, ridges = taus[0].shape[1], [], []
    centred = [tau - tau.mean(0, keepdims=True) for tau in taus]
    for x in centred:
        trace = np.trace(x.T @ x) if gamma > uneven else 1.0
        sigmas.append(x.T @ x / trace)
        ridges.append(sigmas[-1] + epsilon / trace * np.eye(width))
    row = sum(sigmas).mean(0, keepdims=True) / (sizes.mean() if gamma > uneven else 1.0)
    w = sum(x @ s for x, s in zip(centred, ridges, strict=True)) @ np.linalg.inv(sum(ridges) + row)
    if gamma <= uneven:
        return w
    rest = w + sum(tau @ (s - sum(ridges) / len(taus)) for tau, s in zip(taus, sigmas, strict=True))
    u, s, vt = np.linalg.svd(rest, full_matrices=False)
    k = int(share * len(s) + 1e-9)
    return w + s[:k].mean() * u[:, :k] @ vt[:k]


@pytest.mark.parametrize("uneven", [0.0, 0.3, 9.0])
@pytest.mark.parametrize("size", [1e-2, 1.0])
def test_ace_is_its_formula(size, uneven):
    check("ace", ace_by_inverse, {"uneven": uneven, "epsilon": 1e-3}, size=size, dtype=torch.float64, rtol=1e-7)


@pytest.mark.parametrize("sizes", [(1.0,), (1.0, 1.2), (1.0, 30.0)], ids=["one", "even", "uneven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_task_that_left_a_matrix_as_it_was_takes_no_part_in_ace(sizes, dtype):
    """Its covariance is zero: neither it nor its ε, which its trace of zero would make infinite, is in any sum."""
    g = torch.Generator().manual_seed(5)
    base = {"w": torch.zeros(7, 5, dtype=dtype)}
    taus = [{"w": (size * torch.randn(7, 5, generator=g, dtype=torch.float64)).to(dtype)} for size in sizes]
    alone = merge("ace", base, taus, {})["w"]
    for place in range(len(sizes) + 1):
        more = [*taus[:place], {"w": torch.zeros(7, 5, dtype=dtype)}, *taus[place:]]
        assert torch.equal(merge("ace", base, more, {})["w"], alone)
    assert alone.norm() < 3 * sum(tau["w"].norm() for tau in taus)


@pytest.mark.parametrize("shape", [(1, 5), (6, 5)], ids=str)
def test_ace_of_rows_that_are_all_alike_is_nothing(shape):
    """The mean row is lost, and a task without anything else has no covariance that could be evened."""
    taus = [{"w": size * torch.tensor([0.1, 0.7, -0.3, 0.9, 1.3]).expand(shape).clone()} for size in (1.0, 30.0)]
    base = {"w": torch.zeros(shape)}
    assert not merge("ace", base, taus, {})["w"].any()
    if shape[0] > 1:  # beside one of other rows it adds nothing
        other = {"w": torch.randn(shape, generator=torch.Generator().manual_seed(6))}
        alone = merge("ace", base, [other], {"uneven": 0.0})["w"]
        beside = merge("ace", base, [other, taus[1]], {"uneven": 0.0})["w"]
        assert beside.norm() < 3 * other["w"].norm() and alone.norm() < 3 * other["w"].norm()


def test_ace_of_one_task_loses_its_mean_row_and_little_else():
    base, (tau,) = task_vectors(1, size=1.0, dtype=torch.float64)
    ours = merge("ace", base, [tau], {"epsilon": 1e-3})
    for name in MATRICES:
        x = tau[name].numpy() - tau[name].numpy().mean(0)
        row = (x.T @ x).mean(0, keepdims=True)
        ridge = x.T @ x + 1e-3 * np.eye(x.shape[1])
        assert_close(ours[name], x @ ridge @ np.linalg.inv(ridge + row), rtol=1e-5, atol=1e-7)
    for name in OTHERS:
        assert_close(ours[name], tau[name])
