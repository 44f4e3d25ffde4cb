"""What a user should know though the work goes on."""

import sys
from collections.abc import Callable

_said: set[str] = set()
listeners: list[Callable[[str], None]] = []
"""Who is handed each sentence besides, as a log."""


def warn(sentence: str) -> None:
    """Print a sentence on stderr, once in a process however often it is true."""
    if sentence not in _said:
        _said.add(sentence)
        print(f"warning: {sentence}", file=sys.stderr)
        for listener in listeners:
            listener(f"warning: {sentence}")
