"""ProDistill: block by block, coefficients for every weight that make the merged block answer as the experts' do.

For each block in turn θ = θ₀ + Σᵢ αᵢ ⊙ τᵢ with one αᵢ for each weight of each task vector, and Adam minimises
    Σᵢ ‖block(θ, xᵢ) − block(θ₀ + τᵢ, zᵢ)‖²        over all examples, tokens and features
where on the inputs of task i xᵢ is what reaches the block in the model merged so far, and zᵢ what does in expert i: the
dual inputs. The derivative by αᵢ is τᵢ ⊙ G with G the gradient at θ. Outside the blocks δ is `initial` times Σᵢ τᵢ.

Source: Xu et al. 2025, "Scalable model merging with progressive layer-wise distillation" (arXiv 2502.12706), and its
code. Defaults: 64 training inputs a task, α from 0.3, Adam with lr 0.01, 100 epochs: the code's for images.
Deviation: a step has 16 inputs of every task, batches fixed once; the code's for images has 128 of all tasks mixed, its
for texts 16 of one task, for 50 epochs, and dropout in the merged block.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.seeding import seeded
from common.core.task_vectors import Params, add, as_leaf_tensors
from common.merging.calibration import BlockInputs, CalibrationTask, block_params, first_block_inputs, next_block_inputs
from common.merging.tensorwise import each_tensor, require_examples, total, weighted
from common.run.progress import counted

Flow = Sequence[BlockInputs]  # what reaches a block, batch by batch


def prodistill(
    base: Params,
    deltas: Sequence[Params],
    calibration: Sequence[CalibrationTask],
    *,
    examples: int = 64,
    initial: float = 0.3,
    lr: float = 1e-2,
    epochs: int = 100,
    seed: int = 0,
) -> Params:
    """The delta with trained α; `seed` draws which inputs are used, `examples` of each task, and the batches' order."""
    require_examples("prodistill", examples)
    if lr <= 0 or epochs < 0:
        raise InputError(f"prodistill: lr > 0 and epochs ≥ 0 are needed, they are {lr} and {epochs}")
    merged = each_tensor(lambda taus: weighted(taus, initial), base, deltas)
    x = [first_block_inputs(task, add(base, merged)) for task in calibration]
    z = [first_block_inputs(task, add(base, delta)) for task, delta in zip(calibration, deltas, strict=True)]
    for index, prefix in enumerate(counted(calibration[0].prefixes, "blocks")):
        theta_0, taus = block_params(base, prefix), [block_params(delta, prefix) for delta in deltas]
        z = [
            next_block_inputs(task, add(theta_0, tau), flow)
            for task, tau, flow in zip(calibration, taus, z, strict=True)
        ]
        block = distilled(theta_0, taus, calibration, x, z, initial, lr, epochs, seeded(seed, "prodistill", index))
        merged |= {prefix + name: delta for name, delta in block.items()}
        x = [next_block_inputs(task, add(theta_0, block), flow) for task, flow in zip(calibration, x, strict=True)]
    return merged


def distilled(
    theta_0: Params,
    taus: Sequence[Params],
    calibration: Sequence[CalibrationTask],
    inputs: Sequence[Flow],
    targets: Sequence[Flow],
    initial: float,
    lr: float,
    epochs: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Σᵢ αᵢ ⊙ τᵢ of one block, trained to meet the targets of every task on its inputs."""
    alphas = [{name: torch.full_like(tau, initial) for name, tau in of_task.items()} for of_task in taus]
    adam = torch.optim.Adam([alpha for of_task in alphas for alpha in of_task.values()], lr=lr)
    for _ in counted(range(epochs), "epochs of a block"):
        orders = [torch.randperm(len(flow), generator=generator).tolist() for flow in inputs]
        for step in range(max(map(len, orders))):
            theta = as_leaf_tensors(add(theta_0, combined(alphas, taus)))
            for task, order, x, target in zip(calibration, orders, inputs, targets, strict=True):
                batch = order[step % len(order)]
                y_ATD = task.block(theta, x[batch])
                (y_ATD - target[batch].x_ATD).square().sum().backward()  # adds to the gradients at θ
            for alpha, tau in zip(alphas, taus, strict=True):
                for name, p in theta.items():
                    alpha[name].grad = tau[name] * cast(Tensor, p.grad)
            adam.step()
    return combined(alphas, taus)


def combined(alphas: Sequence[Params], taus: Sequence[Params]) -> dict[str, Tensor]:
    """Σᵢ αᵢ ⊙ τᵢ, weight by weight."""
    return {name: total(alpha[name] * tau[name] for alpha, tau in zip(alphas, taus, strict=True)) for name in taus[0]}
