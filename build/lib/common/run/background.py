"""Reading ahead of the work and writing behind it, each in one background thread."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


def read_ahead(items: Iterable[T]) -> Iterator[T]:
    """The items in order, each made in a background thread while the caller works on the one before it.

    What goes wrong in making one is raised when its turn comes.
    """
    source = iter(items)
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, source, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, source, end)
            yield item


@contextmanager
def write_behind() -> Iterator[Callable[..., None]]:
    """write(function, *arguments) calls the function in a background thread while the caller works on.

    What goes wrong is raised by the next write, which waits for the one before, or at the end.
    """
    last: Future | None = None

    def write(function: Callable[..., None], *arguments: Any) -> None:
        nonlocal last
        if last:
            last.result()
        last = thread.submit(function, *arguments)

    with ThreadPoolExecutor(1) as thread:
        yield write
        if last:
            last.result()
