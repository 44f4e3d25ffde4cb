"""SHA-256 of whole files, each read once: the hash is kept with the file's state and used while that stays the same.

Kept is one small file for each hashed one, in the user's cache folder ($XDG_CACHE_HOME or ~/.cache). It counts only if
size, device, inode, and the times of the last change of contents (mtime) and of the file's entry (ctime) are what they
were, to the nanosecond: a file that keeps its size and has its mtime set back is read again, because its ctime moved.
Records that are damaged, of another file, or that cannot be written cost a second reading, never a wrong answer.
Of the hashes in Python's hashlib SHA-256 is the fastest where the processor computes it; it is also what hubs list.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.core.errors import InputError
from common.core.places import cache_folder

SCHEME = "sha256:"  # begins what identifies a file or checkpoint by all its bytes
SETTLED = 2.0  # seconds: a change in the same tick of a file system's clock as the reading (FAT: 2 s) goes unseen
LARGE = 2**30  # bytes: of a larger file the reading is shown
PIECE = 2**22


def file_hash(file: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits; read anew only if the file may have changed since.

    Raises: InputError if there is no such file, or if it is written to while it is read.
    """
    try:
        began, before = time.time(), state_of(file)
        known = recall(file, before)
        if known:
            return known
        found = read_hash(file)
        after = state_of(file)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {file}") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    if after != before:
        raise InputError(f"{file} was written to while it was read; start again when it is whole")
    if began - max(before[-2:]) / 1e9 >= SETTLED:
        remember(file, before, found)
    return found


def digest(value: Any) -> str:
    """16 hexadecimal digits that identify anything that JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def identity(parts: Sequence) -> str:
    """What identifies a checkpoint: the scheme, and the digest of its parts."""
    return SCHEME + digest(parts)


def read_hash(file: Path) -> str:
    """SHA-256 of a file, read from its first byte to its last."""
    sha, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    size = os.stat(file).st_size
    with (
        open(file, "rb", buffering=0) as handle,
        tqdm(
            total=size, unit="B", unit_scale=True, desc=f"hash {file.name}", disable=size < LARGE or None, leave=False
        ) as bar,
    ):
        while count := handle.readinto(piece):
            sha.update(piece[:count])
            bar.update(count)
    return sha.hexdigest()


def state_of(file: Path) -> list[int]:
    """What changes with a file: its size, where it is, and when it was last changed."""
    at = os.stat(file)
    return [at.st_size, at.st_dev, at.st_ino, at.st_mtime_ns, at.st_ctime_ns]


# ---- the records -----------------------------------------------------------------------------------------------------


def record_of(file: Path) -> Path:
    """Where the hash of a file is kept, whatever links lead to the file."""
    key = hashlib.sha256(os.fsencode(os.path.realpath(file))).hexdigest()
    return cache_folder() / "hashes" / f"{key[:32]}.json"


def recall(file: Path, state: list[int]) -> str | None:
    """The hash kept for a file in this state, if there is one and its record is sound."""
    try:
        kept = json.loads(record_of(file).read_text())
        sound = kept["state"] == state and kept["check"] == check_of(state, kept["sha256"])
        return kept["sha256"] if sound else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None


def remember(file: Path, state: list[int], found: str) -> None:
    """Keep the hash of a file in this state, if the cache folder lets itself be written to."""
    try:
        record = record_of(file)
        record.parent.mkdir(parents=True, exist_ok=True)
        own = record.with_name(f".{record.name}.{os.getpid()}")
        own.write_text(json.dumps({"state": state, "sha256": found, "check": check_of(state, found)}))
        os.replace(own, record)
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return


def check_of(state: list[int], found: str) -> str:
    """A checksum of a record, which tells a damaged one."""
    return hashlib.sha256(json.dumps([state, found]).encode()).hexdigest()
