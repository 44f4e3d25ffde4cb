"""Commands run within this process, as the command line would run them: exit status, what is said, what is written."""

import contextlib
import io
import resource
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import NLG.decoders  # noqa: F401  loaded before memory is limited
import Vision.domain  # noqa: F401
from common.config import ROOT, Config

LIMIT = 2**29  # bytes: no pico model takes a hundredth of it


@dataclass(repr=False)
class Place:
    """A file that commands read, how one reads it, and what it may write."""

    root: Path
    file: str
    script: str
    config: Config
    seen: set[bytes] = field(default_factory=set)

    def __repr__(self) -> str:
        return f"{self.script} reads {self.file}"

    @property
    def path(self) -> Path:
        return self.root / self.file

    @property
    def written(self) -> Path:
        """The folder of the run."""
        return self.config.run.dir


def state(root: Path) -> dict[str, tuple[int, int, int]]:
    """What tells whether a file below a folder was written, moved or touched."""
    stats = {str(path): path.stat() for path in root.rglob("*") if path.is_file()}
    return {path: (at.st_size, at.st_mtime_ns, at.st_ino) for path, at in stats.items()}


def call(place: Place, *arguments: str, parsed: bool = True) -> tuple[object, str]:
    """Exit status and what is said of it, with no more memory than LIMIT in addition; `parsed`: the config is given."""
    said, former = io.StringIO(), resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    given = patch("common.command.parse", lambda *_: place.config) if parsed else contextlib.nullcontext()
    left = patch("common.command.leave", sys.exit)  # of the process there is more to come
    argv = patch.object(sys, "argv", [place.script, *arguments])
    resource.setrlimit(resource.RLIMIT_AS, (taken + LIMIT, former[1]))
    try:
        with given, left, argv, contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(ROOT / place.script), run_name="__main__")
    except SystemExit as end:
        return end.code, said.getvalue()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)
    return 0, said.getvalue()
