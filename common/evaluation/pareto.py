"""MAP: the Pareto front of merging coefficients, on a quadratic surrogate of every score.

Scores M_n(c) of the merge with coefficients c, one for each task, are measured at random c. For each test set n
    M̃_n(c) = e_n + b_nᵀ c + ½ cᵀ A_n c,   A_n symmetric,
is fitted to them by least squares: 1 + N + N (N + 1) / 2 numbers for N tasks. The front is then found on the M̃_n, which
cost nothing: c is on it if no other coefficients are as good on every test set and better on one.

Source: Li et al. 2024, "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation" (arXiv
2406.07529).
Deviation: the paper draws the front with NSGA-III. Here each point is the maximum of Σ w_n M̃_n with weights w of its
own, by L-BFGS-B within the bounds, and what another point dominates is left out: where a front is dented, the dent is
passed over. No sigmoid or softplus is put around the quadratics.

Shapes: S samples, N coefficients, M test sets, K points of the front.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

DIGITS = 3  # of a coefficient of the front, so that it is not decided by the last bit of a sum
APART = 0.05  # of the box's diagonal, between two points of the front that are tried


class Surrogates(NamedTuple):
    """The quadratics of M test sets: M̃ = constant + slope c + ½ cᵀ curvature c."""

    constant_M: ndarray
    slope_MN: ndarray
    curvature_MNN: ndarray

    def at(self, c_KN: ndarray) -> ndarray:
        """(K, M): the scores that are foreseen with coefficients (K, N)."""
        return (
            self.constant_M + c_KN @ self.slope_MN.T + 0.5 * np.einsum("kn,mnp,kp->km", c_KN, self.curvature_MNN, c_KN)
        )


def unknowns(tasks: int) -> int:
    """How many numbers a quadratic of so many coefficients has: as many samples are the least that fix it."""
    return 1 + tasks + tasks * (tasks + 1) // 2


def fit_surrogates(c_SN: ndarray, scores_SM: ndarray) -> Surrogates:
    """The least-squares quadratics of scores (S, M) measured with coefficients (S, N), S at least `unknowns(N)`."""
    tasks = c_SN.shape[1]
    first, second = np.triu_indices(tasks)
    columns = np.hstack([np.ones((len(c_SN), 1)), c_SN, c_SN[:, first] * c_SN[:, second]])
    found, *_ = np.linalg.lstsq(columns, scores_SM, rcond=None)
    curvature = np.zeros((scores_SM.shape[1], tasks, tasks))
    curvature[:, first, second] = found[1 + tasks :].T
    return Surrogates(found[0], found[1 : 1 + tasks].T, curvature + curvature.transpose(0, 2, 1))


def explained(surrogates: Surrogates, c_SN: ndarray, scores_SM: ndarray) -> ndarray:
    """(M,): the share of the variance of each test set's scores that its quadratic explains; 1 of equal scores."""
    rest = ((scores_SM - surrogates.at(c_SN)) ** 2).sum(0)
    spread = ((scores_SM - scores_SM.mean(0)) ** 2).sum(0)
    return 1 - np.divide(rest, spread, out=np.zeros_like(rest), where=spread > 0)


def pareto_front(surrogates: Surrogates, low: float, high: float, weights_KM: ndarray, starts_SN: ndarray) -> ndarray:
    """(K', N): the coefficients between low and high with the greatest Σ w_n M̃_n for some of the weights w (K, M), each
    searched for from the best of the starts; without those that others dominate, and none twice.
    """
    from scipy.optimize import minimize  # half a second, of which no other command has need

    foreseen_SM, found = surrogates.at(starts_SN), []
    for w_M in weights_KM:
        slope, curvature = w_M @ surrogates.slope_MN, np.tensordot(w_M, surrogates.curvature_MNN, 1)

        def loss(c: ndarray, slope: ndarray = slope, curvature: ndarray = curvature) -> tuple[float, ndarray]:
            bent = curvature @ c
            return -float(slope @ c + 0.5 * c @ bent), -(slope + bent)

        start = starts_SN[np.argmax(foreseen_SM @ w_M)]
        bounds = [(low, high)] * len(start)
        found.append(minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x)
    points = np.unique(np.clip(np.round(found, DIGITS), low, high), axis=0)
    return points[not_dominated(surrogates.at(points))]


def not_dominated(scores_KM: ndarray) -> ndarray:
    """(K,): whether no other row is as good everywhere and better somewhere."""
    as_good = (scores_KM[:, None] <= scores_KM[None]).all(-1)  # of each row: the rows that are
    return np.logical_not(np.any(as_good & ~as_good.T, axis=-1))


def best_apart(front_KN: ndarray, means_K: ndarray, count: int, least: float) -> list[int]:
    """The places of up to `count` points of the highest means, none nearer to another than `least`, falling."""
    taken: list[int] = []
    for k in np.argsort(-means_K, kind="stable"):
        if len(taken) < count and all(np.linalg.norm(front_KN[k] - front_KN[other]) >= least for other in taken):
            taken.append(int(k))
    return taken
