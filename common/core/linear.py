"""Every linear map of a module goes through `F.linear`, which can be another function for a while."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor
from torch.nn import functional as F

TORCHS = F.linear


@contextmanager
def linear_by(function: Callable[..., Tensor]) -> Iterator[None]:
    """All modules call this function in place of F.linear. Torch's function modes do not see nn.MultiheadAttention."""
    before = F.linear
    F.linear = function
    try:
        yield
    finally:
        F.linear = before


def usual_linear() -> AbstractContextManager[None]:
    """Torch's own again, for what is called meanwhile and is no part of a block: a model that is asked for masks."""
    return linear_by(TORCHS)
