"""Every draw has a generator of its own, from the run's seed and what it is for.

torch draws Bernoulli and exponential numbers by another library on CPUs of one maker than on all others, so that its
`bernoulli_` and `multinomial` differ between machines. Its uniform numbers do not, and everything here is made of them.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 2**20  # uniform numbers that are in memory at once, and elements of a piece of a mask


def seeded(seed: int, *what: str | int) -> torch.Generator:
    """A CPU generator for one piece of work, the same on every machine and in every order of work."""
    key = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def random_mask(shape: torch.Size, share: float, generator: torch.Generator) -> Tensor:
    """A mask of that shape, on the CPU, in which each element is True with probability `share`."""
    mask = torch.empty(shape, dtype=torch.bool)
    for part, drawn in zip(mask.view(-1).split(PIECE), random_masks(mask.numel(), share, generator), strict=False):
        part.copy_(drawn)
    return mask


def random_masks(count: int, share: float, generator: torch.Generator) -> Iterator[Tensor]:
    """The same in pieces, one behind the other, each made when it is asked for."""
    for begin in range(0, count, PIECE):
        yield torch.rand(min(PIECE, count - begin), generator=generator, dtype=torch.float64) < share


def random_choice(probabilities: Tensor, generator: torch.Generator) -> int:
    """An index of probabilities (n,), on the CPU, drawn with these: of n exponential clocks the first that rings."""
    uniform = torch.rand(len(probabilities), generator=generator, dtype=torch.float64)
    return int((probabilities.double() / -torch.log1p(-uniform)).argmax())
