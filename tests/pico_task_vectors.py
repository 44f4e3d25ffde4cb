"""Random task vectors of two matrices and of what is no matrix."""

import torch

SHAPES = {"fc.weight": (12, 9), "fc.bias": (12,), "proj.weight": (9, 16), "conv.weight": (4, 3, 2, 2), "scale": ()}
MATRICES = ["fc.weight", "proj.weight"]
OTHERS = [name for name in SHAPES if name not in MATRICES]


def task_vectors(tasks, shapes=SHAPES, seed=0, size=1e-2, dtype=torch.float32):
    """Random task vectors of the size that fine-tuning leaves, and a base of ones."""
    generator = torch.Generator().manual_seed(seed)
    deltas = [
        {name: size * torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for _ in range(tasks)
    ]
    return {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}, deltas
