"""What is made of the files beside a model's weights: made once, and anew when they have changed."""

import os
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from common.config import Model
from common.io.model_files import state_of

Rest = ParamSpec("Rest")
Made = TypeVar("Made")


def cached_by_files(function: Callable[Concatenate[Model, Rest], Made]) -> Callable[Concatenate[Model, Rest], Made]:
    """A function of a model that reads what lies in the folders of its base and its text tower, as functools.cache has
    it: called again for equal arguments only after a file there has changed, as it may between two calls from Python.
    """

    @cache
    def made(state: object, *args, **kwargs) -> Made:
        return function(*args, **kwargs)

    @wraps(function)
    def of_files(model: Model, *args: Rest.args, **kwargs: Rest.kwargs) -> Made:
        return made(state_of(files_of(model)), model, *args, **kwargs)

    return of_files


def files_of(model: Model) -> Iterator[Path]:
    """The files in the folders of a model's base and text tower, in order; not those that are being written."""
    for path in [model.path(which) for which in ("base", "text") if getattr(model, which)]:
        try:  # the folder of any file, for the file itself may change too
            with os.scandir(path if path.is_dir() else path.parent) as entries:
                names = sorted(each.path for each in entries if each.is_file() and not each.name.startswith("."))
        except OSError:  # what cannot be read is refused where it is read
            continue
        yield from map(Path, names)
