"""From what a config calls a place to a path, which a resolver has of scheme://; what a name of a folder may be; and
where the user's cache is."""

import os
from collections.abc import Callable
from pathlib import Path

from common.core.errors import InputError

RESOLVERS: dict[str, Callable[[str], Path]] = {}
"""{scheme: from the whole text to a local path}; common/io/hub.py has that of hf://."""


def for_task(template: str, task: str) -> str:
    """A path with {task} replaced by the name of a task, {slug} by its letters and digits in lower case."""
    return template.replace("{task}", task).replace("{slug}", "".join(filter(str.isalnum, task.lower())))


def place_name(text: str) -> str:
    """What a place is called where no path of one machine should stand: org/name of a hub, else its last part."""
    _, sign, rest = text.partition("://")
    if not sign:
        return Path(text).name or text
    return "/".join(rest.removeprefix("datasets/").split("@")[0].split("/")[:2])


def within(text: str, root: str) -> str:
    """A place below a root on a hub; what is a place or an absolute path by itself, or has another root, as it is."""
    own = "://" in text or Path(text).expanduser().is_absolute()
    return text if own or "://" not in root else f"{root.rstrip('/')}/{text}"


def cache_folder() -> Path:
    """The user's folder for what can be made again. RuntimeError if there is no home folder that it could be in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "functional-dual-anchors"


def leads_out(name: str) -> bool:
    """Whether a name is that of no folder below the one that it is put in."""
    return not Path(name).parts or Path(name).is_absolute() or ".." in Path(name).parts


def require_part_of_name(where: str, text: str) -> None:
    """InputError if what is put into the name of an adapted model's folder would lead into another."""
    if any(sign in text for sign in "/\\"):
        raise InputError(f"{where} is {text!r}; it is a part of a folder's name, and has no slash or backslash")


def path_of(text: str, root: str = ".") -> Path:
    """The local path that a text means, relative to `root` if it is none by itself, "~" expanded.

    Raises: InputError if nothing resolves its scheme, or what resolves it cannot.
    """
    text = within(text, root)
    scheme, sign, _ = text.partition("://")
    if not sign:
        return Path(root).expanduser() / Path(text).expanduser()
    if scheme not in RESOLVERS:
        raise InputError(f"{text}: unknown scheme {scheme!r}; choose from {', '.join(RESOLVERS)}, or name a path")
    return RESOLVERS[scheme](text)
