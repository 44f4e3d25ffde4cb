"""Every draw has a generator of its own, from the run's seed and what it is for.

torch draws Bernoulli and exponential numbers by another library on CPUs of one maker than on all others, so that its
`bernoulli_` and `multinomial` differ between machines. Its uniform numbers do not, and everything here is made of them.
"""

import hashlib

import torch
from torch import Tensor

PIECE = 2**20  # uniform numbers that are in memory at once


def seeded(seed: int, *what: str | int) -> torch.Generator:
    """A CPU generator for one piece of work, the same on every machine and in every order of work."""
    key = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def random_mask(shape: torch.Size, share: float, generator: torch.Generator) -> Tensor:
    """A mask of that shape, on the CPU, in which each element is True with probability `share`."""
    mask = torch.empty(shape, dtype=torch.bool)
    for part in mask.view(-1).split(PIECE):
        part.copy_(torch.rand(len(part), generator=generator, dtype=torch.float64) < share)
    return mask


def random_choice(probabilities: Tensor, generator: torch.Generator) -> int:
    """An index of probabilities (n,), on the CPU, drawn with these: of n exponential clocks the first that rings."""
    uniform = torch.rand(len(probabilities), generator=generator, dtype=torch.float64)
    return int((probabilities.double() / -torch.log1p(-uniform)).argmax())
