"""Choices refused by name, before anything is opened."""

from common.config import PRETRAINED, Config, Model
from common.core.blocks import BlockFamily
from common.core.errors import InputError
from common.domain import Domain
from common.merging.registry import METHODS, check_hyper, method_choices


def check_data(config: Config, domain: Domain, method: str) -> None:
    """InputError if a merge method that uses inputs of the tasks cannot have any."""
    if domain.calibration_task is None:
        raise InputError(f"{method} needs data of the tasks; {domain.NAME} has none for it")
    for task in config.tasks:
        if task not in config.tests.values():
            raise InputError(f"{method} needs data of every task, but eval.tests has no test set of {task}")


def check_choices(config: Config, domain: Domain) -> BlockFamily:
    """The family of the config; InputError naming the choices where a task, family or method is none of them."""
    if config.domain != domain.NAME:
        raise InputError(f"this is the command of {domain.NAME}, the config is of domain {config.domain}")
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise InputError("tasks must name at least one task, and none twice")
    for test in config.tests:
        if test not in domain.TASKS:
            raise InputError(f"unknown task {test!r}; choose from {', '.join(domain.TASKS)}")
        if config.eval.split != "test" and not hasattr(domain.TASKS[test], "train_split"):
            raise InputError(f"eval.split is {config.eval.split}, but {test} has no training set to cut from")
    named = [test for task in config.tasks for test in config.eval.tests.get(task, [task])]
    if len(named) > len(config.tests):
        raise InputError(f"eval.tests names one test set for two tasks: {', '.join(named)}")
    for task in config.eval.tests:
        if task not in config.tasks:
            raise InputError(f"eval.tests names the task {task!r}; tasks are {', '.join(config.tasks)}")
    family = config.model.family_of(domain.FAMILIES)
    if family not in domain.FAMILIES:
        raise InputError(f"unknown model.family {family!r}; choose from {', '.join(domain.FAMILIES)}")
    for name in ("vocabulary", "dtype", "tokenizers"):
        if not domain.FAMILIES[family].vocabulary and getattr(config.model, name) != getattr(Model(), name):
            raise InputError(f"model.{name} is for language models, not for {config.domain}")
    if config.start.checkpoint and config.start.method == PRETRAINED:
        raise InputError("start.checkpoint needs start.method to name it: the method that it was merged by, say")
    for method in sorted(
        {config.start.method, *config.compare.starts, *config.start.hyper, *config.adapt.by_start} - {PRETRAINED}
    ):
        if method == config.start.method and config.start.checkpoint:
            continue
        if method not in METHODS:
            raise InputError(f"unknown start {method!r}; choose from {', '.join((PRETRAINED, *method_choices()))}")
        if METHODS[method].data:
            check_data(config, domain, method)
        check_hyper(method, config.start.hyper.get(method, {}), len(config.tasks))
    if config.anchors.together != "no" and config.anchors.chunk:
        raise InputError("anchors.together has all anchors of all tasks in memory; anchors.chunk cannot be set with it")
    positive = {
        "anchors": ("number", "chunk", "tokens", "lr", "stop_loss", "patience"),
        "adapt": ("lr", "epochs", "batch_size"),
        "eval": ("batch_size",),
    }
    for section, names in positive.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            if value is not None and value <= 0 and not (name == "epochs" and config.adapt.warm_start != "none"):
                raise InputError(f"{section}.{name} is {value}; it must be above zero")
    if config.adapt.for_start(config.start.method).speedup < 1:
        raise InputError("adapt.speedup divides the epochs; it must be at least 1")
    return domain.FAMILIES[family]
