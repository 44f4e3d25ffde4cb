"""RWS, robust weight signatures: patch one expert with what the others have and it has not.

One expert, `clean`, is to be patched. Tensor by tensor each other's part along its task vector τ₀ is removed,
    ρᵢ = τᵢ − ⟨τᵢ, τ₀⟩ / ‖τ₀‖² τ₀        δ = τ₀ + Σᵢ λᵢ ρᵢ
in the first `keep` layers; elsewhere δ = τ₀. The layer of a tensor is the first number in its name.

Source: "Robust weight signatures" (arXiv 2302.12480) and its authors' code. Defaults: clean 0, the first task; λ 1 over
the number of others, theirs; keep None, all tensors (ours: theirs are 7 convolutions of a VGG).
Deviation: in the code λ enters twice, as λ²; equal for λ 1. It averages batch norms, which Transformers have not.
"""

from collections.abc import Sequence

from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import Params
from common.merging.tensorwise import Taus, inner_by_pieces, layer_of


def rws(
    base: Params,
    deltas: Sequence[Params],
    *,
    clean: int = 0,
    scale: float | None = None,
    keep: int | None = None,
) -> Params:
    """The RWS delta; `clean` is the place of the expert to be patched, `scale` λ (None: 1/(N − 1)), `keep` how many
    layers are patched (None: every tensor is)."""
    if not 0 <= clean < len(deltas):
        raise InputError(f"rws: clean is the place of a task, 0 to {len(deltas) - 1}, not {clean}")
    if keep is not None and keep < 0:
        raise InputError(f"rws: keep must be at least 0, it is {keep}")
    lam = 1 / max(1, len(deltas) - 1) if scale is None else scale

    def merged(taus: Sequence[Tensor], name: str) -> Tensor:
        own = taus[clean]
        layer = layer_of(name)
        if keep is not None and (layer is None or layer >= keep):
            return own.clone()
        size, delta = inner_by_pieces(own, own), own.clone()
        for i in range(len(taus)):
            if i != clean:
                tau = taus[i]
                along = inner_by_pieces(tau, own) / size if size > 0 else 0.0
                delta.add_(tau, alpha=lam).sub_(own, alpha=lam * along)
                del tau
        return delta

    return {name: merged(Taus(deltas, name), name) for name in base}
