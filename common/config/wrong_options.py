"""What is wrong with an option, in plain words, where the library that reads configs speaks of its own types."""

import re
from collections.abc import Collection
from difflib import get_close_matches

from common.core.annotations import WORDS

# What the library says of a value that an option cannot have, and of names that it does not know.
MISFIT = re.compile(r'Parser key "([^"]+)": (.*)(?:\. Got| Given value type: .*? Given) value: (.*)')
KIND = re.compile(r"Expected a (?:typing\.Literal\[(.+?)\]|<class '(\w+)'>)")
NO_FILE = re.compile(r"Parser key \"config\": File does not exist: '(.*)'")
UNKNOWN_IN_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '([\w.]+)'")
UNKNOWN = re.compile(r"Option '([\w.]+)' is not accepted")
NO_VALUE = re.compile(r"argument (--[\w.-]+): expected one argument")


def in_plain_words(error: BaseException, known: Collection[str]) -> str:
    """What the library says of a wrong option, its Python types in words, and the nearest option to an unknown one.

    known: the options that there are, dotted, with their two hyphens.
    """
    said = " ".join(str(error).split())
    if wrong := MISFIT.match(said):
        key, expected, value = wrong.groups()
        kinds = [
            str(choices.replace(", ", " or ") or WORDS.get(kind, kind)) for choices, kind in KIND.findall(expected)
        ]
        return f"{key} is {value}, but should be {' or '.join(kinds)}" if kinds else said
    if wrong := NO_FILE.match(said):
        return f"there is no file {wrong[1]}"
    if wrong := NO_VALUE.fullmatch(said):
        return f"{wrong[1]} wants a value behind it"
    if wrong := UNKNOWN_IN_GROUP.fullmatch(said) or UNKNOWN.fullmatch(said):
        key = ".".join(wrong.groups())
        return f"there is no option {key}" + nearest(f"--{key}", known, "")
    if said.startswith("unrecognized arguments: --"):
        return said + nearest(said.split()[2].split("=")[0], known)
    return said


def nearest(typed: str, known: Collection[str], hyphens: str = "--") -> str:
    """A question for the option that is meant, by its spelling or its last word; "" if none is near."""
    near = get_close_matches(typed, known, 1) or [o for o in known if o.endswith(f".{typed[2:]}")]
    return f"; did you mean {' or '.join(hyphens + each.removeprefix('--') for each in near)}?" if near else ""
