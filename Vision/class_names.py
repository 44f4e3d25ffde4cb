"""Which class of a task is meant by the names that a data set or a classifier has for its own numbers."""

from collections.abc import Sequence

from common.core.errors import InputError
from common.core.notices import warn
from common.io.task_heads import folded, order_of


def places_of(names: Sequence[str], classes: Sequence[str], where: str) -> list[int]:
    """For each of the names the number of the class that it means, in the order of tasks.yaml.

    By name where the names are those of the classes; else by number where they are the numbers 0 to n - 1 or 1 to n, in
    whatever order, as `datasets` sorts folders by their text. Names that are neither tell nothing: the order is taken
    as it is, and a warning says so.

    Args:
        names: as many as there are classes.
        where: what has these names, as the beginning of a sentence.
    Raises: InputError if not all are names of classes and one of them is at another place: the order is wrong.
    """
    if (places := order_of(classes, names)) is not None:
        return places
    ours, wanted = [folded(name) for name in names], [folded(name) for name in classes]
    numbers = [int(name) for name in ours if name.isdecimal()]
    first = min(numbers, default=0)
    by_number = sorted(numbers) == list(range(first, first + len(classes))) and first in (0, 1)
    if by_number and not any(name.isdecimal() for name in wanted):
        return [number - first for number in numbers]
    for number, plain in enumerate(ours):
        if plain in wanted and wanted.index(plain) != number:
            raise InputError(
                f"{where} calls class {number} {names[number]!r}, which is class {wanted.index(plain)} of "
                "Vision/tasks.yaml, but not all its names are of that file: give all of them, each once"
            )
    unknown = next(name for name, plain in zip(names, ours, strict=True) if plain not in wanted)
    warn(
        f"{where} has names of classes that are not in Vision/tasks.yaml, such as {unknown!r}, so its numbers are "
        "taken in the order of that file; if that is wrong, give its names"
    )
    return list(range(len(classes)))
