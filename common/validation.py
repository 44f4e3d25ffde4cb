"""Choices refused by name. Each check raises InputError with the choices there are, or with what rules one out."""

from importlib.util import find_spec

from common.config import PRETRAINED, Config, Model, Run
from common.core.blocks import BlockFamily
from common.core.errors import InputError
from common.domain import FOLDERS, Domain, scored_tests
from common.io.checkpoints import Checkpoint
from common.io.matched import Matching
from common.merging.registry import METHODS, check_hyper, method_choices

POSITIVE = {
    "anchors": ("number", "chunk", "tokens", "lr", "stop_loss", "patience"),
    "adapt": ("lr", "epochs", "batch_size"),
    "eval": ("batch_size",),
}


def check_choices(config: Config, domain: Domain) -> None:
    """Refuse every choice that the domain, the registry of methods or another choice rules out."""
    check_domain(config, domain.NAME)
    check_tasks(config)
    check_tests(config, domain)
    check_language_options(config, domain)
    check_starts(config, domain)
    check_settings(config)
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


def check_tests(config: Config, domain: Domain) -> None:
    """Test sets that are scored exist, belong to one task each, and have the split that is asked for."""
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


def check_language_options(config: Config, domain: Domain) -> None:
    """Options of language models go with one."""
    if domain.NAME == "nlg":
        return
    for option in ("vocabulary", "dtype", "tokenizers"):
        if getattr(config.model, option) != getattr(Model(), option):
            raise InputError(f"model.{option} is for language models, not for {config.domain}")
    if config.eval.dtype:
        raise InputError(f"eval.dtype is for language models, not for {config.domain}")


def check_starts(config: Config, domain: Domain) -> None:
    """Every start that the config names exists, and its hyperparameters and data do."""
    start = config.start
    if start.checkpoint and start.method == PRETRAINED:
        raise InputError("start.checkpoint needs start.method to name it: the method that it was merged by, say")
    for method in sorted({start.method, *config.compare.starts, *start.hyper, *config.adapt.by_start} - {PRETRAINED}):
        if method == start.method and start.checkpoint:
            continue
        if method not in METHODS:
            raise InputError(f"unknown start {method!r}; choose from {', '.join((PRETRAINED, *method_choices()))}")
        if METHODS[method].data:
            check_data(config, domain, method)
        check_hyper(method, start.hyper.get(method, {}), len(config.tasks))


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
    for section, names in POSITIVE.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            if value is not None and value <= 0 and not (name == "epochs" and config.adapt.warm_start != "none"):
                raise InputError(f"{section}.{name} is {value}; it must be above zero")
    if config.adapt.for_start(config.start.method).speedup < 1:
        raise InputError("adapt.speedup divides the epochs; it must be at least 1")


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
    for task, (token, own, merged) in matching.moved.items():
        if config.run.score or task in config.model.tokenizers:
            raise InputError(
                f"the tokenizer of {task} in {config.model.path('expert', task)} has {token!r} as number {own}, the "
                f"merged model has it as {merged}: set run.score false and leave {task} out of model.tokenizers"
            )


def check_positions(family: BlockFamily, base: Checkpoint, tokens: int, width: int) -> None:
    """InputError if position embeddings cannot be added to anchors of T tokens and width D."""
    shape = base.shapes.get(family.positions)
    if shape is None:
        raise InputError("anchors.position_embeddings is on, but the models have none")
    if shape[0] < tokens or shape[1] != width:
        raise InputError(f"anchors.position_embeddings: {family.positions} is {shape}, anchors are {(tokens, width)}")
