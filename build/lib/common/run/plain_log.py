"""Progress in lines of text, a line a unit: in a file, and on standard error where that is no terminal."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from common.core import notices
from common.core.errors import InputError
from common.run.stages import Stages


@contextmanager
def told(stages: Stages, log: str) -> Iterator[None]:
    """While this goes on, tell of every unit, stage and warning; `log`: the file they are added to, "" for none.

    Raises: InputError if the file cannot be written.
    """
    write, close = opened(log)
    listeners: list[Callable[[str], None]] = [*([write] if log else [])]
    listeners += [] if sys.stderr.isatty() else [partial(print_line, file=sys.stderr)]
    write(f"begins: {shlex.join(sys.argv)}")
    stages.listeners += listeners
    notices.listeners.append(write)
    ended = "finished"
    try:
        yield
    except InputError as error:
        ended = f"error: {error}"
        raise
    except BaseException as error:
        ended = f"{'interrupted' if isinstance(error, KeyboardInterrupt) else type(error).__name__}: {stages.reached}"
        raise
    finally:
        notices.listeners.remove(write)
        for listener in listeners:
            stages.listeners.remove(listener)
        write(ended)
        close()


def opened(log: str) -> tuple[Callable[[str], None], Callable[[], None]]:
    """A function that adds a line to the file, and one that closes it."""
    if not log:
        return lambda line: None, lambda: None
    path = Path(log).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"run.log is {log}, which cannot be written: {error.strerror}") from error
    return partial(print_line, file=handle), handle.close


def print_line(line: str, file) -> None:
    """A line with the time of day before it, there at once for who watches the file."""
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=file, flush=True)
