"""JSON objects in files: read, or refused in one sentence that names the file."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.core.errors import InputError


def read_object(file: Path, what: str) -> dict[str, Any]:
    """The fields of the JSON object that a file holds.

    Args:
        file: The file; it is read as UTF-8.
        what: What it should be, for the sentence: "config file", "provenance of a merged model".
    Raises: InputError if the file cannot be read, or holds anything but one JSON object.
    """
    try:
        return parse_object(file.read_text(encoding="utf-8"), str(file), what)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no {what}, it cannot be read: {error}") from error


def parse_object(text: str, where: str, what: str) -> dict[str, Any]:
    """The fields of a JSON object; InputError names where it is and what it should be."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets within brackets, thousands deep
        raise InputError(f"{where} is no {what}: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{where} is no {what}: in place of a JSON object it holds {json.dumps(found)[:40]}")
    return found


@contextmanager
def interpreted(file: Path, what: str) -> Iterator[None]:
    """InputError naming the file, in place of what a missing field or one of another type raises where it is used."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError, re.error) as error:
        raise InputError(f"{file} is no {what}, a field is missing or of another type ({error!r})") from error
