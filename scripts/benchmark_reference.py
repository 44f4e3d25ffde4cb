"""The yardstick of scripts/benchmark.py: both stages as plain code would have them; and what is measured by it."""

from typing import Any

import torch
from torch import Tensor

from common.config import PRESETS
from common.core.blocks import Block
from common.core.seeding import seeded
from common.core.task_vectors import Params
from common.fda.matching import DISTANCES
from common.io.yaml_files import read_yaml_file

PAPER_STEPS = 1200


def preset(section: str) -> dict[str, Any]:
    """A section of the fast preset, which the engine is measured with."""
    return read_yaml_file(PRESETS / "fast.yaml")[section]


class Reference:
    """The plain code: everything requires a gradient and gets it; AdamW, float32, a full backward pass."""

    def __init__(self, block: Block, theta_0: Params, theta_t: Params, x_init: Tensor):
        self.block = block
        self.theta_0 = {n: p.clone().requires_grad_() for n, p in theta_0.items()}
        self.theta_t = {n: p.clone().requires_grad_() for n, p in theta_t.items()}
        self.x = x_init.clone().requires_grad_()
        self.optimizer = torch.optim.AdamW([self.x], lr=1e-2)

    def step(self) -> None:
        y, target = self.block(self.theta_0, self.x), self.block(self.theta_t, self.x)
        distance = (1 - torch.cosine_similarity(y.flatten(1), target.flatten(1))).sum()
        gradients = torch.autograd.grad(distance, list(self.theta_0.values()), create_graph=True)
        loss = torch.zeros((), device=self.x.device)
        for g, p, q in zip(gradients, self.theta_0.values(), self.theta_t.values(), strict=True):
            loss = loss + 1 - torch.cosine_similarity(-g.flatten(), (q - p).detach().flatten(), dim=0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def plain_fit(
    block: Block, theta_0: Params, deltas: list[Params], x: Tensor, y: Tensor, lr: float, epochs: int, batch: int,
    scale: float,
) -> Params:  # fmt: skip
    """The plain loop: dictionaries rebuilt and all gradients zeroed in every step, Adam tensor by tensor."""
    if deltas:
        params = {(n, i): torch.full_like(p, scale) for i in range(len(deltas)) for n, p in theta_0.items()}
    else:
        params = {(n, 0): p.clone() for n, p in theta_0.items()}

    def build() -> Params:
        if not deltas:
            return {n: params[n, 0] for n in theta_0}
        return {n: p + sum(params[n, i] * delta[n] for i, delta in enumerate(deltas)) for n, p in theta_0.items()}

    optimizer = torch.optim.Adam([p.requires_grad_() for p in params.values()], lr=lr, foreach=False, fused=False)
    generator = seeded(0)
    for _ in range(epochs):
        for batch_indices in torch.randperm(len(x), generator=generator).to(x.device).split(batch):
            optimizer.zero_grad()
            DISTANCES["cos"](block(build(), x[batch_indices]), y[batch_indices]).backward()
            optimizer.step()
    with torch.no_grad():
        return {n: p.clone() for n, p in build().items()}
