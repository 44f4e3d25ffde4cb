"""The dry run: what a config would read, make and need, from headers alone."""

import math
from pathlib import Path

import torch
import yaml

from common.config import Config, as_dict
from common.core.blocks import BlockFamily
from common.core.errors import InputError
from common.domain import Domain, block_family
from common.fda.adaptation import shortened
from common.io.adapters import is_adapter, open_adapter
from common.io.checkpoints import Checkpoint
from common.layout import RunLayout
from common.planning.cost import (
    GIB,
    arithmetic,
    cost_of_fit,
    cost_of_step,
    host_of_construction,
    in_words,
    memory_of_merge,
    memory_of_warm_start,
    memory_with_data,
    size_of,
)
from common.validation import check_choices


def describe(config: Config, domain: Domain) -> str:
    """The resolved config, every input as found or missing, the outputs, and what the work needs."""
    check_choices(config, domain)
    family = block_family(domain, config.model)
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
        adapter = what.startswith("expert") and is_adapter(path)
        opened = open_adapter(path)[1] if adapter else Checkpoint(path)
        kind = "LoRA adapter, " if adapter else f"{opened.found}, " if path.is_dir() else ""
        return f"  {'found':10} {what}: {path} ({kind}{len(opened.shapes)} tensors)"
    except InputError as error:
        return f"  {'MISSING':10} {what}: {error}"


def outputs(config: Config) -> list[str]:
    """The folders that would be written, and whether something is there already."""
    layout = RunLayout(config)
    folders = [layout.anchor_folder, layout.adapted]
    if config.start.method != "pretrained" and not config.start.checkpoint:
        folders.append(layout.start)
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
    anchors, blocks = math.prod(shape) * 4, len(config.run.blocks or modules)
    units = blocks * len(config.tasks)
    precision = arithmetic(config, modules[0], shape)
    operations, construction = cost_of_step(family.pure(modules[0]), modules[0], shape, config, precision)
    adaptation = cost_of_fit(family.pure(modules[0]), modules[0], shape, config)
    dtype = getattr(torch, config.model.dtype or "float32")
    merged = {n: tuple(p.shape) for n, p in sorted(skeleton.named_parameters()) if n.startswith(family.scope)}
    weights = list(map(math.prod, merged.values()))
    passing = 2 * 4 * max(weights)  # on its way from one file into another: as it is read, and as it is stored
    settings = config.adapt.for_start(config.start.method)
    epochs = shortened(settings.epochs, settings.speedup)
    warm = settings.warm_start == "regmean"
    closed = memory_of_warm_start(modules[0], 2 * len(config.tasks) * anchors) if warm else 0
    rows = {
        "block": f"{size_of(modules[0]) / 2**20:.0f} MiB in {len(list(modules[0].parameters()))} tensors, "
        f"{len(modules)} blocks",
        "anchors of a unit": f"{' x '.join(map(str, shape))}, {anchors / 2**20:.1f} MiB",
        "construct": f"{units} units of {config.anchors.steps} steps, {operations / 1e9:.1f} GFLOP a step, "
        f"{operations * units * (config.anchors.steps + 1) / 1e15:.2f} PFLOP in all",
        "construct, in": precision,
        "construct, memory": in_words(
            construction.peak, host_of_construction(modules[0], width, anchors), construction.resident
        ),
        "construct, disk": f"{anchors * units / GIB:.2f} GiB",
        "adapt": f"{blocks} units of {epochs} epochs, {len(config.tasks) * shape[0]} anchors each",
        "adapt, memory": in_words(
            max(adaptation.peak, closed),
            max(2 * size_of(modules[0]) + 2 * anchors, passing),
            max(adaptation.resident, closed),
        ),
        **memory_of_merge(config, merged, f"{family.blocks}.", passing),
        **memory_with_data(config, sum(weights)),
        "merge, disk": f"{sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize / GIB:.2f} GiB "
        f"a model in {dtype}",
        "libraries": "about 0.9 GiB of host memory besides",
    }
    return ["Needs", *(f"  {what:18} {much}" for what, much in rows.items())]


# ---- memory ----------------------------------------------------------------------------------------------------------
