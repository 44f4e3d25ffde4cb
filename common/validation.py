"""Choices refused by name. Each check raises InputError with the choices there are, or with what rules one out."""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.config import PRETRAINED, Adapt, Anchors, Config, Model, Run, as_dict
from common.core.annotations import require_finite
from common.core.blocks import BlockFamily, BlockModule
from common.core.errors import InputError
from common.core.fused import APART, fused_tensors
from common.core.places import leads_out, require_part_of_name
from common.domain import FOLDERS, Domain, anchored_part, scored_tests
from common.io.adapters import is_adapter, open_adapter
from common.io.checkpoints import Checkpoint
from common.io.matched import Matching
from common.io.paper_tables import paper_table
from common.merging.registry import every_row, method_choices
from common.merging.starts import JOINED, chain_of, check_hyper, check_hyper_of, hyper_of
from common.run.device import check_device

MISSING = "MISSING"
POSITIVE = {
    "anchors": ("number", "chunk", "tokens", "scale", "lr", "stop_loss", "patience"),
    "eval": ("batch_size", "limit"),
}
NOT_NEGATIVE = {"anchors": ("steps",), "eval": ("workers",)}


def check_choices(config: Config, domain: Domain) -> None:
    """Refuse every choice that the domain, the registry of methods or another choice rules out."""
    check_domain(config, domain.NAME)
    require_finite(as_dict(config))
    check_tasks(config)
    check_tests(config, domain)
    check_language_options(config, domain)
    check_part(config, domain)
    check_starts(config, domain)
    check_settings(config)
    check_name(config.run.name)
    check_engine(config.run)


def check_domain(config: Config, name: str) -> None:
    """A recipe is of one domain, and so must the config be."""
    if config.domain != name:
        recipes = f"the commands for it are in {FOLDERS[config.domain]}/"
        raise InputError(f"this is the command of {name}, the config is of domain {config.domain}; {recipes}")


def check_tasks(config: Config) -> None:
    """There is a task, and none twice."""
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise InputError("tasks must name at least one task, and none twice")
    for task in config.model.experts:
        if task not in config.tasks:
            raise InputError(f"model.experts names the task {task!r}; tasks are {', '.join(config.tasks)}")
    for task in (*config.tasks, *config.model.heads, *config.model.tokenizers):
        if leads_out(task):
            raise InputError(f"the task {task!r} must be the name of a folder below the run's, where its files lie")


def check_tests(config: Config, domain: Domain) -> None:
    """Test sets that are scored exist, belong to one task each, and have the split that is asked for; the paper has the
    table that is named."""
    for test in scored_tests(config, domain):
        if test not in domain.TASKS:
            raise InputError(f"eval.tests: unknown test set {test!r}; choose from {', '.join(domain.TASKS)}")
        if config.eval.split != "test" and domain.TASKS[test].train_split is None:
            raise InputError(f"eval.split is {config.eval.split}, but {test} has no training set to cut from")
    named = [test for task in config.tasks for test in config.eval.tests.get(task, [task])]
    if len(named) > len(config.tests):
        raise InputError(f"eval.tests names one test set for two tasks: {', '.join(named)}")
    for task in config.eval.tests:
        if task not in config.tasks:
            raise InputError(f"eval.tests names the task {task!r}; tasks are {', '.join(config.tasks)}")
    paper_table(config.eval.paper_table)


def check_test_data(config: Config, domain: Domain, always: bool = False) -> None:
    """Whatever models are scored on has a folder, or a data set on the hub; where run.score is off only if `always`."""
    for test in scored_tests(config, domain) if config.run.score or always else ():
        if where_from(config, domain, test) == MISSING:
            folder = Path(config.eval.data).expanduser() / test
            raise InputError(
                f"no data for {test}: there is no folder {folder}, which would do, and tasks.yaml names no data set of "
                "the hub for it; run.score false leaves the scores out"
            )


def where_from(config: Config, domain: Domain, test: str) -> str:
    """Whether the examples of a test set are found in a folder, come from the hub, or are missing."""
    if (Path(config.eval.data).expanduser() / test).is_dir():
        return "found"
    return "from hub" if domain.TASKS[test].hub else MISSING


def check_language_options(config: Config, domain: Domain) -> None:
    """Options of language models go with one, and those of others do not."""
    if domain.NAME == "nlg":
        if config.model.heads:
            raise InputError("model.heads is for text encoders and image classifiers, not for nlg; leave it out")
        return
    for option in ("vocabulary", "dtype", "tokenizers"):
        if getattr(config.model, option) != getattr(Model(), option):
            raise InputError(f"model.{option} is for language models, not for {config.domain}")
    if config.eval.dtype:
        raise InputError(f"eval.dtype is for language models, not for {config.domain}")


def check_part(config: Config, domain: Domain) -> None:
    """What is to be anchored of a layer is something that the domain can anchor."""
    if anchored_part(config, domain) not in domain.PARTS:
        can = " or ".join(domain.PARTS)
        raise InputError(f"anchors.part is {config.anchors.part}; what is anchored in {domain.NAME} is the {can}")


def check_starts(config: Config, domain: Domain) -> None:
    """Every start that the config names exists, and its hyperparameters and data do."""
    start = config.start
    if start.checkpoint and start.method == PRETRAINED:
        raise InputError("start.checkpoint needs start.method to name it: the method that it was merged by, say")
    if start.checkpoint:
        require_part_of_name("start.method", start.method)
    for key in sorted(start.hyper):
        if JOINED in key:
            raise InputError(f"start.hyper.{key}: hyperparameters are given by part, under each of {key.split(JOINED)}")
        if key in every_row() and key != start.method:
            check_hyper_of(key, start.hyper[key], len(config.tasks))
    named = dict.fromkeys(start.hyper.keys() - every_row().keys(), "start.hyper")
    named |= dict.fromkeys(config.adapt.by_start, "adapt.by_start")
    named |= {**dict.fromkeys(config.compare.starts, "compare.starts"), start.method: "start.method"}
    for method in sorted(named.keys() - ({PRETRAINED, start.method} if start.checkpoint else {PRETRAINED})):
        if JOINED not in method and method not in every_row():
            known = (PRETRAINED, *method_choices())
            near = "".join(f"; did you mean {each}?" for each in get_close_matches(method, known, 1))
            raise InputError(f"{named[method]}: unknown start {method!r}; choose from {', '.join(known)}{near}")
        if chain_of(method).row.data:
            check_data(config, domain, chain_of(method).method)
        check_hyper(method, hyper_of(method, start.hyper), len(config.tasks))


def check_data(config: Config, domain: Domain, method: str) -> None:
    """A merge method that uses inputs of the tasks can have some of each."""
    if domain.calibration_task is None:
        raise InputError(f"{method} needs data of the tasks; {domain.NAME} has none for it")
    for task in config.tasks:
        if task not in scored_tests(config, domain).values():
            raise InputError(
                f"{method} needs data of every task, and there is no test set for {task}; eval.tests can name one"
            )


def check_settings(config: Config) -> None:
    """Numbers are in range, and settings go together."""
    if config.anchors.together != "no" and config.anchors.chunk:
        raise InputError("anchors.together has all anchors of all tasks in memory; anchors.chunk cannot be set with it")
    check_snapshots(config.anchors)
    for section, names in POSITIVE.items():
        require_positive(section, getattr(config, section), names)
    for section, names in NOT_NEGATIVE.items():
        require_not_negative(section, getattr(config, section), names)
    for name, one in {"starts": "a start", "inits": "an initialisation", "seeds": "a seed"}.items():
        named = getattr(config.compare, name)
        if len(set(named)) < len(named):
            raise InputError(f"compare.{name} names {one} twice: {', '.join(map(str, named))}")
    if config.run.blocks is not None and not config.run.blocks:
        raise InputError("run.blocks names no block; leave it out to work on all")
    if config.run.blocks and len(set(config.run.blocks)) < len(config.run.blocks):
        raise InputError(f"run.blocks names a block twice: {config.run.blocks}")
    check_device(config.run.device)
    check_adapt("adapt", config.adapt)
    for start in config.adapt.by_start:
        check_adapt(f"adapt.by_start.{start}", config.adapt.for_start(start))


def check_snapshots(anchors: Anchors) -> None:
    """Snapshots are of steps that there are, each once, and of anchors that are made here."""
    steps = anchors.snapshots
    if len(set(steps)) < len(steps) or any(not 0 <= step <= anchors.steps for step in steps):
        raise InputError(
            f"anchors.snapshots must name steps from 0 to anchors.steps, {anchors.steps}, none twice: {steps}"
        )
    if steps and anchors.source:
        raise InputError("anchors.snapshots are kept while anchors are made, and those of anchors.source are made")


def check_adapt(where: str, adapt: Adapt) -> None:
    """The settings of an adaptation are in range; `where` is their address in the config."""
    require_part_of_name(f"{where}.label", adapt.label)
    require_positive(where, adapt, ("lr", "batch_size", *([] if adapt.warm_start != "none" else ["epochs"])))
    require_not_negative(where, adapt, ("epochs", "ridge"))
    if adapt.speedup < 1:
        raise InputError(f"{where}.speedup divides the epochs; it must be at least 1")
    if adapt.ridge and adapt.warm_start == "none":
        raise InputError(f"{where}.ridge is of the closed form: set {where}.warm_start regmean, or leave it at 0")
    if not 0 <= adapt.blend <= 1:
        raise InputError(f"{where}.blend is {adapt.blend}; it goes from 0, the start, to 1, the adapted model")


def require_positive(where: str, section: Any, names: Iterable[str]) -> None:
    """InputError if one of these fields of a section is set, but not above zero."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value <= 0:
            raise InputError(f"{where}.{name} is {value}; it must be above zero")


def require_not_negative(where: str, section: Any, names: Iterable[str]) -> None:
    """InputError unless these fields of a section are zero or more."""
    for name in names:
        value = getattr(section, name)
        if value < 0:
            raise InputError(f"{where}.{name} is {value}; it must be zero or more")


def check_name(name: str) -> None:
    """The folder of a run lies in that of all runs, and is not it."""
    if leads_out(name):
        raise InputError(f"run.name is {name!r}; it must name a folder below run.root, the folder of all runs")


def check_engine(run: Run) -> None:
    """What does the work is there, and is told nothing that is for another."""
    if run.workers is not None and run.workers < 1:
        raise InputError(f"run.workers is {run.workers}; it must be at least 1")
    if run.engine != "ray":
        for option in ("gpus_per_unit", "address"):
            if getattr(run, option) != getattr(Run(), option):
                raise InputError(f"run.{option} is for run.engine ray, not for {run.engine}")
    elif not find_spec("ray"):
        raise InputError("run.engine is ray, and Ray is not installed; pip install -e '.[cluster]' adds it")
    share = run.gpus_per_unit
    if share is not None and (share < 0 or (share > 1 and share % 1)):
        raise InputError(f"run.gpus_per_unit is {share:g}; it must be a part of one GPU or a whole number of them")


def check_tokenizers(config: Config, matching: Matching) -> None:
    """InputError if an expert's tokenizer is to be used with the merged model, but numbers a token in another way."""
    method = config.start.method
    uses_data = (JOINED in method or method in every_row()) and chain_of(method).row.data
    for task, (token, own, merged) in matching.moved.items():
        if config.run.score or uses_data or task in (*config.model.tokenizers, *config.model.heads):
            raise InputError(
                f"the tokenizer of {task} in {config.model.path('expert', task)} has {token!r} as number {own}, the "
                f"merged model has it as {merged}: set run.score false, leave {task} out of model.tokenizers and "
                "model.heads, and take a start.method without data"
            )


def check_positions(family: BlockFamily, base: Checkpoint, tokens: int, width: int) -> None:
    """InputError if position embeddings cannot be added to anchors of T tokens and width D."""
    shape = base.shapes.get(family.positions)
    if shape is None:
        raise InputError("anchors.position_embeddings is on, but the models have none")
    if shape[0] < tokens or shape[1] != width:
        raise InputError(f"anchors.position_embeddings: {family.positions} is {shape}, anchors are {(tokens, width)}")


def check_fused(config: Config, modules: Iterable[BlockModule]) -> None:
    """InputError if model.fuse_qkv is on and a block has no q, k and v that are apart."""
    for prefix, module in modules if config.model.fuse_qkv else ():
        if not fused_tensors(dict(module.named_parameters())):
            raise InputError(
                f"model.fuse_qkv: {prefix[:-1]} has no q, k and v in tensors of their own "
                f"({', '.join('/'.join(names) for names in APART)}) that could be fused; leave it off"
            )


def check_is_there(path: Path, task: str, domain: Domain) -> None:
    """InputError if there is no expert at a path: it names the path, and the test sets that may have been meant."""
    try:
        open_adapter(path) if is_adapter(path) else Checkpoint(path)
    except InputError as error:
        meant = get_close_matches(task, domain.TASKS, cutoff=0.7)
        if path.exists() or task in domain.TASKS or not meant:
            raise
        raise InputError(f"{error}; is the task {task!r} misspelt? close to it: {', '.join(meant)}") from error
