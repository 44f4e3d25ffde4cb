"""What a user should know though the work goes on."""

import sys

_said: set[str] = set()


def warn(sentence: str) -> None:
    """Print a sentence on stderr, once in a process however often it is true."""
    if sentence not in _said:
        _said.add(sentence)
        print(f"warning: {sentence}", file=sys.stderr)
