"""The dry run: what a config would read, make and need, from headers alone."""

import math
from pathlib import Path

import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.blocks import BlockFamily
from common.checkpoints import Checkpoint
from common.config import Config, as_dict
from common.errors import InputError
from common.experiment import Domain, check_choices
from common.matching import Block, induced_gradient, matching_loss
from common.merged import result_dir
from common.task_vectors import Params


def describe(config: Config, domain: Domain) -> str:
    """The resolved config, every input as found or missing, the outputs, and what the work needs."""
    family = check_choices(config, domain)
    settings = yaml.safe_dump({k: v for k, v in as_dict(config).items() if k != "dry_run"}, sort_keys=False)
    return "\n".join(
        [settings, "Inputs", *inputs(config), "", "Outputs", *outputs(config), "", *needs(config, domain, family)]
    )


def inputs(config: Config) -> list[str]:
    """One line for each checkpoint and data set."""
    lines = [checkpoint_line("base", config.model.path("base"))]
    lines += [checkpoint_line(f"expert {task}", config.model.path("expert", task)) for task in config.tasks]
    if config.start.checkpoint:
        lines.append(checkpoint_line("start", Path(config.start.checkpoint).expanduser()))
    if config.model.text:
        lines.append(checkpoint_line("text tower", config.model.path("text")))
    for task in config.tasks:
        if config.model.head:
            found = config.model.path("head", task).is_file()
            lines.append(f"  {'found' if found else 'to be made':10} head {task}: {config.model.path('head', task)}")
    for test in config.tests:
        folder = Path(config.eval.data).expanduser() / test
        lines.append(f"  {'found' if folder.is_dir() else 'from hub':10} data {test}: {folder}")
    return lines


def checkpoint_line(what: str, path: Path) -> str:
    """Whether a checkpoint is there and whole."""
    try:
        shapes = Checkpoint(path).shapes
        return f"  {'found':10} {what}: {path} ({len(shapes)} tensors)"
    except InputError as error:
        return f"  {'MISSING':10} {what}: {error}"


def outputs(config: Config) -> list[str]:
    """The folders that would be written, and whether something is there already."""
    folders = [config.run.dir / "anchors" / config.anchors.init, result_dir(config)]
    if config.start.method != "pretrained" and not config.start.checkpoint:
        folders.append(config.run.dir / "merged" / config.start.method)
    return [f"  {'exists' if f.exists() else 'to be made':10} {f}" for f in folders]


def needs(config: Config, domain: Domain, family: BlockFamily) -> list[str]:
    """Units, disk, memory and arithmetic, counted on one block without weights (the meta device)."""
    try:
        skeleton = domain.skeleton(config.model)
        modules = family.modules(skeleton)
        tokens, width = domain.token_shape(config.model)
    except InputError as error:
        return [f"Needs: not known yet ({error})"]
    shape = (config.anchors.number, config.anchors.tokens or tokens, width)
    theta = {name: torch.empty_like(p, dtype=torch.float32) for name, p in modules[0].named_parameters()}
    weights = sum(p.numel() for p in theta.values()) * 4
    anchors = math.prod(shape) * 4
    block, chunk = family.pure(modules[0]), min(config.anchors.chunk or shape[0], shape[0])
    operations, saved = cost_of_step(block, theta, shape, chunk)
    blocks = len(config.run.blocks or modules)
    units = blocks * len(config.tasks)
    settings = config.adapt.for_start(config.start.method)
    trained = len(config.tasks) if config.start.method == "ta" and settings.per_task else 1
    sizes = [p.numel() for p in skeleton.parameters()]
    dtype = getattr(torch, config.model.dtype or "float32")
    rows = {
        "block": f"{weights / 2**20:.0f} MiB in {len(theta)} tensors, {len(modules)} blocks",
        "anchors of a unit": f"{' x '.join(map(str, shape))}, {anchors / 2**20:.1f} MiB",
        "construct": f"{units} units of {config.anchors.steps} steps, {operations / 1e9:.1f} GFLOP a step, "
        f"{operations * units * (config.anchors.steps + 1) / 1e15:.2f} PFLOP in all",
        "construct, memory": f"about {(3 * weights + saved) / 2**30:.2f} GiB on the device",
        "construct, disk": f"{anchors * units / 2**30:.2f} GiB",
        "adapt": f"{blocks} units of {settings.epochs} epochs, {len(config.tasks) * shape[0]} anchors each",
        "adapt, memory": f"about {(weights * (2 + 6 * trained) + 3 * anchors * len(config.tasks)) / 2**30:.2f} GiB "
        "on the device, and a batch's activations",
        "merge, memory": f"about {(2 * len(config.tasks) + 3) * 4 * max(sizes) / 2**30:.2f} GiB for the largest tensor",
        "merge, disk": f"{sum(sizes) * dtype.itemsize / 2**30:.2f} GiB a model in {dtype}",
    }
    return ["Needs", *(f"  {what:18} {much}" for what, much in rows.items())]


def cost_of_step(block: Block, theta: Params, shape: tuple[int, int, int], chunk: int) -> tuple[int, int]:
    """Multiply-add operations (2 each) of a construction step, and bytes kept for the second derivative of a chunk."""
    kept: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    # no leaf: the counter hooks into inputs
    x = torch.empty((chunk, *shape[1:]), device="meta", requires_grad=True) * 1
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        sdpa_kernel(SDPBackend.MATH),
    ):
        loss_P = matching_loss(block, theta, theta, theta, x)
        torch.autograd.grad(loss_P.sum(), x)
    with FlopCounterMode(display=False) as once_more:
        if chunk < shape[0]:
            induced_gradient(block, theta, theta, theta, x.detach(), "cos")
    operations = counter.get_total_flops() + once_more.get_total_flops()
    return operations * shape[0] // chunk, sum(kept.values())
