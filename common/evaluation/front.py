"""compare.search by MAP: merges with random coefficients are scored, a front is fitted to them, the best of it scored.

search_map_<method>.json and .png beside search.json hold what was found: for each test set its quadratic and how much
of the samples' variance that explains, the points of the front with the scores foreseen, and those of them that were
tried, with the scores measured and the number of the chosen one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.core.errors import InputError
from common.core.seeding import seeded
from common.evaluation.pareto import (
    APART,
    DIGITS,
    best_apart,
    explained,
    fit_surrogates,
    pareto_front,
    unknowns,
)
from common.io.checkpoints import write_text

Candidate = Mapping[str, Any]  # a row of search.json
MAP = "map"  # what compare.search calls it
TRIED = 5  # points of the front that are merged and scored
DIRECTIONS = 200  # weights of the test sets that a point of the front is looked for with


@dataclass(frozen=True)
class MapSearch:
    """What MAP is to vary: a hyperparameter that takes a number for each task, from low to high; and how often."""

    name: str
    low: float
    high: float
    samples: int

    def draw(self, tasks: int, seed: int, method: str) -> list[list[float]]:
        """The samples: uniform, the same on every machine."""
        uniform = torch.rand(self.samples, tasks, generator=seeded(seed, MAP, method), dtype=torch.float64).numpy()
        return np.round(self.low + (self.high - self.low) * uniform, DIGITS).tolist()

    def grid(self, coefficients: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
        """The candidates of these coefficients, as a grid of lists has them."""
        return [{self.name: list(of_tasks)} for of_tasks in coefficients]


def map_search(method: str, lists: Mapping[str, Any], tasks: int) -> MapSearch | None:
    """What compare.search says of a method if it asks for MAP, else None. Raises: InputError if it cannot be done."""
    for name, said in lists.items():
        where = f"compare.search.{method}.{name}"
        if isinstance(said, list | tuple):
            continue
        if not isinstance(said, Mapping) or set(said) != {MAP}:
            raise InputError(
                f"{where} must be a list of values to try, or {{map: {{low, high, samples}}}}; it is {said!r}"
            )
        asked = said[MAP]
        if not isinstance(asked, Mapping) or set(asked) != {"low", "high", "samples"}:
            raise InputError(f"{where}.map must have low, high and samples, and nothing else; it is {asked!r}")
        if len(lists) > 1:
            raise InputError(
                f"{where}.map varies one hyperparameter; compare.search.{method} names {' and '.join(lists)}"
            )
        low, high, samples = asked["low"], asked["high"], asked["samples"]
        if any(type(value) not in (int, float) for value in (low, high)) or not low < high < float("inf"):
            raise InputError(
                f"{where}.map goes from low to high, two numbers, the first below; they are {low!r} and {high!r}"
            )
        if type(samples) is not int or samples < unknowns(tasks):
            raise InputError(
                f"{where}.map.samples is {samples!r}; a quadratic of {tasks} coefficients has {unknowns(tasks)} "
                "numbers, which so many samples or more can fix"
            )
        return MapSearch(name, float(low), float(high), samples)
    return None


def front_of(asked: MapSearch, rows: Sequence[Candidate], seed: int) -> dict[str, Any]:
    """The front that is foreseen from what search.json says of the samples, and which of its points are to be tried:
    those of the highest mean that lie apart.
    """
    tests = list(rows[0]["scores"])
    c_SN = np.array([row["hyper"][asked.name] for row in rows], dtype=float)
    scores_SM = np.array([[row["scores"][test]["value"] for test in tests] for row in rows])
    surrogates = fit_surrogates(c_SN, scores_SM)
    front_KN = pareto_front(surrogates, asked.low, asked.high, directions(len(tests), seed), c_SN)
    foreseen_KM = surrogates.at(front_KN)
    diagonal = (asked.high - asked.low) * front_KN.shape[1] ** 0.5
    tried = best_apart(front_KN, foreseen_KM.mean(1), TRIED, APART * diagonal)
    fits = zip(tests, explained(surrogates, c_SN, scores_SM).tolist(), *map(np.ndarray.tolist, surrogates), strict=True)
    points = [
        {"coefficients": c, "foreseen": dict(zip(tests, scores, strict=True))}
        for c, scores in zip(front_KN.tolist(), foreseen_KM.tolist(), strict=True)
    ]
    return {
        "hyperparameter": asked.name,
        "surrogates": {t: {"explained": r, "constant": e, "slope": b, "curvature": a} for t, r, e, b, a in fits},
        "front": points,
        "tried": [points[k]["coefficients"] for k in tried],
    }


def directions(tests: int, seed: int) -> np.ndarray:
    """(DIRECTIONS, M): weights of the test sets, of sum 1: all alike, each alone, then drawn with no preference."""
    left = max(0, DIRECTIONS - 1 - tests)
    drawn = -np.log1p(-torch.rand(left, tests, generator=seeded(seed, MAP, "weights"), dtype=torch.float64).numpy())
    return np.vstack([np.full((1, tests), 1 / tests), np.eye(tests), drawn / drawn.sum(1, keepdims=True)])


def write_front(
    folder: Path, method: str, found: Mapping[str, Any], rows: Sequence[Candidate], best: int, percent: bool
) -> None:
    """Write what was found, with what search.json says of the points tried and which is the best, as JSON and PNG."""
    from common.evaluation.figures import plot_front  # imports matplotlib

    tried = [
        {"coefficients": c, "scores": {test: of_test["value"] for test, of_test in row["scores"].items()}}
        for c, row in zip(found["tried"], rows, strict=True)
    ]
    whole = {"method": method, **found, "tried": tried, "chosen": best}
    write_text(folder / f"search_{MAP}_{method}.json", json.dumps(whole, indent=1) + "\n")
    plot_front(whole, folder / f"search_{MAP}_{method}.png", percent)
