"""MAP: quadratic surrogates and their Pareto front, where both are known."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from common.core.errors import InputError
from common.core.seeding import seeded
from common.domain import Scored
from common.evaluation.figures import plot_front
from common.evaluation.front import directions
from common.evaluation.pareto import (
    Surrogates,
    best_apart,
    explained,
    fit_surrogates,
    not_dominated,
    pareto_front,
    unknowns,
)
from common.io.checkpoints import Checkpoint
from compare import compare, plan
from helpers import change
from pico_grid import counting
from Vision import domain

ASKED = {"map": {"low": 0.0, "high": 1.0, "samples": 8}}
PEAKS = {"MNIST": (0.2, 0.9), "SVHN": (0.8, 0.3)}  # coefficients at which each score is best


def draw(*shape, what):
    return torch.rand(*shape, generator=seeded(0, what), dtype=torch.float64).numpy()


def peaks_at(peaks_MN):
    """Surrogates 1 - |c - peak|^2, written out."""
    tests, tasks = peaks_MN.shape
    return Surrogates(1 - (peaks_MN**2).sum(1), 2 * peaks_MN, np.tile(-2 * np.eye(tasks), (tests, 1, 1)))


@pytest.mark.parametrize("tasks", [1, 3])
def test_quadratics_are_found_from_as_many_samples_as_they_have_numbers(tasks):
    constant, slope, curvature = draw(2, what="e"), draw(2, tasks, what="b"), draw(2, tasks, tasks, what="A")
    curvature = curvature + curvature.transpose(0, 2, 1)
    c = draw(unknowns(tasks), tasks, what="c")
    scores = np.array(
        [[e + b @ x + x @ a @ x / 2 for e, b, a in zip(constant, slope, curvature, strict=True)] for x in c]
    )
    found = fit_surrogates(c, scores)
    for part, expected in zip(found, (constant, slope, curvature), strict=True):
        np.testing.assert_allclose(part, expected, atol=1e-8)
    np.testing.assert_allclose(found.at(c), scores, atol=1e-9)
    np.testing.assert_allclose(explained(found, c, scores), 1)


def test_what_no_quadratic_can_say_is_not_explained():
    c = draw(200, 1, what="c")
    scores = np.hstack([np.ones_like(c), np.where(c > 0.5, 1.0, 0.0), (np.arange(200) % 2)[:, None]])
    found = explained(fit_surrogates(c, scores), c, scores)
    assert found[0] == 1 and 0.6 < found[1] < 0.9 and abs(found[2]) < 0.1


def test_the_front_of_two_round_hills_is_the_line_between_their_tops():
    a, b = np.array([[0.2, 0.9, 0.5], [0.8, 0.3, 0.5]])
    front = pareto_front(peaks_at(np.array([a, b])), 0, 1, directions(2, 0), draw(20, 3, what="c"))
    along = (front - a) @ (b - a) / ((b - a) @ (b - a))
    np.testing.assert_allclose(front, a + along[:, None] * (b - a), atol=1e-3)
    assert along.min() == pytest.approx(0, abs=2e-3) and along.max() == pytest.approx(1, abs=2e-3)
    assert np.diff(np.sort(along)).max() < 0.05, "no gaps"


def test_the_front_stays_within_the_bounds():
    """Tops at (0.5, 2) and (2, 0.5), bounds 0 and 1: the sides of the box from below each top to the corner."""
    front = pareto_front(peaks_at(np.array([[0.5, 2], [2, 0.5]])), 0, 1, directions(2, 0), draw(20, 2, what="c"))
    assert front.min() >= 0 and front.max() == 1
    assert (front.max(1) == 1).all() and front.min() == pytest.approx(0.5, abs=2e-3)


def test_a_row_is_dominated_by_one_as_good_and_somewhere_better():
    scores = np.array([[1, 0], [0, 1], [0.4, 0.4], [0.5, 0.4], [1, 0], [0, 0.9]])
    assert not_dominated(scores).tolist() == [True, True, False, True, True, False]


def test_points_that_are_tried_lie_apart():
    points = np.array([[0.0], [0.04], [0.5], [1.0], [0.52]])
    assert best_apart(points, np.array([1, 0.9, 0.5, 0.7, 0.6]), 3, 0.1) == [0, 3, 4]
    assert best_apart(points, np.array([1, 1, 1, 1, 1]), 9, 0.1) == [0, 2, 3]


def coefficients_of(config, path):
    """The two coefficients of a task arithmetic, told by one tensor."""
    name = "visual.conv1.weight"
    base, merged = (Checkpoint(p).read([name])[name].double().flatten() for p in (config.model.path("base"), path))
    taus = [Checkpoint(config.model.path("expert", t)).read([name])[name].double().flatten() - base for t in PEAKS]
    return torch.linalg.lstsq(torch.stack(taus, 1), (merged - base)[:, None]).solution.flatten().tolist()


def score_of_hills(config, task, checkpoints, device):
    """On the cut each task's score is best at coefficients of its own; on the test set it says nothing."""
    if config.eval.split == "test":
        return iter([(name, Scored(0.5, 7, "")) for name in checkpoints])
    far = {n: np.square(np.subtract(coefficients_of(config, p), PEAKS[task])).sum() for n, p in checkpoints.items()}
    return iter([(name, Scored(1 - float(distance), 7, "")) for name, distance in far.items()])


@pytest.mark.usefixtures("no_figures")
def test_map_merges_with_the_best_mean_of_the_front(pico_config):
    config = change(pico_config, "compare", starts=["ta"], inits=[], search={"ta": {"scale": ASKED}})
    scored = Counter()
    compare(config, counting(scored, score_of_hills))
    folder, most = config.run.dir, sum(scored.values())
    found = json.loads((folder / "search_map_ta.json").read_text())
    middle = np.mean(list(PEAKS.values()), 0)
    chosen = found["tried"][found["chosen"]]
    np.testing.assert_allclose(chosen["coefficients"], middle, atol=2e-3)
    assert json.loads((folder / "search.json").read_text())["choices"]["ta"]["scale"] == chosen["coefficients"]
    assert (
        json.loads((folder / "merged/ta/provenance.json").read_text())["start"]["hyper"]["scale"]
        == chosen["coefficients"]
    )
    foreseen = {tuple(point["coefficients"]): point["foreseen"] for point in found["front"]}
    for point in found["tried"]:
        assert point["scores"] == pytest.approx(foreseen[tuple(point["coefficients"])], abs=1e-3)
    assert all(of_test["explained"] == pytest.approx(1, abs=1e-4) for of_test in found["surrogates"].values())
    assert (folder / "search_map_ta.png").stat().st_size > 1000
    written = (folder / "search_map_ta.json").read_bytes()
    compare(config, counting(scored, score_of_hills))
    assert sum(scored.values()) == most and (folder / "search_map_ta.json").read_bytes() == written


def test_a_front_of_many_test_sets_is_drawn_as_lines(tmp_path):
    tests = ["a", "b", "c"]
    points = [{"coefficients": [c], "foreseen": dict.fromkeys(tests, c)} for c in (0.1, 0.5)]
    tried = [{"coefficients": [0.5], "scores": dict.fromkeys(tests, 0.4)}]
    plot_front({"surrogates": dict.fromkeys(tests), "front": points, "tried": tried, "chosen": 0}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"scale": 0.3}, "compare.search.ta.scale must be a list of values to try, or {map: .*; it is 0.3"),
        ({"scale": {"mapp": {}}}, "compare.search.ta.scale must be a list of values to try, or {map: "),
        ({"scale": {"map": {"low": 0}}}, "compare.search.ta.scale.map must have low, high and samples"),
        ({"scale": {"map": {"low": 1, "high": 0, "samples": 9}}}, "goes from low to high, .* they are 1 and 0"),
        ({"scale": {"map": {"low": 0, "high": 1, "samples": 5}}}, "samples is 5; a quadratic of 2 coefficients has 6"),
        ({"scael": ASKED}, "ta: unknown hyperparameter 'scael', accepted: scale"),
        ({"scale": ASKED, "other": [1]}, "compare.search.ta.scale.map varies one hyperparameter; .* scale and other"),
    ],
)
def test_what_map_cannot_vary_is_refused_before_anything_is_opened(pico_config, lists, message):
    config = change(change(pico_config, "compare", starts=["ta"], search={"ta": lists}), "model", root="/nowhere")
    with pytest.raises(InputError, match=message):
        compare(config, domain)
    assert not config.run.dir.exists()


def test_map_is_for_methods_that_take_a_number_for_each_task(pico_config):
    for method, field, message in (
        ("dare_ta", "drop", "dare_ta: drop must be"),
        ("fda", "blend", "compare.search.fda.blend must be a list of values to try; map is for merges"),
    ):
        config = change(pico_config, "compare", starts=["ta", "dare_ta"], search={method: {field: ASKED}})
        with pytest.raises(InputError, match=message):
            compare(config, domain)


def test_the_dry_run_counts_samples_and_front(pico_config):
    config = change(pico_config, "compare", starts=["ta"], search={"ta": {"scale": ASKED}})
    assert (
        "8 candidates, merged and scored on validation_cut, then up to 5 of their Pareto front"
        in plan(config, domain).text
    )
