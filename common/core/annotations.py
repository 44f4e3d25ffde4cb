"""Whether a value read from YAML fits the annotation of what it is for, and what that asks for in plain words."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from common.core.errors import InputError

WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list, [a, b]",
    "tuple": "a list, [a, b]",
    "dict": "a mapping, {a: b}",
    "NoneType": "null",
}


def is_of(value: object, kind: Any) -> bool:
    """For a plain type, None, a Literal, a list or Sequence of one type, or a union of these; an integer is a float,
    too."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if get_origin(kind) in (list, Sequence):
        return isinstance(value, list | tuple) and all(is_of(item, get_args(kind)[0]) for item in value)
    if get_args(kind):
        return any(is_of(value, member) for member in get_args(kind))
    return type(value) is kind or (kind is float and type(value) is int)


def kind_in_words(kind: Any) -> str:
    """What an annotation asks for, as a refusal says it: "a number or a list of numbers", "'layer' or 'task'"."""
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is Sequence:
        return f"a list of {kind_in_words(get_args(kind)[0]).removeprefix('a ')}s"
    if get_origin(kind) in (list, tuple, dict):
        return WORDS[get_origin(kind).__name__]
    if get_args(kind):
        return " or ".join(map(kind_in_words, get_args(kind)))
    return WORDS.get(kind.__name__, str(kind))


def require_kind(value: object, kind: Any, where: str) -> None:
    """InputError, with its address, if a value does not fit an annotation."""
    if not is_of(value, kind):
        raise InputError(f"{where} must be {kind_in_words(kind)}, it is {value!r}")


def require_finite(value: object, where: str = "") -> None:
    """InputError, with its address, on the first number in a value, however deep in lists and mappings, that is NaN or
    infinite: no comparison holds of NaN, so that a check of a range may let it pass. `where` is the value's address."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            require_finite(each, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for place, each in enumerate(value):
            require_finite(each, f"{where}[{place}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where} is {value}; it must be a finite number")
    elif isinstance(value, int) and value.bit_length() > 1023:
        raise InputError(f"{where} is larger than any float; a number below 1e308 is needed")
