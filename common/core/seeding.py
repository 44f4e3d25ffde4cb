"""Every draw has a generator of its own, from the run's seed and what it is for.

torch draws Bernoulli and exponential numbers by another library on CPUs of one maker than on all others, so that its
`bernoulli_` and `multinomial` differ between machines. Its uniform numbers do not, nor do the words of numpy's SFC64,
of which masks are made in a fraction of the time; everything here is made of these two.
"""

import hashlib

import numpy as np
import torch
from numpy.random import SFC64, BitGenerator
from torch import Tensor

PIECE = 2**17  # elements of a mask that are drawn at once, two of each word of 64 bits
HALF = 2.0**32


def seeded(seed: int, *what: str | int) -> torch.Generator:
    """A CPU generator for one piece of work, the same on every machine and in every order of work."""
    return torch.Generator().manual_seed(key_of(seed, *what) >> 1)


def seeded_words(seed: int, *what: str | int) -> BitGenerator:
    """The same of random words, for masks."""
    return SFC64(key_of(seed, *what))


def key_of(seed: int, *what: str | int) -> int:
    """A number of 64 bits that hangs on the seed and on what it is for."""
    key = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return int.from_bytes(key[:8], "little")


def random_mask(shape: torch.Size, share: float, words: BitGenerator) -> Tensor:
    """A mask of that shape, on the CPU, in which each element is True with probability `share`, to 32 bits of it.

    An element is told by half a word, the lower one first; of an odd number the last half is not used.
    """
    mask, below = torch.ones(shape, dtype=torch.bool), round(share * HALF)
    if below < HALF:
        for part in mask.view(-1).split(PIECE):
            halves = words.random_raw((len(part) + 1) // 2).astype("<u8", copy=False).view("<u4")
            np.less(halves[: len(part)], np.uint32(below), out=part.numpy())
    return mask


def random_choice(probabilities: Tensor, generator: torch.Generator) -> int:
    """An index of probabilities (n,), on the CPU, drawn with these: of n exponential clocks the first that rings."""
    uniform = torch.rand(len(probabilities), generator=generator, dtype=torch.float64)
    return int((probabilities.double() / -torch.log1p(-uniform)).argmax())
