"""Order statistics over a whole model, found in passes over its tensors while one of them is in memory.

The k-th largest of any number of floats is found exactly, sixteen bits at a time: a float's bits, turned such that they
are ordered as the floats are, are counted by their first digit, then those with the digit of the k-th by their next. Of
float32 that takes two passes. Counts are whole numbers: nothing hangs on the order of tensors or on rounding.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from torch import Tensor

Numbers = Callable[[], Iterable[tuple[int, Tensor]]]
"""Each call passes over the model once: the number of a task, and floats of it of any shape."""

PIECE = 2**20  # floats at once
BITS = 16  # of a digit
DIGITS = 2**BITS


def nth_largest(numbers: Numbers, nth: Callable[[int], int]) -> dict[int, float]:
    """{task: the nth(n)-th largest of its floats, all of one type, where n is how many there are; inf for a 0-th}."""
    searches: dict[int, Search] = {}
    while not searches or any(search.shift for search in searches.values()):
        for task, x in numbers():
            searches.setdefault(task, Search(nth, 8 * x.element_size())).count(x)
        if not searches:
            break
        for search in searches.values():
            search.narrow()
    return {task: search.value() for task, search in searches.items()}


class Search:
    """The search for one order statistic: the digits that are known of it, and how far it is from the largest there."""

    def __init__(self, nth: Callable[[int], int], width: int):
        self.nth, self.width, self.shift, self.prefix, self.rank = nth, width, width, 0, -1
        self.counts = np.zeros(DIGITS, np.int64)

    def count(self, x: Tensor) -> None:
        """Count the next digit of those floats that have the known ones."""
        for keys in ordered(x):
            if self.shift < self.width:
                keys = keys[keys >> np.uint64(self.shift) == np.uint64(self.prefix)]
            digits = keys >> np.uint64(self.shift - BITS) & np.uint64(DIGITS - 1)
            self.counts += np.bincount(digits.astype(np.intp), minlength=DIGITS)

    def narrow(self) -> None:
        """Take the digit that the counts tell."""
        if self.rank < 0:
            self.rank = self.nth(int(self.counts.sum()))
        at_least = self.counts[::-1].cumsum()[::-1]  # how many have this digit or a larger one
        digit = max(0, int((at_least >= self.rank).sum()) - 1)
        self.rank -= int(at_least[digit + 1]) if self.rank and digit + 1 < DIGITS else 0
        self.prefix = self.prefix << BITS | digit
        self.shift -= BITS
        self.counts[:] = 0

    def value(self) -> float:
        """What was found."""
        if self.rank == 0:
            return math.inf
        sign, kind = 1 << (self.width - 1), {32: (np.uint32, np.float32), 64: (np.uint64, np.float64)}[self.width]
        bits = self.prefix ^ sign if self.prefix & sign else self.prefix ^ (2 * sign - 1)
        return float(np.array(bits, kind[0]).view(kind[1]))


def ordered(x: Tensor) -> Iterator[np.ndarray]:
    """Whole numbers, uint64, that are ordered as the floats of x are, piece by piece."""
    kind = {4: np.uint32, 8: np.uint64}[x.element_size()]
    sign = kind(1 << (8 * x.element_size() - 1))
    for piece in x.detach().flatten().split(PIECE):
        bits = piece.cpu().numpy().view(kind)
        yield np.where(bits & sign, ~bits, bits | sign).astype(np.uint64)
