"""The one exception a user can cause, and how its sentence keeps a long list short."""

from collections.abc import Iterable


class InputError(ValueError):
    """Something given from outside is wrong: one sentence that names the file, key, tensor or choice.

    Commands print the sentence and exit with status 2; nothing has been written when it is raised.
    """


class NotFetched(InputError):
    """In a dry run: a model that a run would fetch first, so that nothing is known of it yet. It is no refusal."""


def in_short(items: Iterable[str], most: int = 4) -> list[str]:
    """A list of at most so many items, for a sentence: where there are more, the last one says how many follow."""
    items = list(items)
    return items if len(items) <= most else [*items[: most - 1], f"{len(items) - most + 1} more"]
