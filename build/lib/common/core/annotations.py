"""Whether a value read from YAML fits the annotation of what it is for."""

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin


def is_of(value: object, kind: Any) -> bool:
    """For a plain type, None, a Literal, a Sequence of one type, or a union of these; an integer is a float, too."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if get_origin(kind) is Sequence:
        return isinstance(value, list | tuple) and all(is_of(item, get_args(kind)[0]) for item in value)
    if get_args(kind):
        return any(is_of(value, member) for member in get_args(kind))
    return type(value) is kind or (kind is float and type(value) is int)


def name_of(kind: Any) -> str:
    """How a refusal calls an annotation."""
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return kind.__name__ if isinstance(kind, type) else str(kind)
