"""What people write in YAML, read in one way: a key that stands twice is refused; other readers keep the last one.

A number may be written 1e-3 here, as elsewhere; YAML 1.1 takes it for text.
"""

import re
from collections.abc import Collection, Hashable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import yaml

from common.core.annotations import require_kind
from common.core.errors import InputError

Row = TypeVar("Row")


class RepeatedKey(InputError):
    """A key stands twice in one group."""


FLOAT, TIME = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"
EXPONENT = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")


class Reader(yaml.SafeLoader):
    """Plain data of YAML; a date is the text that was written."""


Reader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if tag != TIME]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Reader.add_implicit_resolver(FLOAT, EXPONENT, list("-+.0123456789"))


def read_yaml_file(file: Path, overridden: Collection[str] = ()) -> Any:
    """What a file says; InputError if it cannot be read, is no YAML, or says something of a key twice.

    overridden: Dotted keys, as eval.tests, whose values count for nothing: what is twice in them is passed over.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    return read_yaml(text, str(file), overridden)


def read_rows(file: Path, kind: type[Row], what: str = "task") -> dict[str, Row]:
    """The entries of a file, each a row of the dataclass `kind` under its name.

    Raises: InputError naming the file, the entry and the field that is unknown, missing or of another type.
    """
    found, types = read_yaml_file(file), get_type_hints(kind)
    needed = [f.name for f in fields(cast(Any, kind)) if f.default is MISSING and f.default_factory is MISSING]
    if not isinstance(found, dict):
        raise InputError(f"{file} is no mapping of names to rows, {what}: {{field: value}}")
    for name, row in found.items():
        row = row if isinstance(row, dict) else {}
        for key, value in row.items():
            if key not in types:
                raise InputError(f"{file}: {what} {name} has no field {key!r}; choose from {', '.join(types)}")
            require_kind(value, types[key], f"{file}: {what} {name}: {key}")
        if lacking := [key for key in needed if key not in row]:
            raise InputError(f"{file}: {what} {name} lacks {', '.join(lacking)}")
    return {str(name): kind(**row) for name, row in found.items()}


def read_yaml(text: str, where: str, overridden: Collection[str] = ()) -> Any:
    """What a text says, which an InputError calls `where`; see `read_yaml_file`."""
    reader = Reader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        for key, group, lines in repeated_keys(reader, node):
            if any(f"{group}.".startswith(f"{each}.") for each in overridden):
                continue
            raise RepeatedKey(f"{where} has the key {key!r} twice in one group, in {in_lines(*lines)}; leave one out")
        return reader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{where} cannot be read as YAML: {' '.join(str(error).split())}") from error
    except InputError:
        raise
    except ValueError as error:  # a number that Python's own limits refuse
        raise InputError(f"{where} cannot be read as YAML: {error}") from error
    finally:
        reader.dispose()


def repeats(text: str, where: str, overridden: Collection[str] = ()) -> list[RepeatedKey]:
    """What `read_yaml` says of a key that stands twice; nothing of a text that is no YAML."""
    try:
        read_yaml(text, where, overridden)
    except RepeatedKey as error:
        return [error]
    except InputError:
        pass
    return []


def in_lines(first: int, second: int) -> str:
    """Where two things stand."""
    return f"lines {first} and {second}" if first != second else f"line {first}"


def repeated_keys(reader: Reader, root: yaml.Node) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """(key as written, dotted keys of its mapping, the lines that it stands in) of every key that a mapping has before,
    anywhere below a node.

    Keys are equal as Python's dictionaries have it. What << merges into a mapping is no key of it: it gives way there.
    """
    waiting, seen = [(root, "")], set()
    while waiting:
        node, group = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting.extend((each, group) for each in reversed(node.value))
        elif isinstance(node, yaml.MappingNode):
            lines: dict[Hashable, int] = {}
            for key_node, _ in node.value:
                line = key_node.start_mark.line + 1
                if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                    key = reader.construct_object(key_node)
                    if key in lines:
                        yield key_node.value, group, (lines[key], line)
                    lines[key] = line
            for key_node, value in reversed(node.value):
                waiting.append((value, ".".join(filter(None, (group, str(key_node.value))))))
