"""Safetensors files as their headers describe them, and what else may lie under such a name."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from common.core.errors import InputError

CONVERT = "scripts/convert_checkpoint.py makes safetensors of it"
BEGINNINGS = {
    rb"version https://git-lfs": "is a Git LFS pointer, not the weights; `git lfs pull` in its folder fetches them",
    rb"/annex/objects": "is a git-annex pointer, not the weights; `git annex get` in its folder fetches them",
    rb"GGUF": "is a GGUF file; transformers makes safetensors of it, "
    "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(OTHER)",
    rb"PK\x03\x04": f"is an archive of torch.save; {CONVERT}",
    rb"\x80[\x02-\x05](?!\x00\x00)": f"is a pickle; {CONVERT}",  # a header of 640 bytes begins with 80 02 00 00
    rb"\x89HDF": "is an HDF5 file of TensorFlow; save the model with PyTorch as safetensors",
    rb"\s*<(!doctype|html|\?xml)": "is a web page, as a download leaves that found nothing; download it again",
    rb"(Entry|Repository|Revision) not found": "is the hub's answer that it has no such file; download it again",
    rb"Invalid username|Access to model": "is the hub's answer that this was not allowed; log in, download it again",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a header has it: its file, name, first byte and end there, its type as safetensors calls it."""

    file: Path
    stored: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """How much of the file it takes."""
        return self.end - self.begin


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file open for lazy reads; a file that is missing, truncated or damaged is an InputError."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except FileNotFoundError as error:
        raise InputError(absent(file)) from error
    except (SafetensorError, OSError) as error:
        why = f"{file} {mistaken_for(file) or f'is truncated or no safetensors file ({error})'}"
        raise InputError(why) from error


def tensor_rows(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, from its header alone. InputError if the file is truncated or damaged."""
    with opened(file), open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    rows = []
    for name, row in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in row["data_offsets"])
            rows.append(StoredTensor(file, name, row["dtype"], tuple(row["shape"]), begin, end))
    return rows


def absent(file: Path) -> str:
    """That there is no such file; of a link, that what it points to is gone."""
    if file.is_symlink():
        return f"{file} is a link to {os.readlink(file)}, which is not there; download it again, or mend the link"
    return f"there is no file {file}"


def mistaken_for(file: Path) -> str:
    """What a file is that is no safetensors file, as the end of a sentence that says what to do; "" if that is unknown.

    Told by its first bytes.
    """
    try:
        with open(file, "rb") as handle:
            head = handle.read(200)
    except OSError:
        return ""
    if not head:
        return "is empty; download it again"
    found = next((what for beginning, what in BEGINNINGS.items() if re.match(beginning, head, re.IGNORECASE)), "")
    size = re.search(rb"\nsize (\d+)", head) if "LFS" in found else None
    return found.replace("not the weights", f"not the {int(size[1]):,} bytes of weights") if size else found
