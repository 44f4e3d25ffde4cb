"""RegMean: the matrix whose outputs are nearest, in least squares, to those of every expert on its own inputs.

Xᵢ (rows are inputs) and Gᵢ = XᵢᵀXᵢ belong to expert i. Σᵢ ‖Xᵢ (W − Wᵢ)ᵀ‖²_F is least at W = (Σᵢ WᵢGᵢ)(Σᵢ Gᵢ)⁺, and for
Wᵢ = θ₀ + τᵢ the same holds of δ and the τᵢ. The paper first multiplies what is off the diagonal of each Gᵢ by α. All
linear maps of the Transformer are merged so, every other tensor (biases, norms, embeddings, convolutions) is averaged.

Source: Jin et al. 2023, "Dataless knowledge fusion by merging weights of language models" (arXiv 2212.09849).
Defaults: α = 0.9; 256 training inputs a task, as in FusionBench. As in the released codes Gᵢ is the mean over tokens,
the padding in a batch of texts among them, so that no task counts more because its inputs are longer.
Deviation: a projection that is kept as an input times a matrix, not its transpose (CLIP's last one), is averaged.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.matching import Block
from common.merging.tensorwise import require_examples, require_fraction, weighted
from common.probes import Probe
from common.task_vectors import Params, add, leaves


def regmean(
    base: Params, deltas: Sequence[Params], probes: Sequence[Probe], *, examples: int = 256, alpha: float = 0.9
) -> Params:
    """The RegMean delta; `alpha` is the factor on what is off the diagonal of the Gram matrices."""
    require_examples("regmean", examples)
    require_fraction("regmean", "alpha", alpha)
    grams = (
        mean_grams(probe.answer, add(base, delta), ((batch,) for batch in probe.batches))
        for delta, probe in zip(deltas, probes, strict=True)
    )
    return regression_means(deltas, grams, alpha)


def regression_means(deltas: Sequence[Params], grams: Iterable[Params], alpha: float) -> dict[str, Tensor]:
    """For each tensor the least-squares mean of the τᵢ if there are Gram matrices of that name, else their mean.

    `grams` are those of one task after the other; they are consumed one by one.
    """
    sums = normal_equations(zip(deltas, grams, strict=True), alpha)
    return {
        name: least_squares(*sums[name]).to(tau.dtype)
        if name in sums
        else weighted([delta[name] for delta in deltas], None)
        for name, tau in deltas[0].items()
    }


def normal_equations(tasks: Iterable[tuple[Params, Params]], alpha: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (Σ τᵢGᵢ, ΣGᵢ)} in float64 over the tasks, which are consumed one by one; the names are those of the Gᵢ."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for tau, grams in tasks:
        for name, gram_DD in grams.items():
            gram_DD = shrunk(gram_DD.double(), alpha)
            target = tau[name].double() @ gram_DD
            if name in sums:
                target, gram_DD = sums[name][0].add_(target), sums[name][1].add_(gram_DD)
            sums[name] = target, gram_DD
    return sums


def mean_grams(answer: Callable[..., Any], theta: Params, calls: Iterable[tuple]) -> dict[str, Tensor]:
    """XᵀX / rows (D, D) of the inputs X, one row a token, that answer(θ, *call) brings over all calls to every linear
    map x Wᵀ, by the name of W.
    """
    trained = leaves(theta)  # a matrix that needs no gradient is not always multiplied as one
    seen = _LinearInputs(trained)
    for call in calls:
        with seen:
            answer(trained, *call)
    return {name: gram_DD / seen.rows[name] for name, gram_DD in seen.grams.items()}


def input_grams(block: Block, theta: Params, x_ATD: Tensor) -> dict[str, Tensor]:
    """XᵀX (D, D) of the inputs X, one row a token, of every linear map x Wᵀ of the block, by the name of W."""
    trained = leaves(theta)
    with _LinearInputs(trained) as seen:
        block(trained, x_ATD)
    return seen.grams


class _LinearInputs(TorchDispatchMode):
    """Sums XᵀX, and counts the rows of X, over all products X Wᵀ taken while it is on, W one of the given matrices.

    Below all modules and functional forms, so that the fused projections of nn.MultiheadAttention are seen as well.
    """

    def __init__(self, theta: Params):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in theta.items() if p.ndim == 2}
        self.shapes = {name: p.shape for name, p in theta.items()}
        self.grams: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            x, transposed = args[-2:]
            name = self.names.get(transposed.data_ptr())
            if name and transposed.T.shape == self.shapes[name] and transposed.T.is_contiguous():
                self.grams[name] = self.grams.get(name, 0) + x.T @ x
                self.rows[name] = self.rows.get(name, 0) + len(x)
        return func(*args, **(kwargs or {}))


def regression_mean(taus: Sequence[Tensor], grams_DD: Iterable[Tensor], rtol: float | None = None) -> Tensor:
    """δ (R, D) = (Σ τᵢGᵢ)(Σ Gᵢ)⁺ of τᵢ (R, D) and Gᵢ (D, D), in the type of the τᵢ.

    Sums and pseudo-inverse are taken in float64, since a Gram matrix squares the condition number. The Gᵢ are consumed
    one by one: a generator never holds two of them. Eigenvalues of ΣGᵢ up to `rtol` of the largest count as 0.
    """
    width = taus[0].shape[1]
    gram_DD = taus[0].new_zeros(width, width, dtype=torch.float64)
    target = torch.zeros_like(taus[0], dtype=torch.float64)
    grams = iter(grams_DD)  # no zip: it would keep one while the next is made
    for tau in taus:
        task_gram_DD = next(grams)
        gram_DD += task_gram_DD
        target += tau.double() @ task_gram_DD.double()
        del task_gram_DD
    return least_squares(target, gram_DD, rtol).to(taus[0].dtype)


def least_squares(target: Tensor, gram_DD: Tensor, rtol: float | None = None) -> Tensor:
    """target (R, D) times the pseudo-inverse of gram_DD, both float64."""
    if not gram_DD.any():
        return torch.zeros_like(target)
    values, vectors = torch.linalg.eigh(gram_DD)
    cutoff = values[-1] * (len(values) * torch.finfo(values.dtype).eps if rtol is None else rtol)
    cut = int((values <= cutoff).sum())  # they ascend
    return target @ vectors[:, cut:] / values[cut:] @ vectors[:, cut:].mT


def shrunk(gram_DD: Tensor, alpha: float = 0.9) -> Tensor:
    """A Gram matrix with α times what is off its diagonal."""
    scaled_DD = alpha * gram_DD
    scaled_DD.diagonal().add_(gram_DD.diagonal(), alpha=1 - alpha)
    return scaled_DD
