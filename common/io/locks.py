"""Locks between processes: of one machine, and of several where the file system they share passes locks on."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.core.errors import InputError
from common.core.notices import warn

SOON, PAUSE = 2.0, 0.02  # seconds: what another process takes is told after the one, and looked at after the other

_HELD: set[Path] = set()  # by this process, which may enter again


@contextmanager
def locked(path: Path, refusal: str = "") -> Iterator[None]:
    """Keep other processes out of a file or folder while the block runs.

    Args:
        path: What is locked; the lock is a hidden file beside it, which is there meanwhile.
        refusal: What to raise as an InputError where another process holds it; else this one waits for the other.
    """
    lock = path.with_name(f".{path.name}.lock").absolute()
    if lock in _HELD:
        yield
        return
    new = not lock.parent.exists()
    handle = opened(lock, refusal)
    _HELD.add(lock)
    try:
        yield
    finally:
        _HELD.discard(lock)
        lock.unlink(missing_ok=True)  # first: who gets hold of the file behind it sees that it is none any more
        os.close(handle)
        if new:  # what is refused leaves nothing behind
            with suppress(OSError):
                lock.parent.rmdir()


def opened(lock: Path, refusal: str) -> int:
    """The lock file, open and locked by this process."""
    began, told = time.monotonic(), False
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"cannot write {lock}: {error}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            if refusal:
                raise InputError(refusal) from None
            if not told and time.monotonic() - began > SOON:
                told = True
                warn(f"another process works on {lock.parent / lock.name[1:].removesuffix('.lock')}; this one waits")
            time.sleep(PAUSE)
            continue
        except OSError:  # a file system without locks: one process at a time is all that it can have
            return handle
        except BaseException:
            os.close(handle)
            raise
        if lock.exists() and os.path.samestat(os.fstat(handle), os.stat(lock)):
            return handle
        os.close(handle)  # the one who held it has removed it
