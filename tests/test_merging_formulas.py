"""Every merge method against its formula, evaluated another way in float64."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.random import SFC64

from common.core.linalg import nearest_isometry, rank_of_share, regression_mean, scale_off_diagonal, truncated_svd
from common.core.seeding import random_choice, random_mask
from common.merging.dare import dropped
from common.merging.fisher import fisher_mean
from common.merging.magnitude import largest, trim
from common.merging.registry import METHODS, hyperparameters
from common.merging.starts import merge
from common.merging.swudi import filtered
from common.merging.whole import nth_largest
from common.merging.widen import rank_limit
from common.merging.wudi import minimise_interference
from helpers import assert_close
from pico_golden import GOLDEN, golden_task_vectors
from pico_task_vectors import MATRICES, OTHERS, SHAPES, task_vectors


def stack64(deltas, name):
    return np.stack([delta[name].double().numpy() for delta in deltas])


def norm(x):
    return np.sqrt(np.sum(np.square(x)))


# --- weight by weight ------------------------------------------------------------------------------------------------


def test_average_is_the_mean():
    base, deltas = task_vectors(3)
    for name, tensor in merge("average", base, deltas, {}).items():
        assert_close(tensor, stack64(deltas, name).mean(axis=0))


@pytest.mark.parametrize("scale", [0.3, 1, [0.5, -1.0, 2]])
def test_task_arithmetic_is_the_scaled_sum(scale):
    base, deltas = task_vectors(3)
    for name, tensor in merge("ta", base, deltas, {"scale": scale}).items():
        assert_close(tensor, np.tensordot(np.broadcast_to(scale, 3), stack64(deltas, name), axes=1))


def slerp_by_rotation(a, b, t):
    """Turn a in the plane of a and b by t of the angle between them; lengths go from 1 (of a) to 1 (of b) likewise."""
    u, v = a / norm(a), b / norm(b)
    angle = np.arctan2(norm(v - np.sum(u * v) * u), np.sum(u * v))
    side = (v - np.sum(u * v) * u) / norm(v - np.sum(u * v) * u)
    return np.cos(t * angle) * u + np.sin(t * angle) * side


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_of_ends_of_one_length_is_a_rotation(t):
    base, deltas = task_vectors(2, {"w": (6, 5)}, size=1.0)
    a, b = (base["w"] + delta["w"] for delta in deltas)
    b *= a.norm() / b.norm()
    merged = merge("slerp", base, [{"w": a - base["w"]}, {"w": b - base["w"]}], {"t": t})
    expected = slerp_by_rotation(a.double().numpy(), b.double().numpy(), t) * float(a.norm())
    assert_close(base["w"] + merged["w"], expected, rtol=1e-4, atol=1e-5)
    taus = stack64(deltas, "w") / norm(stack64(deltas, "w")[0])
    taus[1] /= norm(taus[1])
    merged = merge("slerp", base, [{"w": torch.tensor(x).float()} for x in taus], {"t": t, "of_task_vectors": True})
    assert_close(merged["w"], slerp_by_rotation(*taus, t), rtol=1e-4, atol=1e-6)


def test_slerp_is_linear_between_near_parallel_experts_and_beside_a_zero():
    base, deltas = task_vectors(2)
    for name, tensor in merge("slerp", base, deltas, {"t": 0.25}).items():
        assert_close(tensor, np.tensordot([0.75, 0.25], stack64(deltas, name), axes=1))
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    half = merge("slerp", base, [zero, deltas[0]], {"of_task_vectors": True})
    assert_close(half["fc.weight"], deltas[0]["fc.weight"] / 2)


def ties_by_loop(taus, density):
    flat = taus.reshape(len(taus), -1)
    kept = np.zeros_like(flat)
    for i, tau in enumerate(flat):
        order = np.argsort(-np.abs(tau))[: max(1, int(density * len(tau) + 1e-9))]
        kept[i, order] = tau[order]
    merged = np.zeros(flat.shape[1])
    for j, column in enumerate(kept.T):
        agree = column[np.sign(column) == np.sign(column.sum())]
        merged[j] = agree.mean() if column.sum() != 0 else 0.0
    return merged.reshape(taus.shape[1:])


def in_one(deltas, names=SHAPES):
    """Every task vector as one row."""
    return np.hstack([stack64(deltas, name).reshape(len(deltas), -1) for name in names])


def taken_apart(flat, names=SHAPES):
    """{name: its part of a row}, as `in_one` joins them."""
    ends = np.cumsum([np.prod(SHAPES[name], dtype=int) for name in names])[:-1]
    parts = np.split(flat, ends)
    return {n: part.reshape(SHAPES[n]) for n, part in zip(names, parts, strict=True)}


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_its_algorithm(density):
    base, deltas = task_vectors(4)
    deltas[1] = {name: (3 if name == "fc.bias" else 1) * tau for name, tau in deltas[1].items()}
    hyper = {"density": density, "scale": 0.5}
    whole = taken_apart(ties_by_loop(in_one(deltas), density))
    for name, tensor in merge("ties", base, deltas, hyper).items():
        assert_close(tensor, 0.5 * whole[name])
    for name, tensor in merge("ties", base, deltas, hyper | {"granularity": "tensor"}).items():
        assert_close(tensor, 0.5 * ties_by_loop(stack64(deltas, name), density))


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_ties_is_what_fusion_bench_computes(share):
    """Of 60 weights it keeps one more than the share: the threshold's own place, counted from below."""
    base, deltas = golden_task_vectors()
    ours = merge("ties", base, deltas, {"density": (60 * share + 1) / 60})
    assert ours.keys() == GOLDEN[f"ties, K {share}"].keys()
    for name, expected in GOLDEN[f"ties, K {share}"].items():
        assert_close(ours[name], expected, rtol=1e-12, atol=0)


def test_ties_by_hand():
    """Of (4, −1, 2), (−2, 3, 1) and (5, 1, −1) two of three are kept: the last column has one voter, −1 and 1 fall."""
    taus = [[4.0, -1.0, 2.0], [-2.0, 3.0, 1.0], [5.0, 1.0, -0.5]]
    merged = merge("ties", {"w": torch.zeros(3)}, [{"w": torch.tensor(t)} for t in taus], {"density": 2 / 3})
    assert merged["w"].tolist() == [4.5, 2.0, 2.0]


@pytest.mark.parametrize("drop", [0.0, 0.5, 0.9])
def test_dare_drops_at_its_rate_and_rescales_the_rest(drop):
    base, deltas = task_vectors(2, {"a": (60, 50), "b": (60, 50)})
    once, again = dropped(deltas, drop, seed=0), dropped(deltas, drop, seed=0)
    masks = {}
    for i, name in itertools.product(range(2), ("a", "b")):
        tau, left = deltas[i][name], once[i][name]
        masks[i, name] = left != 0
        assert torch.equal(left, again[i][name])
        assert_close(left[left != 0], tau[left != 0].double() / (1 - drop), rtol=1e-5)
        assert abs(masks[i, name].double().mean() - (1 - drop)) < 5 * (drop * (1 - drop) / tau.numel()) ** 0.5 + 1e-9
    if drop:
        assert all(not torch.equal(m, n) for m, n in itertools.combinations(masks.values(), 2))
        assert not torch.equal(once[0]["a"], dropped(deltas, drop, seed=1)[0]["a"])
    for method, then, hyper in (("dare_ta", "ta", {}), ("dare_ties", "ties", {"granularity": "tensor"})):
        merged, expected = merge(method, base, deltas, {"drop": drop}), merge(then, base, once, hyper)
        assert torch.equal(merged["a"], expected["a"])


def mersenne_uniform(seed, count):
    """Uniform numbers of 53 bits, each of two words (high, low) of the Mersenne twister with the low word of a seed."""
    twister = np.random.RandomState(seed & 0xFFFFFFFF)
    words = twister.randint(0, 2**32, 2 * count, dtype=np.uint32).astype(np.uint64).reshape(count, 2)
    return (((words[:, 0] << 32) | words[:, 1]) & (2**53 - 1)) / 2**53


def test_what_is_drawn_is_the_mersenne_twisters_on_every_machine():
    """torch's own Bernoulli and exponential numbers come from another library on CPUs of one maker."""
    seed = 1234567890123
    uniform = mersenne_uniform(seed, 3000)
    p = np.random.default_rng(0).dirichlet(np.ones(20))
    generator = torch.Generator().manual_seed(seed)
    drawn = [random_choice(torch.tensor(p), generator) for _ in range(150)]
    assert drawn == [int(np.argmax(p / -np.log1p(-u))) for u in uniform.reshape(150, 20)]


def small_fast_counting(seed, count):
    """Words of 64 bits of SFC64, by its definition; the first twelve are not given out."""
    a, b, c = map(int, np.random.SeedSequence(seed).generate_state(3, np.uint64))
    for counter in range(1, 13 + count):
        word = (a + b + counter) % 2**64
        a, b = b ^ b >> 11, (c + (c << 3)) % 2**64
        c = ((c << 24 | c >> 40) + word) % 2**64
        if counter > 12:
            yield word


def test_a_mask_is_of_words_that_are_the_same_on_every_machine():
    mask = random_mask(torch.Size((61, 49)), 0.3, SFC64(123)).flatten().tolist()
    halves = [half for word in small_fast_counting(123, 1495) for half in (word % 2**32, word >> 32)]
    assert mask == [half < round(0.3 * 2**32) for half in halves[: 61 * 49]]
    assert random_mask(torch.Size((60, 50)), 1.0, SFC64(123)).all()
    assert not random_mask(torch.Size((60, 50)), 0.0, SFC64(123)).any()
    assert random_mask(torch.Size(()), 1 - 2**-53, SFC64(123)).item()  # rounded to 1


def test_a_large_mask_is_drawn_in_pieces_without_a_seam(monkeypatch):
    whole = random_mask(torch.Size((40, 50)), 0.5, SFC64(1))
    monkeypatch.setattr("common.core.seeding.PIECE", 6)
    assert torch.equal(random_mask(torch.Size((40, 50)), 0.5, SFC64(1)), whole)


@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.9, 1.0])
def test_the_nth_largest_of_many_equal_numbers_is_that_of_the_sorted(zeros):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3000, generator=generator).abs() * (torch.rand(3000, generator=generator) >= zeros)
    for count in (1, 30, 299, 300, 301, 2000, 3000):
        assert largest(x.clone(), count) == x.sort(descending=True).values[count - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_reaches_the_threshold_is_kept(dtype):
    """As the comparison has it, to the last bit: at the threshold, just below it, for denormal numbers and for zero."""
    tau = torch.tensor([0.0, -0.0, 1e-45, -0.1, 0.1, 0.3, -0.3, 7.0], dtype=dtype)
    tau = torch.cat([tau, torch.nextafter(tau, torch.zeros_like(tau)), torch.nextafter(tau, 9 * torch.ones_like(tau))])
    for threshold in map(float, tau.abs()):
        kept = trim(tau, 0.5, threshold)
        assert torch.equal(kept, tau.where(tau.abs() >= threshold, 0)) and kept is not tau
    assert torch.equal(trim(tau, 1.0), tau)


def test_dares_expectation_is_the_task_vector():
    """4000 draws at p = 1/2: the mean is off by |τ|/63 on average, and six times that nowhere."""
    base, deltas = task_vectors(1, {"w": (4, 5)})
    draws = [merge("dare_ta", base, deltas, {"drop": 0.5, "scale": 1.0, "seed": seed})["w"] for seed in range(4000)]
    mean, tau = torch.stack(draws).double().mean(0), deltas[0]["w"].double()
    assert ((mean - tau).abs() <= 6 / 4000**0.5 * tau.abs()).all()


def test_breadcrumbs_keeps_the_middle():
    base, deltas = task_vectors(3, {"w": (20, 10), "b": (7,)})
    merged = merge("breadcrumbs", base, deltas, {"keep": 0.3, "outliers": 0.05, "scale": 2.0})
    for name, (outliers, kept) in {"w": (10, 60), "b": (0, 2)}.items():
        expected = 0
        for tau in stack64(deltas, name):
            order = np.argsort(-np.abs(tau), axis=None)[outliers : outliers + kept]
            expected = expected + 2 * np.where(np.isin(np.arange(tau.size), order).reshape(tau.shape), tau, 0)
        assert_close(merged[name], expected)


def pcb_by_sorting(taus, ratio, clip):
    def unit(x):
        return (x - x.min()) / (x.max() - x.min())

    flat = taus.reshape(len(taus), -1)
    total, above, below = flat.sum(0), 0, 0
    for tau in flat:
        cut = np.sort(np.abs(tau))[::-1][int(clip * tau.size)]
        clipped = np.sign(tau) * np.minimum(np.abs(tau), cut)
        balance = np.exp(len(flat) * unit(np.abs(clipped)) ** 2) * np.tanh(tau * total)
        weight = unit(np.maximum(balance, np.sort(balance)[::-1][int(ratio * tau.size) - 1]))
        above, below = above + weight * clipped, below + weight
    return np.where(below > 0, above / np.where(below > 0, below, 1), 0).reshape(taus.shape[1:])


@pytest.mark.parametrize(("ratio", "clip"), [(0.2, 0.0), (0.5, 0.1), (1.0, 0.02)])
def test_pcb_is_its_formula(ratio, clip):
    base, deltas = task_vectors(3, {"w": (20, 10), "b": (30,)}, size=1.0)
    hyper = {"ratio": ratio, "clip": clip, "scale": 1.5}
    merged = merge("pcb", base, deltas, hyper | {"granularity": "tensor"})
    for name, tensor in merged.items():
        assert_close(tensor, 1.5 * pcb_by_sorting(stack64(deltas, name), ratio, clip), rtol=2e-4, atol=1e-5)
    flat = 1.5 * pcb_by_sorting(in_one(deltas, base), ratio, clip)
    merged = merge("pcb", base, deltas, hyper)
    assert_close(merged["w"], flat[:200].reshape(20, 10), rtol=2e-4, atol=1e-5)
    assert_close(merged["b"], flat[200:], rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(("agree", "threshold"), [(0, 0.4), (1, 0.4), (2, 0.4), (2, 1.0), (3, 0.2)])
def test_consensus_keeps_what_enough_tasks_use(agree, threshold):
    base, deltas = task_vectors(3)
    for name, tensor in merge("consensus_ta", base, deltas, {"agree": agree, "threshold": threshold}).items():
        taus = stack64(deltas, name)
        total = taus.sum(0)
        masks = [np.abs(tau) >= threshold * np.abs(total - tau) for tau in taus]
        assert_close(tensor, np.where(np.sum(masks, axis=0) >= agree, 0.3 * total, 0))


# --- by singular vectors ---------------------------------------------------------------------------------------------


def root_of_inverse(x):
    values, vectors = np.linalg.eigh(x)
    return vectors @ np.diag(values**-0.5) @ vectors.T


def tsv_by_eigenvectors(taus, k):
    """TSV-M another way: Uᵢ from the eigenvectors of τᵢτᵢᵀ, and X̂ = X (XᵀX)^(-1/2)."""
    u, s, v = [], [], []
    for tau in taus:
        values, vectors = np.linalg.eigh(tau @ tau.T)
        s.append(np.sqrt(values[::-1][:k]))
        u.append(vectors[:, ::-1][:, :k])
        v.append(tau.T @ u[-1] / s[-1])
    hats = [x @ root_of_inverse(x.T @ x) for x in (np.hstack(u), np.hstack(v))]
    return hats[0] @ np.diag(np.hstack(s)) @ hats[1].T


@pytest.mark.parametrize(("fraction", "k"), [(None, 3), (0.1, 1), (0.29, 2)])
def test_tsv_is_its_formula(fraction, k):
    base, deltas = task_vectors(3)
    merged = merge("tsv", base, deltas, {"rank_fraction": fraction, "scale": 2.0})
    for name, tensor in merged.items():
        taus = stack64(deltas, name)
        expected = tsv_by_eigenvectors(taus, k) if name in MATRICES else taus.mean(axis=0)
        assert_close(tensor, 2 * expected, rtol=1e-4)


def test_iso_c_is_the_sums_polar_factor_times_its_mean_singular_value():
    """U Vᵀ = (X Xᵀ)^(-1/2) X, and the singular values add up to the trace of (X Xᵀ)^(1/2)."""
    base, deltas = task_vectors(3)
    merged = merge("iso_c", base, deltas, {"scale": 1.5})
    for name in MATRICES:
        total = stack64(deltas, name).sum(axis=0)
        x = total if total.shape[0] < total.shape[1] else total.T
        polar = root_of_inverse(x @ x.T) @ x * np.sqrt(np.linalg.eigvalsh(x @ x.T)).mean()
        assert_close(merged[name], 1.5 * (polar if x is total else polar.T), rtol=1e-4)
    for name in OTHERS:
        assert_close(merged[name], 1.5 * stack64(deltas, name).mean(axis=0))


@pytest.mark.parametrize(("fraction", "k"), [(0.8, 6), (0.5, 3), (1.0, 9), (0.0, 0)])
def test_iso_cts_is_its_formula(fraction, k):
    """Nine directions, three tasks: k is what is left of them when every task has its own, rounded."""
    base, deltas = task_vectors(3)
    merged = merge("iso_cts", base, deltas, {"common_fraction": fraction})
    for name in MATRICES:
        taus = stack64(deltas, name)
        u, s, vt = (
            x[..., :k] if i < 2 else x[:k] for i, x in enumerate(np.linalg.svd(taus.sum(0), full_matrices=False))
        )
        parts = [(u, s, vt.T)]
        for tau in taus:
            left, own = (np.eye(len(tau)) - u @ u.T) @ tau, (9 - k) // 3
            ui, si, vti = np.linalg.svd(left, full_matrices=False)
            parts.append((ui[:, :own], si[:own], vti[:own].T))
        u, s, v = (np.concatenate(x, axis=-1) for x in zip(*parts, strict=True))
        expected = s.mean() * u @ root_of_inverse(u.T @ u) @ (v @ root_of_inverse(v.T @ v)).T
        assert_close(merged[name], expected, rtol=1e-3, atol=1e-6)
    for name in OTHERS:
        assert_close(merged[name], stack64(deltas, name).mean(axis=0))


def opcm_by_full_bases(taus, alpha, scaled=True):
    """In the full bases of U and V, with the paper's λ of every step; or D_N as it is."""
    merged, scale = taus[0], 1.0
    for t, tau in enumerate(taus[1:], start=2):
        if tau.ndim == 2:
            u, s, vt = np.linalg.svd(merged)
            k = len(s) if alpha == 1 else int((np.cumsum(s) / s.sum() <= alpha).sum())
            inner = u.T @ tau @ vt.T
            inner[np.arange(len(s)), np.arange(len(s))] = 0
            inner[:k, :k] = 0
            tau = u @ inner @ vt
        step = scale * merged + tau
        scale = norm(step) / np.mean([norm(x) for x in taus[:t]]) if scaled else 1.0
        merged = step / scale
    return merged


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_opcm_is_its_recursion(alpha):
    base, deltas = task_vectors(4)
    ours = merge("opcm", base, deltas, {"alpha": alpha, "granularity": "tensor"})
    expected = {name: opcm_by_full_bases(stack64(deltas, name), alpha) for name in SHAPES}
    for name, tensor in ours.items():
        assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
    # of the whole model each tensor has the same direction, and all have one length: that of an expert on average
    lengths = [norm(np.concatenate([delta[name].double().numpy().ravel() for name in SHAPES])) for delta in deltas]
    ours = {name: tensor.double().numpy() for name, tensor in merge("opcm", base, deltas, {"alpha": alpha}).items()}
    assert norm(np.concatenate([x.ravel() for x in ours.values()])) == pytest.approx(np.mean(lengths), rel=1e-5)
    sums = {name: opcm_by_full_bases(stack64(deltas, name), alpha, scaled=False) for name in SHAPES}
    factor = np.mean(lengths) / norm(np.concatenate([x.ravel() for x in sums.values()]))
    for name in SHAPES:
        assert_close(torch.tensor(ours[name]), factor * sums[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 5), (64, 48), (31, 200)], ids=str)
def test_opcm_with_alpha_1_leaves_out_every_direction_of_the_merged_model(shape):
    """P(τ) = τ − U Uᵀ τ V Vᵀ with all of U and V. In whatever order and precision S is added up, 1 is all of it."""
    base, deltas = task_vectors(2, {"w": shape}, seed=sum(shape))
    first, second = stack64(deltas, "w")
    u, _, vt = np.linalg.svd(first, full_matrices=False)
    expected = first + second - u @ (u.T @ second @ vt.T) @ vt
    expected *= (norm(first) + norm(second)) / 2 / norm(expected)
    assert_close(merge("opcm", base, deltas, {"alpha": 1.0})["w"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("share", "rank"), [(0.2, 0), (0.25, 1), (0.5, 2), (0.74, 2), (0.75, 3), (1.0, 4)])
def test_a_partial_sum_equal_to_the_share_but_for_rounding_is_within_it(share, rank):
    """Of four equal singular values, each changed in its last bit or not, a quarter is one and a half is two."""
    for bits in itertools.product([np.float32(0.1), np.nextafter(np.float32(0.1), np.float32(1))], repeat=4):
        assert rank_of_share(torch.tensor(sorted(bits, reverse=True)), share) == rank


def test_opcm_adds_what_is_orthogonal_to_the_merged_model_and_only_that():
    base, deltas = task_vectors(1, {"w": (6, 4)})
    old = torch.zeros(6, 4)
    old[:3, :2] = deltas[0]["w"][:3, :2]
    new = torch.zeros(6, 4)
    new[3:, 2:] = deltas[0]["w"][3:, 2:]
    merged = merge("opcm", base, [{"w": old}, {"w": new}], {})["w"]
    expected = (old + new) * (old.norm() + new.norm()) / 2 / (old + new).norm()
    assert_close(merged, expected)


# --- by the inputs that task vectors stand for -----------------------------------------------------------------------


def interference(m, taus):
    """The WUDI objective, literally."""
    return sum((((m - tau) @ tau.T) ** 2).sum() / (tau**2).sum() for tau in taus)


def wudi_by_autograd(taus, lr, steps):
    """The literal objective under torch.optim.Adam in float64."""
    taus = torch.tensor(taus)
    m = taus.sum(0).requires_grad_()
    adam = torch.optim.Adam([m], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        interference(m, taus).backward()
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


def wudi_by_least_squares(taus):
    """The objective is ‖M Z − Y‖² with Z the τᵢᵀ/‖τᵢ‖ side by side and Y the τᵢτᵢᵀ/‖τᵢ‖; the smallest such M."""
    z = np.hstack([tau.T / norm(tau) for tau in taus])
    y = np.hstack([tau @ tau.T / norm(tau) for tau in taus])
    return np.linalg.lstsq(z.T, y.T, rcond=1e-10)[0].T


@pytest.mark.parametrize("shape", [(6, 4), (5, 12), (3, 30)], ids=str)  # Σ τᵢ of rank 4, 12 and 9 of 30
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wudi_exact_is_the_smallest_least_squares_solution(shape, dtype):
    base, deltas = task_vectors(3, {"w": shape}, dtype=dtype)
    expected = wudi_by_least_squares(stack64(deltas, "w"))
    assert_close(merge("wudi_exact", base, deltas, {})["w"], expected, rtol=1e-5, atol=1e-8)


def test_wudi_goes_to_where_wudi_exact_is():
    base, deltas = task_vectors(3, {"w": (6, 4)}, size=1.0, dtype=torch.float64)
    exact = merge("wudi_exact", base, deltas, {})["w"]
    assert_close(merge("wudi", base, deltas, {"lr": 1e-2, "steps": 3000})["w"], exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 9), (5, 12)], ids=str)
def test_no_number_of_adams_steps_beats_the_exact_minimum(shape):
    base, deltas = task_vectors(3, {"w": shape}, dtype=torch.float64)
    taus = [delta["w"] for delta in deltas]
    exact = interference(merge("wudi_exact", base, deltas, {})["w"], taus)
    few, many = (interference(minimise_interference(taus, lr, n), taus) for lr, n in ((1e-5, 300), (1e-4, 3000)))
    assert exact * (1 - 1e-9) < many < few < interference(sum(taus), taus)
    assert exact < 0.9 * few, "300 steps of 1e-5 end well before the minimum"


def test_wudi_exact_cuts_off_directions_below_rtol():
    """Two orthogonal directions, of shares 1 and 1e-4 of ΣGᵢ: at rtol 1e-3 the smaller one goes to 0."""
    tau = torch.diag(torch.tensor([1.0, 1e-2]))
    assert_close(merge("wudi_exact", {"w": tau}, [{"w": tau}], {})["w"], tau)
    assert_close(merge("wudi_exact", {"w": tau}, [{"w": tau}], {"rtol": 1e-3})["w"], [[1, 0], [0, 0]])


def pieces(taus):
    """Z and Y of the objective ‖M Z − Y‖², and the eigenvalues λ of Z Zᵀ, falling, with their vectors, by an SVD."""
    z = np.hstack([tau.T / norm(tau) for tau in taus])
    y = np.hstack([tau @ tau.T / norm(tau) for tau in taus])
    v, s, _ = np.linalg.svd(z)
    return z, y, np.concatenate([s**2, np.zeros(len(v) - len(s))]), v


EFFECTIVE_RANKS = {
    "energy": lambda s: np.ceil(s.sum() ** 2 / (s**2).sum()),
    "participation": lambda s: np.ceil((s**2).sum() ** 2 / (s**4).sum()),
    "entropy": lambda s: np.ceil(np.exp(-sum(p * np.log(p) for p in s**2 / (s**2).sum()))),
    "gavish_donoho": lambda s: max(1, (s > 2.858 * np.median(s)).sum()),  # of a square matrix, by their table
}


@pytest.mark.parametrize("rank", EFFECTIVE_RANKS)
def test_swudi_a_is_the_minimum_over_its_leading_directions(rank):
    """Over X with M = Σ τᵢ + X V_Kᵀ, by plain least squares; K counted from singular values."""
    base, deltas = task_vectors(3, {"w": (9, 9)}, dtype=torch.float64)
    deltas = [{"w": delta["w"] * torch.logspace(0, -2, 9, dtype=torch.float64)} for delta in deltas]
    taus = stack64(deltas, "w")
    z, y, eigenvalues, v = pieces(taus)
    k = int(EFFECTIVE_RANKS[rank](np.sqrt(eigenvalues)))
    assert 1 <= k < 9
    total, leading = taus.sum(axis=0), v[:, :k]
    x = np.linalg.lstsq((leading.T @ z).T, (y - total @ z).T, rcond=None)[0].T
    assert_close(merge("swudi_a", base, deltas, {"rank": rank})["w"], total + x @ leading.T, rtol=1e-6, atol=1e-10)


def test_swudi_a_of_full_rank_is_wudi_exact():
    base, deltas = task_vectors(3, {"w": (12, 4)}, dtype=torch.float64)
    exact = merge("wudi_exact", base, deltas, {})["w"]
    full = filtered([delta["w"] for delta in deltas], lambda eigenvalues, shape: torch.ones_like(eigenvalues))
    assert_close(full, exact, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 4), (5, 12)], ids=str)
def test_swudi_is_gradient_flow_from_the_sum(shape):
    """Against the matrix exponential: M(t) − M* = (Σ τᵢ − M*) exp(−C t), along a share of the eigenvectors."""
    base, deltas = task_vectors(3, {"w": shape}, dtype=torch.float64)
    taus = stack64(deltas, "w")
    z, _, _, v = pieces(taus)
    total, minimum = taus.sum(axis=0), wudi_by_least_squares(taus)
    flown = minimum + (total - minimum) @ scipy.linalg.expm(-3.0 * z @ z.T)
    merged = merge("swudi", base, deltas, {"time": 3.0, "share": 1.0})["w"]
    assert_close(merged, flown, rtol=1e-5, atol=1e-9)
    half = merge("swudi", base, deltas, {"time": 3.0, "share": 0.5})["w"]
    leading = v[:, : shape[1] // 2]
    assert_close(half, total + (flown - total) @ leading @ leading.T, rtol=1e-5, atol=1e-9)
    assert_close(merge("swudi", base, deltas, {"time": 0.0})["w"], total)


def test_regression_mean_is_the_least_squares_fit_to_all_experts_outputs():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(3, 20, 6)), rng.normal(size=(3, 4, 6))
    outputs = np.vstack([xi @ wi.T for xi, wi in zip(x, w, strict=True)])
    expected = np.linalg.lstsq(np.vstack(x), outputs, rcond=None)[0].T
    grams = [torch.tensor(xi.T @ xi) for xi in x]
    merged = regression_mean([torch.tensor(wi) for wi in w], grams)
    assert_close(merged, expected, rtol=1e-10)
    theta = torch.tensor(rng.normal(size=(4, 6)))
    assert_close(theta + regression_mean([torch.tensor(wi) - theta for wi in w], grams), expected, rtol=1e-10)
    half = scale_off_diagonal(torch.tensor([[2.0, 4.0], [4.0, 6.0]]), alpha=0.5)
    assert half.tolist() == [[2, 2], [2, 6]]


def test_fisher_mean_counts_each_weight_by_its_fisher_information():
    taus = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3.0, 3.0, 3.0])]
    fishers = [torch.tensor([1.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])]
    assert_close(fisher_mean(taus, fishers), [2.0, 1.5, 2.0])


# --- DOGE and WIDEN --------------------------------------------------------------------------------------------------


def doge_by_autograd(taus, eta, subspace, density, steps, lr, floors=None):
    """The literal loss, its gradient by autograd, the projection as a full matrix."""
    taus = torch.tensor(taus)
    scales = [eta / tau.norm() for tau in taus]
    side = min(taus[0].shape)
    lefts = torch.cat([torch.linalg.svd(tau)[0][:, : side // len(taus)] for tau in taus], dim=1)
    basis = torch.linalg.svd(lefts)[0][:, : side // subspace]
    change = torch.zeros_like(taus[0], requires_grad=True)
    adam = torch.optim.Adam([change], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        merged = sum(scale * (tau + change) for scale, tau in zip(scales, taus, strict=True))
        sum((tau * (tau - merged)).sum(1).square().sum() for tau in taus).backward()
        change.grad -= basis @ basis.T @ change.grad
        adam.step()
    assert change.abs().max() > 5 * lr
    if floors is None:
        floors = [tau.abs().flatten().sort(descending=True).values[int(density * tau.numel()) - 1] for tau in taus]
    kept = [s * (t + change) * (t.abs() >= f) for s, t, f in zip(scales, taus, floors, strict=True)]
    return sum(kept).detach().numpy()


@pytest.mark.parametrize("hyper", [{}, {"eta": 0.5, "subspace": 2, "density": 0.6, "steps": 20, "lr": 1e-3}], ids=str)
def test_doge_ta_is_its_formula(hyper):
    base, deltas = task_vectors(3, dtype=torch.float64, size=0.1)
    deltas[0]["fc.weight"] *= 2
    defaults = {"eta": 0.07, "subspace": 6, "density": 0.3, "steps": 400, "lr": 1e-4}
    settings = defaults | hyper
    sizes = np.sort(np.abs(in_one(deltas, MATRICES)), axis=1)[:, ::-1]
    whole = sizes[:, int(settings["density"] * sizes.shape[1] + 1e-9) - 1]
    for granularity, floors in (("tensor", None), ("model", whole)):
        merged = merge("doge_ta", base, deltas, hyper | {"granularity": granularity})
        for name in MATRICES:
            expected = doge_by_autograd(stack64(deltas, name), **settings, floors=floors)
            assert_close(merged[name], expected, rtol=1e-6, atol=1e-9)
    assert not any(merged[name].any() for name in OTHERS)


def test_widens_middle_rank_is_not_above_the_mean_on_any_machine():
    """Of an odd number of columns the middle rank is the mean rank itself: it keeps its softmax score."""
    for columns in range(3, 100, 2):
        ranks = torch.arange(columns, dtype=torch.float32) / columns
        above = ranks > rank_limit(columns, 1.0)
        assert above.tolist() == [False] * (columns // 2 + 1) + [True] * (columns // 2)
    assert (torch.arange(9) / 9 > rank_limit(9, 1.5)).tolist() == [False] * 7 + [True] * 2  # 1.5 times 4 is 6 itself


@pytest.mark.parametrize("size", [3, 7, 10, 48, 97, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_widen_finds_no_weight_above_the_mean_where_all_moved_as_far(size, dtype):
    """Each |τ| is 0.1, as after one step of Adam: every score is a softmax over two experts, 1/2, and δ their mean."""
    signs = [torch.ones(size, dtype=dtype), torch.ones(size, dtype=dtype)]
    signs[1][::3] = -1
    merged = merge("widen", {"b": torch.zeros(size, dtype=dtype)}, [{"b": 0.1 * sign} for sign in signs], {})
    assert_close(merged["b"], (0.05 * (signs[0] + signs[1])).numpy(), rtol=1e-6)


def widen_by_columns(theta, taus, ratio, calibration):
    def importance(x):
        scores = np.exp(x) / np.exp(x).sum(0)
        return np.where(x > ratio * x.mean(axis=1, keepdims=True) * (1 + 1e-12), calibration, scores)

    if theta.ndim != 2:
        flat = np.abs(taus).reshape(len(taus), -1)
        return (importance(flat).reshape(taus.shape) * taus).sum(0)
    columns = theta.shape[1]
    lengths, turns = np.zeros((2, len(taus), columns))
    for i, tau in enumerate(taus):
        for d in range(columns):
            w, w0 = (theta + tau)[:, d], theta[:, d]
            lengths[i, d] = abs(norm(w) - norm(w0))
            turns[i, d] = 1 - w @ w0 / norm(w) / norm(w0)
    scores = sum(importance(np.argsort(np.argsort(x, axis=1), axis=1) / columns) for x in (lengths, turns)) / 2
    return (scores[:, None] * taus).sum(0)


@pytest.mark.parametrize("hyper", [{}, {"ratio": 1.5, "calibration": 0.7}], ids=str)
def test_widen_is_its_formula(hyper):
    _, (base, *deltas) = task_vectors(4, size=0.5, dtype=torch.float64)
    for name, tensor in merge("widen", base, deltas, hyper).items():
        settings = {"ratio": 1.0, "calibration": 1.0} | hyper
        assert_close(tensor, widen_by_columns(base[name].numpy(), stack64(deltas, name), **settings), rtol=1e-9)


# --- what single methods promise -------------------------------------------------------------------------------------


def test_tsv_makes_the_tasks_directions_orthonormal():
    """δ = Û diag(S) V̂ᵀ with orthonormal Û, V̂ has exactly the kept singular values of all tasks as its own."""
    base, deltas = task_vectors(3)
    merged = merge("tsv", base, deltas, {})
    for name in MATRICES:
        kept = np.sort(np.linalg.svd(stack64(deltas, name), compute_uv=False)[:, :3].ravel())[::-1]
        assert_close(torch.linalg.svdvals(merged[name]), kept, rtol=1e-5)


@pytest.mark.parametrize("shape", [(512, 512), (256, 1024)], ids=str)
def test_directions_that_a_task_vector_has_are_kept_and_rounding_is_not(shape):
    """Singular values down to 1/30000 of the largest are its own; those of a rank-8 product behind eight are not."""
    g = torch.Generator().manual_seed(0)
    side = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, side, generator=g, dtype=torch.float64))[0] for n in shape)
    s = torch.logspace(0, math.log10(1 / 30000), side, dtype=torch.float64)
    x = (u * s) @ v.mT
    assert truncated_svd(x.float(), side)[1].numpy() == pytest.approx(s.numpy(), rel=1e-3)
    delta = merge("iso_c", {"w": torch.zeros(shape)}, [{"w": x.float()}], {})["w"]
    error = (delta.double() - s.mean() * u @ v.mT).norm() / (s.mean() * side**0.5)
    assert error < 5e-3
    b, a, c, d = (torch.randn(n, 8, generator=g) for n in (*shape, *shape))
    theta = 0.02 * torch.randn(shape, generator=g)
    low = b @ a.mT
    for matrix, rank in ((low, 8), (low + c @ d.mT, 16), ((theta + 1e-3 * low) - theta, 8), (low / 3 + low / 7, 8)):
        assert truncated_svd(matrix, side)[1].shape == (rank,)


def test_the_nearest_isometry_is_orthonormal_and_keeps_such_columns():
    x = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hat = nearest_isometry(x)
    assert_close(hat.T @ hat, np.eye(7), atol=1e-12)
    assert_close(nearest_isometry(hat), hat, atol=1e-12)
    assert torch.linalg.eigvalsh(x.T @ hat).min() > 0  # XᵀX̂ = (XᵀX)^(1/2): no other isometry is nearer


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (2, 8)])
def test_tsv_averages_matrices_smaller_than_the_number_of_tasks(shape):
    base, deltas = task_vectors(3, {"w": shape})
    assert_close(merge("tsv", base, deltas, {})["w"], stack64(deltas, "w").mean(axis=0))


def test_tsv_keeps_one_component_of_a_matrix_as_small_as_the_task_count():
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


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_iso_leaves_an_isotropic_expert_and_makes_every_delta_isotropic(method):
    base, deltas = task_vectors(3, {"w": (6, 4)})
    isometry = 0.1 * nearest_isometry(deltas[0]["w"])
    assert_close(merge(method, base, [{"w": isometry}], {})["w"], isometry)
    values = torch.linalg.svdvals(merge(method, base, deltas, {})["w"])
    assert_close(values, np.full(4, values.mean()), rtol=1e-5)


def test_iso_c_of_low_rank_experts_keeps_directions_and_nuclear_norm():
    tau = torch.zeros(6, 8)
    tau[0, :3], tau[1, 4] = 0.5, -2.0
    merged = merge("iso_c", {"w": tau}, [{"w": tau}], {})["w"]
    assert torch.linalg.matrix_rank(merged) == 2 and merged[2:].abs().max() < 1e-6
    assert_close(torch.linalg.svdvals(merged).sum(), torch.linalg.svdvals(tau).sum())


@pytest.mark.parametrize("seed", range(8))
def test_iso_cts_of_low_rank_experts_makes_no_direction_of_rounding(seed):
    """Three times one expert of rank 2 lies wholly in the common directions: δ is (s₁ + s₂)/2 U Vᵀ, 3 for the sum."""
    base, (tau,) = task_vectors(1, {"w": (12, 9)}, seed=seed)
    u, s, vt = np.linalg.svd(tau["w"].double().numpy(), full_matrices=False)
    low = (u[:, :2] * s[:2]) @ vt[:2]
    merged = merge("iso_cts", base, [{"w": torch.tensor(low).float()}] * 3, {})["w"]
    assert_close(merged, 3 * s[:2].mean() * u[:, :2] @ vt[:2], rtol=1e-4, atol=1e-6)


def test_pcb_counts_weights_as_equal_that_differ_by_rounding():
    """Two tasks of one weight each, equal but for the last bit: with the least ratio both weigh 1, as equal ones do."""
    a, b = 0.5, float(np.nextafter(np.float32(0.5), np.float32(1)))
    tau = torch.tensor([a, b, *[0.01] * 18])
    merged = merge("pcb", {"w": torch.zeros(20)}, [{"w": tau}], {"ratio": 0.05, "clip": 0.0, "scale": 1.0})["w"]
    assert merged.tolist() == [a, b, *[0.0] * 18]


def test_iso_cts_of_one_task_is_iso_c():
    base, deltas = task_vectors(1)
    common, isotropic = merge("iso_cts", base, deltas, {}), merge("iso_c", base, deltas, {})
    for name in SHAPES:
        assert_close(common[name], isotropic[name], atol=1e-6)


def test_wudi_moves_matrices_only_and_takes_no_step_when_told_none():
    base, deltas = task_vectors(3)
    merged = merge("wudi", base, deltas, {"steps": 0, "scale": 0.5})
    for name in SHAPES:
        start = stack64(deltas, name).sum(axis=0) if name in MATRICES else np.zeros(SHAPES[name])
        assert_close(merged[name], 0.5 * start)


@pytest.mark.parametrize("method", [name for name in METHODS if "others" in hyperparameters(name)])
@pytest.mark.parametrize(("others", "factor"), [(None, 1 / 3), (0.0, 0.0), (1, 1.0), (0.3, 0.3)])
def test_what_is_no_matrix_is_scaled_as_asked(method, others, factor):
    base, deltas = task_vectors(3)
    merged = merge(method, base, deltas, {"others": others})
    for name in OTHERS:
        assert_close(merged[name], factor * stack64(deltas, name).sum(axis=0))


# --- order statistics of a whole model -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_nth_largest_number_of_many_tensors_is_found_exactly(dtype, monkeypatch):
    monkeypatch.setattr("common.merging.whole.PIECE", 64)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in ((300,), (20, 7), ())]
    tensors.append(torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3.0, 3.0, 3.0, -3e38, 3e38], dtype=dtype))
    every = np.sort(np.concatenate([x.numpy().ravel() for x in tensors]))[::-1]
    for n in (1, 2, 4, 5, 225, 226, 227, len(every) - 1, len(every)):
        found = nth_largest(lambda: itertools.product([0, 1], tensors), lambda count, n=n: min(n, count))
        assert found == {0: every[n - 1], 1: every[n - 1]}
    assert nth_largest(lambda: [(0, tensors[0])], lambda count: 0) == {0: np.inf} and nth_largest(list, len) == {}


@pytest.mark.parametrize("method", ["wudi", "optmerge"])
def test_rows_descend_by_themselves(method, monkeypatch):
    """A part of the rows at a time comes to what all at once do."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(50, 8, generator=generator)}
    deltas = [{"w": 0.1 * torch.randn(50, 8, generator=generator)} for _ in range(3)]
    whole = merge(method, base, deltas, {"steps": 40, "lr": 1e-3})["w"]
    monkeypatch.setattr("common.merging.wudi.AT_ONCE", 7 * 8 + 1)
    torch.testing.assert_close(merge(method, base, deltas, {"steps": 40, "lr": 1e-3})["w"], whole, rtol=0, atol=1e-6)
    assert (whole - sum(delta["w"] for delta in deltas)).abs().max() > 1e-3
