"""Whether a value read from YAML fits the annotation of what it is for, and what that asks for in plain words."""

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

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
    """For a plain type, None, a Literal, a Sequence of one type, or a union of these; an integer is a float, too."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if get_origin(kind) is Sequence:
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
