"""`merge`, `construct` and `adapt`: a config from their arguments, and then what a command with it does."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

from torch import nn

from common import pipeline
from common.api.anchor_set import AnchorSet
from common.api.modules import (
    OF_OPEN_CLIP,
    ModelLike,
    check_computes_as,
    domain_of,
    like_base,
    model_section,
    named_as_given,
    require_experts,
    require_model,
)
from common.config import Adapt, Anchors, Compare, Config, Eval, Model, Run, Start
from common.core.errors import InputError
from common.domain import FOLDERS, Domain, module_of
from common.layout import RunLayout
from common.run.device import own_settings
from common.validation import check_choices

Folder = str | Path | None


class Prepared(NamedTuple):
    """A config whose models are on disk, its domain, and the temporary folder that the run is in, if it is."""

    config: Config
    domain: Domain
    keeper: TemporaryDirectory | None


def merge(
    base: ModelLike,
    experts: Mapping[str, ModelLike],
    method: str | Start,
    *,
    folder: Folder = None,
    domain: str = "",
    model: Model = Model(),
    eval: Eval = Eval(),
    device: str = Run.device,
) -> nn.Module | Path:
    """Merge in parameter space, as scripts/merge.py does.

    Args:
        base: The pretrained model: a module of transformers or open_clip, or a path or place as model.base has it.
        experts: {task: module or place} of its fine-tuned copies; a module brings no tokenizer, and rows of its
            embedding are matched by their number.
        method: A merge method by its name; Start(method, hyper={method: {...}}) for other hyperparameters.
        folder: Folder of the run, which stays: with a command's layout, and its checks of what is there already.
            None: a temporary one.
        domain: vision, nlu or nlg; found from the base where it tells.
        model: Options of the section `model`; of open_clip's modules arch must be named.
        eval: Where the data are, for methods that use some.
        device: As run.device.
    Returns: A module like the base; the folder of the merged checkpoint if the base is a place, which needs `folder`.
    Raises: InputError, as a command says it.
    """
    start = method if isinstance(method, Start) else Start(method)
    run = Run(device=device, score=False)
    with prepared(base, experts, domain, folder, model, start=start, eval=eval, run=run) as ready:
        return result(base, folder, ready, pipeline.merge_alone)


def construct(
    base: ModelLike,
    experts: Mapping[str, ModelLike],
    anchors: Anchors = Anchors(),
    *,
    folder: Folder = None,
    domain: str = "",
    model: Model = Model(),
    seed: int = Run.seed,
    precision: Any = Run.precision,
    device: str = Run.device,
) -> AnchorSet:
    """Box 1: make anchors for every block and task, as construct_fda.py does.

    Args: As `merge` has them; anchors, seed and precision as the config has them.
    Returns: {task: [x_ATD of each block]}, which `adapt` takes. They lie in the run's folder, a temporary one as long
        as something refers to them.
    Raises: InputError, as a command says it.
    """
    run = Run(seed=seed, precision=precision, device=device, score=False)
    with prepared(base, experts, domain, folder, model, anchors=anchors, run=run) as ready:
        pipeline.construct(ready.config, ready.domain)
        return AnchorSet(ready.config, ready.keeper)


def adapt(
    base: ModelLike,
    experts: Mapping[str, ModelLike],
    anchors: AnchorSet | str | Path,
    start: str | Start = Start(),
    adapt: Adapt = Adapt(),
    *,
    folder: Folder = None,
    domain: str = "",
    model: Model = Model(),
    eval: Eval = Eval(),
    seed: int | None = None,
    device: str = Run.device,
) -> nn.Module | Path:
    """Box 2: fit the merged blocks to the experts' outputs on the anchors, as adapt.py does.

    Args: As `merge` has them, and
        anchors: What `construct` made of these models; or where anchors made elsewhere are, as anchors.source.
        start: What adaptation begins from: pretrained, or a merge method.
        adapt: How it trains, as the config has it.
        seed: None: that of the anchors; 0 for anchors made elsewhere.
    Returns: As `merge`.
    Raises: InputError, as a command says it; if the anchors are of other models, for one.
    """
    start = start if isinstance(start, Start) else Start(start)
    if isinstance(anchors, AnchorSet):
        settings, made = anchors.config.anchors, anchors.config.run
    elif isinstance(anchors, str | Path):
        settings, made = Anchors(source=str(anchors)), Run()
    else:
        raise InputError(f"anchors is {anchors!r}, but should be what construct made, or a place as anchors.source")
    run = replace(made, seed=made.seed if seed is None else seed, device=device, score=False)
    sections = {"anchors": settings, "start": start, "adapt": adapt, "eval": eval, "run": run}
    with prepared(base, experts, domain, folder, model, **sections) as ready:
        if isinstance(anchors, AnchorSet):
            bring(anchors, RunLayout(ready.config).anchor_folder, lasting=folder is not None)
        return result(base, folder, ready, pipeline.adapt)


@contextmanager
def prepared(
    base: ModelLike, experts: Mapping[str, ModelLike], domain: str, folder: Folder, options: Model, **sections: Any
) -> Iterator[Prepared]:
    """The config that the arguments make, its modules on disk meanwhile, its run in `folder` or a temporary one."""
    require_model(base, "base")
    require_experts(experts)
    name = domain or domain_of(base)
    if name not in FOLDERS:
        raise InputError(f"unknown domain {name!r}; choose from {', '.join(FOLDERS)}")
    of_domain = module_of(name)
    parts = {"anchors": Anchors(), "start": Start(), "adapt": Adapt(), "eval": Eval(), "compare": Compare()}
    require_sections(parts, sections | {"model": options})
    # before any module is written
    check_choices(Config(name, options, list(experts), **parts | sections), of_domain)  # type: ignore[arg-type]
    keeper = None if folder else TemporaryDirectory(prefix="fda-run-")
    place = Path(folder or keeper.name).expanduser()  # type: ignore[union-attr]
    run = replace(sections.pop("run"), name=place.name, root=str(place.parent))
    with (
        own_settings(),
        TemporaryDirectory(prefix="fda-models-") as models,
        named_as_given(base, experts, Path(models)),
    ):
        section = model_section(base, experts, options, Path(models))
        config = Config(name, section, list(experts), run=run, **parts | sections)  # type: ignore[arg-type]
        for what, each in {"base": base, **experts}.items():
            if isinstance(each, OF_OPEN_CLIP):
                check_computes_as(each, what, section, of_domain)
        yield Prepared(config, of_domain, keeper)


def require_sections(parts: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """InputError if an argument is not what the section of the config with its name is."""
    kinds = {"model": Model} | {name: type(part) for name, part in parts.items()}
    for name, kind in kinds.items():
        if name in given and not isinstance(given[name], kind):
            raise InputError(f"{name} is {given[name]!r}, but should be {kind.__name__}(...) of common.api")


def result(base: ModelLike, folder: Folder, ready: Prepared, stage: Callable[[Config, Domain], Path | None]) -> Any:
    """What a stage that merges made: a module like the base, or its folder if the base is a place."""
    if isinstance(base, nn.Module):
        if not folder and (ready.config.model.heads or ready.config.model.tokenizers):
            raise InputError("model.heads and model.tokenizers make folders beside the weights; folder= says where")
        return like_base(base, cast(Path, stage(ready.config, ready.domain)))  # of all blocks, so it is there
    if not folder:
        raise InputError("base is a place and no module, so the merged model is a folder; folder= says where")
    return stage(ready.config, ready.domain)


def bring(anchors: AnchorSet, target: Path, lasting: bool) -> None:
    """Put anchors where a run looks for its own, unless there are some; the run checks what they were made from."""
    source = RunLayout(anchors.config).anchor_folder.absolute()
    if target.exists():
        return
    if lasting:
        shutil.copytree(source, target)
    else:
        target.parent.mkdir(parents=True)
        target.symlink_to(source)
