"""What the work needs: operations and memory, counted on one block without weights (the meta device)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from common.config import PRETRAINED, Config
from common.core.blocks import Block, BlockFamily, BlockModule, by_kind
from common.core.task_vectors import Params, as_leaf_tensors
from common.domain import Domain, anchored_part
from common.fda.adaptation import BETAS, coefficients, own_weights
from common.fda.matching import DISTANCES, MatchingProblem, matching_gradient
from common.fda.precision import effective_precision, forward_in
from common.run.engine import Memory

GIB = 2**30
HEAP_BYTES = 32 * 2**20  # smaller buffers come from malloc's heap, which keeps what is freed
HOLES = 0.5  # of the heap in use lie between buffers; measured with blocks of a ViT, a RoBERTa and a Llama
EIGH_COPIES = 2  # of the matrix, besides the results; measured on a CPU
NO_KERNELS = (torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like)


@dataclass(frozen=True)
class Work:
    """What computing takes, wherever it is done.

    operations: 2 for multiply and add. moved: bytes of tensors that kernels read and write, each by itself. launches:
    the number of kernels.
    """

    operations: float = 0.0
    moved: float = 0.0
    launches: float = 0.0

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * each for each in vars(self).values()))

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(sum, zip(vars(self).values(), vars(other).values(), strict=True)))


class Ledger(TorchDispatchMode):
    """What is done while it is on, and bytes of tensors alive at once.

    peak: the most there were, LAPACK's own included. large, small: the most of those that malloc maps, which have
    `mapped` bytes or more, and of those on its heap.
    """

    def __init__(self, mapped: float = HEAP_BYTES) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # imports triton

        self.formulas, self.mapped = flop_registry, mapped
        self.alive: Any = WeakIdKeyDictionary()
        self.operations = self.moved = self.launches = self.peak = self.large = self.small = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.formulas:
            self.operations += self.formulas[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if not func.is_view and func.overloadpacket not in NO_KERNELS:
            self.launches += 1
            self.moved += sum(tensor.nbytes for tensor in tensors)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()  # views share it
                self.alive[storage] = storage.nbytes()
        hidden = EIGH_COPIES if func.overloadpacket == torch.ops.aten._linalg_eigh else 0
        sizes = [*self.alive.values(), *(args[0].nbytes for _ in range(hidden))]
        large = sum(size for size in sizes if size >= self.mapped)
        self.peak = max(self.peak, sum(sizes))
        self.large, self.small = max(self.large, large), max(self.small, sum(sizes) - large)
        return result

    @property
    def work(self) -> Work:
        """What was done."""
        return Work(self.operations, self.moved, self.launches)

    @property
    def resident(self) -> float:
        """What a process on a CPU occupies for these tensors."""
        return on_a_cpu(self.large, self.small)


def on_a_cpu(large: float, small: float) -> float:
    """Bytes that a process occupies for tensors that malloc maps and those on its heap, in which they leave holes."""
    return large + (1 + HOLES) * small


def memory_in_words(gpu: float, host: float, alone: float) -> str:
    """Bytes on a GPU and in the memory of its host, or on a CPU alone."""
    a, b, c = (f"{size / GIB:.2f} GiB" for size in (gpu, host, alone))
    return f"about {a} on a GPU and {b} of its host; {c} on a CPU alone"


def arithmetic(
    config: Config, module: nn.Module, shape: tuple[int, int, int], device: torch.device | None = None
) -> str:
    """The precision that construction would have on a device; None is this machine's."""
    on_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    x = torch.empty(shape, device="meta")[: config.anchors.chunk]
    device = device or torch.device("cpu" if on_cpu else "cuda")
    return effective_precision(config.run.precision, device, dict(module.named_parameters()), x)


def blocks_of(config: Config, domain: Domain) -> tuple[BlockFamily, list[list[BlockModule]], tuple[int, int, int]]:
    """The family of the base, its blocks kind by kind, and the shape of the anchors of a unit; all without weights."""
    part = anchored_part(config, domain)
    family = domain.family(config.model, part)
    kinds = list(by_kind(family.modules(domain.skeleton(config.model))))
    return family, kinds, config.anchors.shape(*domain.token_shape(config.model, part))


def largest_of(kinds: Iterable[Sequence[BlockModule]]) -> nn.Module:
    """The block that has most weights."""
    return max((group[0].module for group in kinds), key=size_of)


def memory_of_construction(config: Config, domain: Domain) -> Memory:
    """What a unit of construction takes."""
    family, kinds, shape = blocks_of(config, domain)
    precision = arithmetic(config, largest_of(kinds), shape)
    modules = [group[0].module for group in kinds]
    ledgers = [cost_of_step(family.pure(module), module, shape, config, precision)[1] for module in modules]
    return construction_memory(max(ledgers, key=lambda ledger: ledger.peak), largest_of(kinds), shape)


def construction_memory(step: "Ledger", module: nn.Module, shape: tuple[int, int, int]) -> Memory:
    """The same of a step's ledger."""
    return Memory(step.peak, host_of_construction(module, shape[2], 4 * math.prod(shape)), step.resident)


def memory_of_adaptation(config: Config, domain: Domain) -> Memory:
    """What the adaptation of a block takes."""
    family, kinds, shape = blocks_of(config, domain)
    return adaptation_memory(config, family, largest_of(kinds), shape)


def adaptation_memory(config: Config, family: BlockFamily, module: nn.Module, shape: tuple[int, int, int]) -> Memory:
    """The same of a block."""
    step, anchors = cost_of_fit(family.pure(module), module, shape, config), 4 * math.prod(shape)
    warm = config.adapt.for_start(config.start.method).warm_start == "regmean"
    closed = memory_of_warm_start(module, 2 * len(config.tasks) * anchors) if warm else 0
    return Memory(max(step.peak, closed), 2 * size_of(module) + 2 * anchors, max(step.resident, closed))


def size_of(module: nn.Module) -> int:
    """Bytes of its parameters in float32."""
    return sum(p.numel() for p in module.parameters()) * 4


def blank(like: Params) -> Params:
    """Float32 tensors of the same shapes, without memory."""
    return {name: torch.empty(p.shape, device="meta") for name, p in like.items()}


def cost_of_step(
    block: Block, module: nn.Module, shape: tuple[int, int, int], config: Config, precision: str
) -> tuple[Work, Ledger]:
    """Work and memory of a construction step of one unit; two chunks stand for all."""
    tasks = len(config.tasks) if config.anchors.together != "no" else 1
    forward = forward_in(precision)
    shape = (shape[0] * tasks, *shape[1:])
    number = min(2 * (config.anchors.chunk or shape[0]), shape[0])
    like = dict(module.named_parameters())
    with Ledger() as ledger, sdpa_kernel(SDPBackend.MATH):
        x, *_others = (torch.empty(shape, device="meta") for _ in range(6))  # first, best, gradient, two moments
        theta_0, theta_t, tau, *_ahead = (blank(like) for _ in range(5))  # those of the next unit are read meanwhile
        _ahead += [blank(like) for _ in range(5 * (tasks - 1))]  # θ_t and τ, the same in one stack, θ_t of the next
        settings = {"distance": config.anchors.distance, "chunk": config.anchors.chunk, "forward": forward}
        matching_gradient(MatchingProblem(block, theta_0, theta_t, tau), x[:number], **settings)
    return ledger.work * (shape[0] / number / tasks), ledger


def cost_of_fit(block: Block, module: nn.Module, shape: tuple[int, int, int], config: Config) -> Ledger:
    """Memory of an adaptation step."""
    settings = config.adapt.for_start(config.start.method)
    like, tasks = dict(module.named_parameters()), len(config.tasks)
    vectors = tasks if config.has_coefficients_per_task else 1
    weights = config.start.method == PRETRAINED
    with Ledger() as ledger:
        held = [torch.empty((tasks * shape[0], *shape[1:]), device="meta") for _ in range(4)]  # in lists, and joined
        theta_0 = blank(like)
        if weights:
            start = own_weights(theta_0)
            held += [moment for _ in range(2) for moment in blank(start.params).values()]  # of torch's Adam
        else:
            start = coefficients(theta_0, (blank(like) for _ in range(vectors)), [1.0] * vectors)
        del theta_0
        params = as_leaf_tensors(start.params)
        step = (lambda lr: None) if weights else start.make_optimizer(params, BETAS)
        x_ATD, y_ATD = (torch.empty((settings.batch_size, *shape[1:]), device="meta") for _ in range(2))
        DISTANCES[settings.distance](block(start.build(params), x_ATD), y_ATD).backward()
        step(settings.lr)
    return ledger


def memory_of_warm_start(module: nn.Module, held: int) -> int:
    """Bytes while adapt.warm_start is solved for the matrix that needs most: those held, four blocks in float32 (θ and
    what moves it, θ_t, τ), and in float64 the sums of all matrices, the eigenvectors and products of one.
    """
    matrices = [p.shape for p in module.parameters() if p.ndim == 2]
    sums = sum(8 * (rows * width + width**2) for rows, width in matrices)
    solved = max((8 * ((1 + EIGH_COPIES) * width**2 + 2 * rows * width) for rows, width in matrices), default=0)
    return held + 4 * size_of(module) + sums + solved


def host_of_construction(module: nn.Module, width: int, anchors: int) -> int:
    """Host memory beside a GPU: a block and its mapped file, or the rows that anchors are drawn from, thrice."""
    rows = sum(p.numel() * 4 for p in module.parameters() if p.ndim == 2 and p.shape[1] == width)
    return max(2 * size_of(module), 3 * rows) + 2 * anchors
