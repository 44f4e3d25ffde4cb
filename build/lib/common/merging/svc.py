"""SVC, singular value calibration: after a merge, shrink the directions that several task vectors have in common.

For the merged matrix M = U S Vᵀ, every direction r has the responses aᵣ = uᵣᵀ M of the merged model and aᵢᵣ = uᵣᵀ τᵢ of
each task. sᵢᵣ = ⟨aᵣ, aᵢᵣ⟩ / ‖aᵢᵣ‖² says how many times the merged model has what task i does there. With N tasks
    S'ᵣ = γᵣ Sᵣ        γᵣ = N / Σᵢ max(α, sᵢᵣ)
so that a direction which every task has, and which was added up N times, has it once. U and V stay.

Source: "When shared knowledge hurts: spectral over-accumulation in model merging" (arXiv 2602.05536), in the form of
FusionBench. Default: alpha 0.1, that of the command line; the authors' runs have 1/N, and 1 after TSV-M.
What is no matrix stays as merged. Where all sᵢᵣ exceed α the result does not depend on the scale of M.
Deviation: a direction with ‖aᵢᵣ‖² below 1e-12 of ‖τᵢ‖² counts as one that task i lacks, sᵢᵣ = 0; the code clamps ‖aᵢᵣ‖²
at 1e-12, which depends on the scale of the weights.
Deviation: the authors' own repository takes the mean of the sᵢᵣ, and γᵣ = 1 where one of them is negative.
Deviation: the code leaves out the text projection and embeddings; here what a method merges is calibrated. A fused
matrix of queries, keys and values is one matrix, as theirs are where they are fused.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.linalg import truncated_svd
from common.core.task_vectors import Params
from common.merging.tensorwise import Taus

ABSENT = 1e-12  # of ‖τᵢ‖²: a response so small is rounding


def svc(base: Params, deltas: Sequence[Params], merged: Params, *, alpha: float = 0.1) -> Params:
    """The merged delta with calibrated singular values. InputError unless `alpha` is above 0."""
    if alpha <= 0:
        raise InputError(f"svc: alpha must be above 0, it is {alpha}")
    return {
        name: calibrated(delta, Taus(deltas, name), alpha) if delta.ndim == 2 and delta.any() else delta
        for name, delta in merged.items()
    }


def calibrated(merged: Tensor, taus: Sequence[Tensor], alpha: float) -> Tensor:
    """M (R, D) with calibrated singular values, of the task vectors (R, D)."""
    u, s, v = truncated_svd(merged, min(merged.shape))
    overlaps = torch.zeros_like(s, dtype=torch.float64)
    for tau in taus:
        response = u.mT @ tau
        size = response.double().square().sum(1)
        shared = s.double() * (response * v.mT).double().sum(1)  # ⟨aᵣ, aᵢᵣ⟩, as aᵣ = Sᵣ vᵣᵀ
        there = size > ABSENT * size.sum()
        overlaps += torch.where(there, shared / torch.where(there, size, 1), 0).clamp_(min=alpha)
        del tau, response
    return (u * (len(taus) / overlaps * s).to(s)) @ v.mT
