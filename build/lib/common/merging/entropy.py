"""How sure a model is of its answers on unlabelled inputs, and its gradient: what test-time merge methods minimise."""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import Params, as_leaf_tensors
from common.merging.calibration import Batch, CalibrationTask


def entropy(logits_AC: Tensor) -> Tensor:
    """The mean over examples of −Σ p log p, in nats."""
    log_p_AC = logits_AC.log_softmax(1)
    return -(log_p_AC.exp() * log_p_AC).sum(1).mean()


def entropy_gradients(
    method: str, theta: Params, calibration: Sequence[CalibrationTask], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """∂/∂θ of the sum over the tasks of the mean entropy on a batch of each, by tensor. A regression has no entropy and
    no part; InputError, naming the method, if every task is one.
    """
    gradients = summed_gradients(theta, calibration, batches)
    if gradients is None:
        raise only_regressions(method)
    return gradients


def only_regressions(method: str) -> InputError:
    """Where no task has an entropy."""
    return InputError(f"{method}: every task is a regression, there is no entropy to minimise")


def summed_gradients(
    theta: Params, calibration: Sequence[CalibrationTask], batches: Iterable[Batch]
) -> dict[str, Tensor] | None:
    """`entropy_gradients`, None if every task is a regression; one task's activations are held at a time."""
    leaves = as_leaf_tensors(theta)
    for task, batch in zip(calibration, batches, strict=True):
        logits_AC = task.answer(leaves, batch)
        if logits_AC.shape[1] > 1:
            entropy(logits_AC).backward()  # adds to the gradients at θ
    if all(p.grad is None for p in leaves.values()):
        return None
    return {name: cast(Tensor, p.grad) if p.grad is not None else p.new_zeros(p.shape) for name, p in leaves.items()}


def repeated(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, and when they end, the batches again without end."""
    while True:
        yield from batches
