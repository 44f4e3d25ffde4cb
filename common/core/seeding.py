"""Every draw has a generator of its own, from the run's seed and what it is for."""

import hashlib

import torch


def seeded(seed: int, *what: str | int) -> torch.Generator:
    """A CPU generator for one unit of work, the same on every machine and in every order of work."""
    key = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
