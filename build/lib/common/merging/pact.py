"""PACT: before any merge, take from each task vector what would disturb what the others left in the pretrained weights.

Of a matrix, V₀ are the right singular vectors of θ₀ that hold the share `kept` of its squared singular values, Vᵢ those
of τᵢ that hold the share `moved` of its. What task i needs of the pretrained model and did not move is
    Rᵢ = orth((I − Vᵢ Vᵢᵀ) V₀)
and with Q = orth of all Rᵢ, i ≠ j, side by side, the filtered task vector is τⱼ (I − Q Qᵀ). What is no matrix passes.

Source: "PACT: Preserving anchored cores in task-vectors for model merging" (arXiv 2606.18627) and its authors' code.
Defaults: 0.85 and 0.95, theirs. With many tasks Q comes near the full width, and little is left of a task vector.
Deviation: the code's other variant, a fixed number of columns, is left out.
Deviation: a direction of V₀ that lies in Vᵢ but for a sine of 1e-5 belongs to Vᵢ. A fused matrix of queries, keys and
values is one matrix.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.core.linalg import rank_to_reach, right_singular_vectors
from common.core.task_vectors import LazyParams, Params
from common.merging.tensorwise import Taus, require_fraction

SAME = 1e-5  # sine of an angle below which two directions are the same


def pact(base: Params, deltas: Sequence[Params], *, kept: float = 0.85, moved: float = 0.95) -> list[Params]:
    """The task vectors without what disturbs the others. Both shares lie in (0, 1]."""
    require_fraction("pact", "kept", kept)
    require_fraction("pact", "moved", moved)
    found: dict[str, list[Tensor]] = {}

    def bases(name: str) -> list[Tensor]:
        if name not in found:
            found.clear()  # of the tensor before
            found[name] = unmoved(base[name], Taus(deltas, name), kept, moved)
        return found[name]

    def of_task(j: int) -> Callable[[str], Tensor]:
        def make(name: str) -> Tensor:
            tau = Taus(deltas, name)[j]
            if tau.ndim != 2 or not tau.any():
                return tau
            others = torch.cat([r for i, r in enumerate(bases(name)) if i != j] or [bases(name)[0][:, :0]], dim=1)
            q = orthonormal(others).to(tau.dtype)
            return tau - (tau @ q) @ q.mT

        return make

    return [LazyParams(base, of_task(j)) for j in range(len(deltas))]


def unmoved(theta_0: Tensor, taus: Sequence[Tensor], kept: float, moved: float) -> list[Tensor]:
    """Rᵢ of every task: orthonormal columns (D, k) in float64."""
    v_0 = leading(theta_0.to(taus[0].dtype), kept)
    found = []
    for tau in taus:
        v = leading(tau, moved)
        found.append(orthonormal(v_0 - v @ (v.mT @ v_0)))
        del tau
    return found


def leading(x: Tensor, share: float) -> Tensor:
    """The least number of right singular vectors (D, k) of x that hold this share of its squared singular values."""
    if not x.any():
        return x.new_zeros(x.shape[1], 0, dtype=torch.float64)
    s, v = right_singular_vectors(x)
    return v[:, : rank_to_reach(s.square(), share)]


def orthonormal(x: Tensor) -> Tensor:
    """Orthonormal columns (D, k) that span those of x (D, n), float64, which are no longer than 1."""
    if not x.numel():
        return x[:, :0]
    values, u = torch.linalg.eigh(x @ x.mT)
    return u[:, values > SAME**2 * max(1.0, float(values[-1]))]
