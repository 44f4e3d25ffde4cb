"""The analyses: each formula against what is known of it, each command once on pico models."""

import json
import math
import runpy
import shutil
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from common.analysis import landscape, projection
from common.analysis.bias import representation_bias
from common.analysis.blend import by_block, through_all
from common.analysis.finetuning import update_vectors
from common.analysis.interference import asked_step, interference
from common.analysis.landscape import plane
from common.analysis.material import plain, spread
from common.analysis.projection import Cone, attention_and_mlp
from common.analysis.registry import ANALYSES
from common.analysis.residual import rank_correlation, residual
from common.analysis.run import analyse
from common.analysis.spectrum import relative_spectrum
from common.analysis.subspace import similarity, top_subspace
from common.analysis.tsne import mixing
from common.config import ROOT
from common.core.errors import InputError
from common.core.seeding import seeded
from common.core.task_vectors import inner
from common.fda.matching import MatchingProblem
from common.io.checkpoints import Checkpoint
from common.io.examples import Sample
from common.merging.calibration import LabelledTask
from common.opening import open_experiment
from common.pipeline import adapt, construct
from helpers import change, command, linear
from NLG import domain as nlg
from NLU import domain as nlu
from pico_vision import PICO_TASKS, pico_config
from Vision import domain

pytestmark = pytest.mark.usefixtures("no_figures")


MATRICES = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed, "test"))


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_gaussian_anchors_have_the_spectrum_of_random_matrices():
    """Marchenko and Pastur: (√R − √D) / (√R + √D) at the end, 0.342 of the paper's 3200 x 768; scale is no matter."""
    spectrum = relative_spectrum(0.01 * normal(3200, 768))
    assert spectrum[0] == 1 and (spectrum.diff() <= 0).all()
    edge = (math.sqrt(3200) - math.sqrt(768)) / (math.sqrt(3200) + math.sqrt(768))
    assert edge == pytest.approx(0.342, abs=1e-3) and spectrum[-1].item() == pytest.approx(edge, abs=0.01)


def test_spectrum_is_that_of_the_singular_values():
    x_RD = normal(40, 6) * torch.tensor([1, 1e-1, 1e-2, 1e-3, 1e-5, 0])
    exact = torch.linalg.svdvals(x_RD.double())
    torch.testing.assert_close(relative_spectrum(x_RD), exact / exact[0], rtol=1e-5, atol=1e-8)
    assert relative_spectrum(torch.zeros(5, 3)).tolist() == [0, 0, 0]


def test_similarity_of_random_subspaces_is_their_share_of_the_width():
    drawn = [top_subspace(normal(200, 50, seed=seed)) for seed in range(40)]
    similarities = [similarity(u, v) for u, v in zip(drawn[::2], drawn[1::2], strict=True)]
    assert sum(similarities) / 20 == pytest.approx(0.2, abs=0.02)


def test_similarity_is_that_of_projections():
    """tr(P P̂) / k of the projections by an SVD; 1 of a subspace with itself, 0 of orthogonal ones."""
    x, y = normal(30, 10), normal(25, 10, seed=1)
    vectors = [torch.linalg.svd(z.double()).Vh[:2] for z in (x, y)]
    trace = torch.trace(vectors[0].mT @ vectors[0] @ vectors[1].mT @ vectors[1])
    u, v = top_subspace(x), top_subspace(3 * y)
    assert u.shape == (10, 2)
    assert similarity(u, v) == pytest.approx(trace.item() / 2)
    assert similarity(u, u) == pytest.approx(1)
    first, last = torch.eye(10)[:2], torch.eye(10)[8:]
    assert similarity(top_subspace(first), top_subspace(last)) == pytest.approx(0)
    with pytest.raises(InputError, match="1 tokens have no 2 right singular vectors"):
        top_subspace(x[:1])


def test_bias_is_a_mean_of_means():
    """Inputs count alike, however many tokens they have."""
    ours, expert = [torch.zeros(1, 2), torch.zeros(1, 5, 2)], [torch.tensor([[1.0, -3.0]]), torch.full((1, 5, 2), 4.0)]
    assert representation_bias(ours, expert) == pytest.approx((2 + 4) / 2)
    assert representation_bias(expert, expert) == 0


def test_perfect_anchors_ask_for_the_task_vector():
    """A linear map and squared distance: g = −ΔW X Xᵀ, so X Xᵀ ∝ I asks for ΔW; then a task moves itself by 1."""
    tau, theta_0 = {"weight": normal(5, 4)}, {"weight": normal(5, 4, seed=1)}
    theta_t = {"weight": theta_0["weight"] + tau["weight"]}
    x_ATD = 7 * torch.linalg.qr(normal(4, 4, seed=2)).Q[:, None]
    problem = MatchingProblem(linear, theta_0, theta_t, tau)
    step = asked_step(problem, x_ATD, distance="mse")
    torch.testing.assert_close(step["weight"], tau["weight"])
    assert interference(linear, theta_0, step, theta_t, normal(3, 2, 4)) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(asked_step(problem, x_ATD, distance="mse", chunk=2), step)


def test_anchors_leave_orthogonal_inputs_alone():
    theta_0 = {"weight": normal(5, 4)}
    theta_i, theta_j = ({"weight": normal(5, 4, seed=s)} for s in (1, 2))
    tau = {"weight": theta_i["weight"] - theta_0["weight"]}
    x_i, x_j = torch.zeros(3, 1, 4), torch.zeros(2, 1, 4)
    x_i[..., :2], x_j[..., 2:] = normal(3, 1, 2), normal(2, 1, 2)
    step = asked_step(MatchingProblem(linear, theta_0, theta_i, tau), x_i, distance="mse")
    assert step["weight"].norm().item() == pytest.approx(tau["weight"].norm().item(), rel=1e-5)
    assert interference(linear, theta_0, step, theta_j, x_j) == 0
    assert interference(linear, theta_0, step, theta_j, x_i) > 0
    assert interference(linear, theta_0, step, theta_0, x_i) is None


def test_residual_is_zero_at_the_expert_and_one_at_the_base():
    """What lies across all rows of the task vector changes nothing; between base and expert it falls in proportion."""
    tau = torch.cat([normal(5, 3), torch.zeros(5, 2)], 1).double()
    across = torch.cat([torch.zeros(5, 3), normal(5, 2, seed=1)], 1).double()
    assert residual(tau, tau) == 0 and residual(0 * tau, tau) == 1 and residual(tau, 0 * tau) is None
    assert residual(0.25 * tau + across, tau) == pytest.approx(0.75, rel=1e-6)
    delta, wide = normal(5, 5, seed=2).double(), tau.numpy()
    literal = np.linalg.norm((delta.numpy() - wide) @ wide.T) / np.linalg.norm(wide @ wide.T)
    assert residual(delta, tau) == pytest.approx(literal, rel=1e-6)


def test_ranks_are_compared_where_there_are_some():
    assert rank_correlation([(0.1, 9.0), (0.2, 5.0), (3.0, 4.0)]) == pytest.approx(-1)
    assert rank_correlation([(0.1, 9.0), (0.2, 5.0)]) is None and rank_correlation([(1, 2.0), (1, 3), (1, 4)]) is None


def test_mixing_tells_what_lies_apart():
    anchors, real = normal(300, 6), normal(300, 6, seed=1)
    assert mixing(anchors, real) == pytest.approx(300 / 599, abs=0.03)
    assert mixing(anchors, real + 100) == 0
    assert mixing(anchors, torch.cat([anchors + 1e-9] * 10)) > 0.8


def test_the_plane_holds_both_displacements():
    """Orthonormal, and both displacements are what their coordinates say, to rounding."""
    first, second = ({"a": normal(3, 2, seed=s), "b": normal(4, seed=s + 9)} for s in (1, 2))
    e_1, e_2 = plane(first, second)
    assert inner(e_1, e_1) == pytest.approx(1) and inner(e_2, e_2) == pytest.approx(1)
    assert inner(e_1, e_2) == pytest.approx(0, abs=1e-6) and inner(first, e_1) == pytest.approx(
        inner(first, first) ** 0.5
    )
    for delta in (first, second):
        rebuilt = {n: inner(delta, e_1) * e_1[n] + inner(delta, e_2) * e_2[n] for n in delta}
        torch.testing.assert_close(rebuilt, delta)
    with pytest.raises(InputError, match="lie on one line"):
        plane(first, {name: 3 * p for name, p in first.items()})


def test_a_vector_in_the_cone_is_its_own_projection():
    updates = normal(5, 40)
    inside = torch.tensor([0.5, 0, 2, 0, 1]) @ updates
    assert Cone(updates).ratio(inside) == pytest.approx(1, abs=1e-5)
    assert Cone(updates[:1]).ratio(-3 * updates[0]) == 0
    orthogonal = torch.linalg.qr(normal(40, 3)).Q.T
    assert Cone(orthogonal[:2]).ratio(3 * orthogonal[0] - 4 * orthogonal[1]) == pytest.approx(3 / 5, abs=1e-5)
    assert Cone(orthogonal[:2]).ratio(orthogonal[2]) == pytest.approx(0, abs=1e-5)
    assert Cone(updates).ratio(torch.zeros(40)) == 0


@pytest.mark.parametrize("count", [6, 60])
def test_projection_is_that_of_scipy_on_the_vectors_themselves(count):
    """Also of more updates than weights, and of updates that are not independent."""
    updates, target = normal(count, 30), normal(30, seed=1)
    updates[-1] = updates[0] + updates[1]
    alpha, _ = nnls(updates.double().numpy().T, target.double().numpy())
    expected = np.linalg.norm(updates.double().numpy().T @ alpha) / target.double().norm().item()
    assert 0.1 < expected <= 1 and Cone(updates).ratio(target) == pytest.approx(expected, rel=1e-4)


def test_updates_add_up_to_the_way_gone():
    """The first of AdamW at rate η moves a weight w by −η (sign of the gradient + decay · w), whatever the gradient."""
    theta = {"w": torch.tensor([2.0, -1.0]), "v": torch.tensor([1.0])}
    x = torch.tensor([3.0, -5.0])
    task = LabelledTask(lambda theta, batch: theta["w"] @ batch["x"] + theta["v"].sum(), lambda numbers: {"x": x}, 4)
    first, second = update_vectors(task, theta, [["w"], ["w", "v"]], updates=3, batch=2, lr=0.1, seed=0, label="x")
    torch.testing.assert_close(first[0], torch.tensor([-0.1 * (1 + 0.1 * 2), -0.1 * (-1 - 0.1)]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(second[:, :2], first, rtol=0, atol=0)
    assert first.shape == (3, 2) and second.shape == (3, 3) and theta["w"].tolist() == [2, -1]


def test_attention_is_found_without_a_name(pico_config, nlu_config):
    for config, of, attention, mlp in [
        (pico_config, domain, {"attn"}, {"mlp"}), (nlu_config, nlu, {"attention"}, {"intermediate", "output"})
    ]:  # fmt: skip
        experiment = open_experiment(config, of)
        module = experiment.family.modules(of.skeleton(config.model))[1]
        theta, x_ATD = experiment.read_block(experiment.base, 1), normal(2, *experiment.shape[1:])
        parts = attention_and_mlp(experiment.family, module, theta, x_ATD)
        assert {name.split(".")[0] for name in parts["attention"]} == attention
        assert {name.split(".")[0] for name in parts["MLP"]} == mlp
        assert set(parts["attention"]) | set(parts["MLP"]) <= set(theta)
        with pytest.raises(InputError, match="finds no attention and MLP in"):
            attention_and_mlp(experiment.family, module, theta, x_ATD[:, :1])


def test_blocks_stand_for_all_as_in_the_paper():
    assert spread(12, (0.25, 0.5, 1)) == [2, 5, 11] and spread(4, (0.25, 0.5, 1)) == [0, 1, 3]
    assert spread(1, (0.25, 0.5, 1)) == [0] and spread(3, ()) == [0, 1, 2]


def test_numbers_are_written_to_six_digits():
    assert plain({1: torch.tensor([1 / 3, 2.0]), "a": (1, True, None, "x")}) == {
        "1": [0.333333, 2.0],
        "a": [1, True, None, "x"],
    }


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_once(pico_inputs, tmp_path_factory):
    """A run with anchors of both initialisations, snapshots and adapted models, and data with a training set."""
    root = tmp_path_factory.mktemp("analysis")
    shutil.copytree(pico_inputs / "data", root / "data")
    for file in root.glob("data/*/*test*"):
        shutil.copy(file, file.with_name(file.name.replace("test", "train")))
    config = change(pico_config(pico_inputs, root), "eval", data=str(root / "data"))
    config = change(change(config, "anchors", snapshots=[0, 2, 5]), "run", score=False)
    config = change(config, "compare", starts=["pretrained", "ta"])
    for init in ("gauss", "weight"):
        of_init = change(config, "anchors", init=init)
        construct(of_init, domain)
        for start in ("pretrained", "ta"):
            adapt(of_init.at_start(start), domain)
    return config


@pytest.fixture
def made(made_once, tmp_path):
    """A copy of that run, which a test may change."""
    config = change(made_once, "run", root=str(tmp_path))
    shutil.copytree(made_once.run.dir, config.run.dir)
    return config


def analysed(name, config):
    """The numbers of an analysis by its command; a second time they are the same bytes."""
    file = config.run.dir / "analysis" / f"{name}.json"
    with patch("common.command.parse", lambda *_: config), patch("sys.argv", ["scripts/analyse.py", name]):
        runpy.run_path(str(ROOT / "scripts/analyse.py"), run_name="__main__")
    first = file.read_bytes()
    analyse(name, config, {"vision": domain, "nlu": nlu}[config.domain])
    assert file.read_bytes() == first and (file.with_suffix(".png")).stat().st_size > 3000
    numbers = json.loads(first)
    assert numbers["analysis"] == name and numbers["seed"] == 0 and len(numbers["config"]) == 16 and numbers["commit"]
    return numbers


def test_spectra_along_the_snapshots(made):
    numbers = analysed("spectrum", made)
    titles = ["MNIST, Weight", "SVHN, Weight", "MNIST, Gauss", "SVHN, Gauss"]
    assert [panel["title"] for panel in numbers["panels"]] == titles and numbers["k"] == list(range(1, 17))
    assert all(list(panel["curves"]) == ["0", "2", "5"] for panel in numbers["panels"])
    without = change(change(made, "anchors", snapshots=[]), "run", blocks=[0, 1])
    for file in made.run.dir.rglob("snapshots_*"):
        file.unlink()
    again = analysed("spectrum", without)
    assert len(again["panels"]) == 8 and again["panels"][2]["title"] == "MNIST, Weight, block 1"
    before, after = again["panels"][2]["curves"].values()
    assert before == numbers["panels"][0]["curves"]["0"] and before != after


def test_subspaces_along_the_snapshots(made):
    numbers = analysed("subspace", made)
    for panel in numbers["panels"]:
        assert list(panel["curves"]) == ["weight", "gauss"] and numbers["random"] == pytest.approx(3 / 16)
        assert all(0 <= value <= 1 for curve in panel["curves"].values() for value in curve.values())


def test_bias_before_and_after(made):
    numbers = analysed("bias", made)
    assert [panel["title"] for panel in numbers["panels"]] == ["from Pretrained", "from TA"]
    for panel in numbers["panels"]:
        assert len(panel["before"]) == 2 and min(panel["before"]) > 0 and list(panel["after"]) == ["weight", "gauss"]
    shutil.rmtree(made.run.dir / "merged" / "fda-ta-gauss")
    with pytest.raises(InputError, match=r"no adapted model at .*fda-ta-gauss; adapt.py with the same config makes it"):
        analyse("bias", made, domain)


def test_a_blend_is_measured_on_the_anchors_and_held_out(made):
    numbers = analysed("blend", made)
    assert numbers["blends"][0] == 0 and numbers["blends"][-1] == 1 and len(numbers["panels"]) == 4
    for panel in numbers["panels"]:
        assert panel["by block"][-1] < panel["by block"][0] and panel["cut"] == {}  # which adaptation minimised
    made.run.dir.joinpath("search.json").write_text(
        json.dumps(
            {
                "candidates": [
                    {"method": "fda", "start": "ta", "init": "gauss", "fields": {"blend": 0.5}, "avg": 0.25},
                    {"method": "fda", "start": "ta", "init": "gauss", "fields": {"blend": 0.5, "lr": 1}, "avg": 1.0},
                    {"method": "ta", "hyper": {"scale": 0.5}, "avg": 1.0},
                ]
            }
        )
    )
    cuts = {panel["title"]: panel["cut"] for panel in analysed("blend", made)["panels"]}
    assert cuts.pop("from TA, Gauss") == {"0.5": 0.25} and not any(cuts.values())


def test_distances_of_linear_blocks_by_hand():
    """Blocks y = w x: one by one ‖(w − w_t) x‖² / ‖w_t x‖²; in a row with the products of the w."""

    def block(theta, x):
        return theta["w"] * x

    thetas, experts = [{"w": torch.tensor(w)} for w in (1.0, 3.0)], [{"w": torch.tensor(w)} for w in (2.0, 2.0)]
    x = torch.ones(4, 3, 2)
    assert by_block([block] * 2, thetas, experts, [x, 5 * x]) == pytest.approx((0.25 + 0.25) / 2)
    assert through_all([block] * 2, thetas, experts, x) == pytest.approx((3 - 4) ** 2 / 16)
    assert through_all([block] * 2, experts, experts, x) == 0


def test_interference_of_each_pair(made):
    numbers = analysed("interference", made)
    assert numbers["tasks"] == PICO_TASKS
    assert [panel["title"] for panel in numbers["panels"]] == ["Weight, block 1", "Gauss, block 1"]
    assert all(value > 0 for panel in numbers["panels"] for row in panel["matrix"] for value in row)


def test_residual_of_merges_and_of_what_was_adapted_from_them(made):
    """TA of two tasks with 0.3 of each: its length, and r of one matrix, by their formulas."""
    numbers = analysed("residual", made)
    models, panels = numbers["models"], [panel["of"] for panel in numbers["panels"]]
    adapted = [f"FDA ({start}, {init})" for start in ("Pretrained", "TA") for init in ("Weight", "Gauss")]
    assert list(models) == ["Pretrained", "TA", *adapted] and panels == ["length"]
    assert models["Pretrained"]["mean"] == 1 and models["Pretrained"]["length"] == 0
    assert [name for name, model in models.items() if model["adapted"]] == adapted
    names = [f"visual.transformer.resblocks.{i}.{layer}" for i in (0, 1) for layer in MATRICES]
    assert numbers["matrices"] == len(names)
    theta_0 = Checkpoint(made.model.path("base")).read(names)
    experts = [Checkpoint(made.model.path("expert", task)).read(names) for task in PICO_TASKS]
    a, b = ({name: (theta[name] - theta_0[name]).double() for name in names} for theta in experts)
    lengths = [math.sqrt(sum(float(tau[n].square().sum()) for n in names)) for tau in (a, b)]
    together = math.sqrt(sum(float((0.3 * (a[n] + b[n])).square().sum()) for n in names))
    assert models["TA"]["length"] == pytest.approx(together / (sum(lengths) / 2), rel=1e-4)
    each = [((0.3 * (a[n] + b[n]) - a[n]) @ a[n].mT).norm() / (a[n] @ a[n].mT).norm() for n in names]
    assert models["TA"]["residual"][PICO_TASKS[0]] == pytest.approx(float(sum(each)) / len(each), rel=1e-4)


def test_residual_beside_the_score(made):
    """A model that is not there, or not scored, is left out."""
    shutil.rmtree(made.run.dir / "merged" / "fda-ta-gauss")
    scores = {"pretrained": 0.2, "ta": 0.6}
    rows = [{"method": m, "task": t, "value": v, "n": 5} for m, v in scores.items() for t in PICO_TASKS]
    made.run.dir.joinpath("results.json").write_text(json.dumps({"tasks": PICO_TASKS, "rows": rows}))
    numbers = analysed("residual", made)
    assert "FDA (TA, Weight)" in numbers["models"] and "FDA (TA, Gauss)" not in numbers["models"]
    assert {n: m["avg"] for n, m in numbers["models"].items() if m["avg"]} == {"Pretrained": 0.2, "TA": 0.6}
    assert [panel["of"] for panel in numbers["panels"]] == ["length", "avg"] and numbers["rank_correlation"] is None
    with pytest.raises(InputError, match="looks at the merges of compare.starts, which names none"):
        analyse("residual", change(made, "compare", starts=[]), domain)


def test_matching_of_each_block(made):
    numbers = analysed("matching", made)
    assert [panel["title"] for panel in numbers["panels"]][:2] == ["Weight, block 0", "Weight, block 1"]
    panel = numbers["panels"][0]
    assert all(len(trace) == 6 for trace in panel["traces"].values())
    assert panel["mean"][0] == pytest.approx(sum(trace[0] for trace in panel["traces"].values()) / 2, rel=1e-5)


def test_tsne_of_each_task(made):
    numbers = analysed("tsne", change(made, "compare", inits=["gauss"]))
    assert [panel["title"] for panel in numbers["panels"]] == PICO_TASKS
    groups = {group: len(points) for group, points in numbers["panels"][0]["points"].items()}
    assert groups == {"real": 100, "anchors at first": 20, "anchors at last": 20}


def test_landscape_of_the_paths(made):
    """The adaptation, repeated, ends where the adapted model is, and begins at the pretrained one."""
    numbers = analysed("landscape", change(made, "anchors", init="gauss"))
    (panel,) = numbers["panels"]
    assert panel["title"] == "FDA from Pretrained, Gauss" and list(panel["models"]) == ["Pretrained", "TA", "FDA"]
    path, models = panel["adaptation"], panel["models"]
    assert path[0] == models["Pretrained"]["at"] == [0, 0] and len(path) == len(panel["inside"]) == 3
    assert path[-1] == pytest.approx(models["FDA"]["at"], rel=1e-4) and panel["inside"][-1] == pytest.approx(
        1, rel=1e-3
    )
    assert models["TA"]["at"][0] > 0 and models["TA"]["at"][1] == pytest.approx(0, abs=1e-5)
    assert len(panel["losses"]) == len(panel["grid"][1]) == landscape.POINTS
    labelled = [domain.labelled_task(made, task, Sample("test", 48, 24, 0), torch.device("cpu")) for task in PICO_TASKS]
    theta_0 = Checkpoint(made.model.path("base"))
    theta_0 = theta_0.read(theta_0.names("visual."))
    losses = [task.loss(theta_0, task.batch(range(20))).item() for task in labelled]
    assert models["Pretrained"]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    with pytest.raises(InputError, match="adapt.blend is 0.5"):
        analyse("landscape", change(made, "adapt", blend=0.5), domain)


def test_landscape_from_a_merge(made):
    (panel,) = analysed("landscape", made.at_start("ta"))["panels"]
    assert panel["adaptation"][0][0] > 0 and panel["adaptation"][-1] == pytest.approx(
        panel["models"]["FDA"]["at"], rel=1e-3
    )


def test_projection_of_each_part(made, monkeypatch):
    monkeypatch.setattr(projection, "UPDATES", 12)
    numbers = analysed("projection", change(made, "compare", inits=["gauss"]))
    titles = [panel["title"] for panel in numbers["panels"]]
    assert titles == [f"{task} from {start}" for start in ("Pretrained", "TA") for task in PICO_TASKS]
    for panel in numbers["panels"]:
        for part in ("attention", "MLP", "mean"):
            curve = panel["curves"][part]["gauss"]
            assert list(curve) == ["0", "2", "5"] and all(0 <= ratio <= 1 for ratio in curve.values())
        attention, mlp, mean = (panel["reference"][part] for part in ("attention", "MLP", "mean"))
        assert mean == pytest.approx((attention + mlp) / 2, rel=1e-4) and 0 < mean <= 1


def test_projection_by_two_processes_has_the_same_bytes(made, monkeypatch):
    monkeypatch.setattr(projection, "UPDATES", 3)
    made = change(made, "compare", inits=["gauss"])
    alone = analyse("projection", made, domain)
    both = analyse("projection", change(made, "run", workers=2), domain)
    assert alone == both and len(alone["panels"]) == 4
    assert not (made.run.dir / "analysis/projection").exists()


def test_texts_can_be_analysed_as_well(nlu_config, monkeypatch):
    """Of three lengths, so that a batch of several would be padded; one task is a regression."""
    monkeypatch.setattr(projection, "UPDATES", 6)
    config = change(change(nlu_config, "compare", inits=["gauss"], starts=["ta"]), "anchors", init="gauss")
    config = change(config, "run", score=False).at_start("ta")
    construct(config, nlu)
    adapt(config, nlu)
    for name in ("subspace", "bias", "landscape", "projection"):
        assert analysed(name, config)["panels"]


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, row in ANALYSES.items() if row.needs])
def test_a_domain_without_inputs_refuses_by_name(nlg_config, name):
    with pytest.raises(InputError, match=f"analyse.py {name} needs data of the tasks; nlg has none for it"):
        analyse(name, nlg_config, nlg)
    assert not nlg_config.run.dir.exists()


def test_missing_anchors_are_named(pico_config):
    config = change(pico_config, "compare", inits=["gauss"])
    with pytest.raises(InputError, match=r"no anchors at .*gauss/MNIST/block_01.safetensors; construct_fda.py"):
        analyse("spectrum", config, domain)
    with pytest.raises(InputError, match="compare.inits, which names none"):
        analyse("spectrum", change(config, "compare", inits=[]), domain)


def test_a_dry_run_says_what_the_analysis_lacks(pico_config):
    command_file = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/analyse.py")))
    refusals = command_file.plan(["tsne"], change(pico_config, "compare", inits=["gauss"]), domain).refusals
    assert len(refusals) == 1 and "there are no anchors at" in refusals[0] and "gauss/MNIST" in refusals[0]


def test_all_analyses_are_made_or_none_begins(made, monkeypatch):
    begun = []
    ran = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/analyse.py")))
    monkeypatch.setitem(ran.analyse_each.__globals__, "analyse", lambda name, *_: begun.append(name))
    ran.analyse_each(["all"], made, domain)
    assert begun == list(ANALYSES)
    with pytest.raises(InputError, match="no anchors at"):
        ran.analyse_each(["bias", "spectrum"], change(made, "run", root=str(made.run.dir / "none")), domain)
    assert begun == list(ANALYSES)


def test_of_all_those_are_left_out_that_the_domain_has_not(nlg_config, capsys):
    ran = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/analyse.py")))
    assert ran.possible(["all"], nlg_config, nlg) == [name for name, row in ANALYSES.items() if not row.needs]
    assert "left out: analyse.py tsne needs data of the tasks; nlg has none for it" in capsys.readouterr().out


def test_the_command_lists_what_there_is():
    done = command("scripts/analyse.py", "spectra")
    assert done.returncode == 2 and "called with one of spectrum" in done.stderr
    shown = command("scripts/analyse.py", "--help").stdout.splitlines()  # each on a line of its own
    for name in ANALYSES:
        assert [line for line in shown if line.startswith(f"python scripts/analyse.py {name} ")]
    prose = shown[: shown.index("options:")]
    assert all(len(line) < 80 for line in prose if not line.startswith("python "))  # prose is filled
