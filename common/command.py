"""From the command line to a stage: parse, then describe or run; say in one sentence what is wrong."""

import argparse
import atexit
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader
from yaml import YAMLError

from common.config import PRESETS, Adapt, Anchors, Compare, Config, Eval, Model, Run, Start
from common.config.adapt import prefer_typed
from common.config.wrong_options import in_plain_words
from common.core.errors import InputError
from common.domain import Domain, module_of
from common.io.hub import headers_only
from common.io.yaml_files import read_yaml_file, repeats
from common.merging.registry import every_row, hyperparameters
from common.planning.dry_run import Plan, describe
from common.report.live import reported
from common.run.plain_log import told
from common.run.stages import command_stages
from common.validation import check_domain

SECTIONS = (Anchors, Start, Adapt, Eval, Compare, Run)
NO = "no"  # a choice of some options, and what YAML reads as false where it stands without quotes
READ = "experiment"  # how YAML is read here, as the library calls it


def run(
    stage: Callable[[Config, Domain], Any],
    name: str | None,
    description: str | None,
    plan: Callable[[Config, Domain], Plan] = describe,
    config: Config | None = None,
) -> None:
    """Run one stage for the config on the command line; with --dry-run print its plan.

    Args:
        stage: What is run.
        name: The domain of a recipe, which refuses a config of another one; None for a command of all domains, which
            takes the one that the config names. The domain is imported once the config is read: it brings libraries
            that --help and a wrong flag can do without.
        description: What --help says, the docstring of the command.
        plan: What --dry-run prints, and what the run would refuse.
        config: In place of that of the command line, where something else was read.

    Ends the process with status 2 on an InputError, in a dry run on each that the run would have, with 130 when
    interrupted, 143 when a batch system ends it, and with 1 on anything else, which is a bug: FDA_DEBUG=1 shows where.
    """
    with answered():
        config = config or parse(description or "")
        check_domain(config, name or config.domain)
        domain = module_of(config.domain)
        if config.dry_run:
            with headers_only():
                planned = plan(config, domain)
            print(planned.text, flush=True)
            if planned.refusals:
                raise InputError("\nerror: ".join(planned.refusals))
        else:
            with watched(config, domain):
                made = stage(config, domain)
            if isinstance(made, Path):
                print(f"the merged model is in {made}", flush=True)


@contextmanager
def watched(config: Config, domain: Domain) -> Iterator[None]:
    """While stages of a config go on, tell of their progress, keep the run's page, and note where they are
    interrupted."""
    with command_stages() as stages, told(stages, config.run.log), reported(config, domain, stages):
        try:
            yield
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(f" in {stages.reached}; what was done is kept in {config.run.dir}") from interrupt


@contextmanager
def answered() -> Iterator[None]:
    """End the process as `run` says when this ends with an error."""
    ended = []  # the signal that ended it, if one did

    def terminate(number: int, frame: Any) -> None:
        if not ended:  # a second one does not break into what the first has brought about
            ended.append(number)
            raise KeyboardInterrupt

    try:
        with on_termination(terminate):
            yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        where = next(iter(interrupt.args), "")
        print(f"interrupted{where}; the same command goes on from here", file=sys.stderr)
        leave(128 + (ended[0] if ended else signal.SIGINT))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and is_unread():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            leave(128 + signal.SIGPIPE)
        if os.environ.get("FDA_DEBUG"):
            raise
        print(f"error: {unforeseen(error)}\nFDA_DEBUG=1 in the environment shows the traceback", file=sys.stderr)
        sys.exit(1)


def is_unread() -> bool:
    """Whether standard output is a pipe whose reader has had enough, as head has after some lines."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in output.poll(0))


@contextmanager
def on_termination(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Call the handler on SIGTERM, which batch systems send before they kill; where this is not the main thread, or
    somebody else heeds it, nothing is changed."""
    free = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def leave(status: int) -> NoReturn:
    """End the process now. What has to be done at its end is done, but the libraries' modules are not taken down one by
    one, which takes two seconds of a processor."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def unforeseen(error: Exception) -> str:
    """One sentence on an error that no check foresaw: its type and message, and what was being done as far as noted."""
    doing = "; ".join(dict.fromkeys(reversed(getattr(error, "__notes__", []))))
    message = " ".join(str(error).split()) or "it says no more"
    return f"stopped{f' at {doing}' if doing else ''} by {type(error).__name__}: {message}"


class Help(DefaultHelpFormatter):
    """What --help prints, where the commands in a description keep their lines and prose is filled."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = [part.strip() for part in text.split("\n\n")]
        fill = super()._fill_text
        return "\n\n".join(p if p.startswith(("python ", "sh ")) else fill(p, width, indent) for p in paragraphs)


@cache
def answered_no() -> frozenset[str]:
    """Names of the options and hyperparameters that have NO among their choices."""
    kinds = [(field.name, field.type) for section in (Model, *SECTIONS) for field in fields(section)]
    kinds += [(name, p.annotation) for key in every_row() for name, p in hyperparameters(key).items()]
    return frozenset(name for name, kind in kinds if NO in get_args(kind))


def with_no(read: Any, chosen: bool = False) -> Any:
    """What was read of YAML, with NO in place of false where an option has that choice, as `chosen` says of this."""
    if isinstance(read, dict):
        return {key: with_no(value, key in answered_no()) for key, value in read.items()}
    if isinstance(read, list):
        return [with_no(value, chosen) for value in read]
    return NO if chosen and read is False else read


def parse(description: str, argv: list[str] | None = None) -> Config:
    """Read the command line and the YAML it names. Errors name the key and the choices, and exit with status 2."""
    words = sys.argv[1:] if argv is None else argv
    twice: list[InputError] = []  # the library tries several ways to read a text, and keeps no error of one

    def load(text: str) -> Any:
        twice.extend(repeats(text, "the command line, or a file that it names,", typed_keys(words)))
        return with_no(get_loader("yaml")(text))

    set_loader(READ, load, exceptions=(YAMLError,))
    parser = ArgumentParser(
        prog=Path(sys.argv[0]).name,
        usage="%(prog)s --config FILE [--preset NAME] [--section.field VALUE ...]",
        description=description,
        formatter_class=Help,
        allow_abbrev=False,
        exit_on_error=False,
        parser_mode=READ,
    )
    parser.add_argument("--config", action="config", help="YAML of the experiment; --preset fast is laid over it")
    parser.add_argument("--domain", type=Literal["vision", "nlu", "nlg"], required=True, help="What is merged")
    parser.add_class_arguments(Model, "model")
    tasks = "Tasks to merge, an expert each; scored are those in tasks.yaml of the domain's folder, or with eval.tests"
    parser.add_argument("--tasks", type=list[str], required=True, help=tasks)
    for section in SECTIONS:
        parser.add_class_arguments(section, section.__name__.lower())
    parser.add_argument(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="Say what would be read, made and needed; read headers and a block",
    )
    argv = files_first(words)
    parsed = read_arguments(parser, argv)
    if twice:
        raise twice[0]
    config = Config(**{f.name: parsed[f.name] for f in fields(Config)})
    # what is of any type the library reads once more, a word at a time
    start = replace(config.start, hyper=with_no(config.start.hyper))
    config = replace(config, start=start, compare=replace(config.compare, search=with_no(config.compare.search)))
    typed = {key.removeprefix("adapt.") for key in typed_keys(words) if key.startswith("adapt.")}
    return replace(config, adapt=prefer_typed(config.adapt, typed))


def read_arguments(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """What the files and the command line say; else one sentence that names them, and exit status 2."""
    try:
        said = parser.parse_args(argv)
        for section in (Model, *SECTIONS):
            name = section.__name__.lower()
            if not isinstance(said[name], Namespace):
                raise ValueError(f"{name} is {said[name]!r}, but should be a group of fields")
        return parser.instantiate(said)
    except InputError:
        raise
    except (argparse.ArgumentError, ValueError, RecursionError) as error:
        files = [a.removeprefix("--config=") for a in argv if a.startswith("--config=")]
        where = f"in {', '.join(files)} or on the command line" if files else "on the command line"
        said = in_plain_words(error, parser._option_string_actions)
        print(f"error: {said} ({where}; --help lists what there is)", file=sys.stderr)
        sys.exit(2)


def files_first(argv: list[str]) -> list[str]:
    """The command line with its YAML files in front, so that what is typed overrides them; the last is the file of
    configs/presets/ that --preset names."""
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", action="append", default=[])
    files.add_argument("--preset")
    named, others = files.parse_known_args(argv)
    presets = {file.stem: str(file) for file in sorted(PRESETS.glob("*.yaml"))}
    if named.preset is not None and named.preset not in presets:
        raise InputError(f"unknown preset {named.preset!r}; choose from {', '.join(presets)}")
    chosen = [*named.config, *([presets[named.preset]] if named.preset else [])]
    for file in filter(Path.is_file, map(Path, chosen)):
        read_yaml_file(file, typed_keys(others))  # for its InputError, which names the file, as the library's does not
    return [f"--config={file}" for file in chosen] + others


def typed_keys(argv: Iterable[str]) -> set[str]:
    """The dotted keys of the options on a command line."""
    return {word[2:].split("=")[0] for word in argv if word.startswith("--")} - {"config", "preset"}
