"""Checkpoints on disk: read a tensor or a block at a time, write whole files or none."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import LazyTensor, Params
from common.io.hashes import SCHEME, file_hash, identity
from common.io.headers import StoredTensor, opened
from common.io.json_files import parse_object
from common.io.model_files import CONFIG_FILE, GENERATION_FILE, OPEN_CLIP_CONFIG, find_model, folder_of, json_of
from common.io.prefixes import unwrapped
from common.io.quantised import quantiser_files, require_weights
from common.io.tensors import WHOLE, of_shape, read_tensor, require_finite
from common.io.tokenizer_files import SENTENCE_FILES, TOKENIZER_FILES

BESIDE = (CONFIG_FILE, OPEN_CLIP_CONFIG, GENERATION_FILE)
SURROUNDINGS = (*BESIDE, *TOKENIZER_FILES, *SENTENCE_FILES)
HEADER_KEY = "fda"  # one key holding JSON: safetensors writes several keys in no fixed order


class Checkpoint:
    """The tensors of one model: a .safetensors file, or a folder as Hugging Face or open_clip lay it out.

    Opening reads headers only. Every file is mapped anew for each read and let go after it, so that the memory in use
    is what was read last. Its names are what `names` makes of the stored ones, without the prefixes of training tools;
    weights it gives None for are left out, and listed as `left_out`.
    Tensors can be had longer or shorter than they are stored, see `resize`.
    """

    def __init__(self, path: Path | str, names: Callable[[str], str | None] = str):
        self.path = Path(path)
        self.found = find_model(self.path)
        self.rows: dict[str, StoredTensor] = {}
        self.left_out: list[str] = []
        stored = {row.stored: row for row in self.found.rows()}
        self.check_weights(stored)
        self.unwrapped = unwrapped(stored, self.path)
        for wrapped, plain in self.unwrapped.names.items():
            row, name = stored[wrapped], names(plain)
            if name in self.rows:
                raise InputError(f"{self.path} has {name} twice, as {self.rows[name].stored} and as {row.stored}")
            if name is not None:
                self.rows[name] = row
            elif row.dtype.startswith(("F", "BF")):  # a buffer of position ids is no weight
                self.left_out.append(plain)
        self.shapes = {name: row.shape for name, row in self.rows.items()}

    @property
    def layout(self) -> str:
        """What is read of the path and what is not, for the dry run: files, and prefixes of names."""
        return ", ".join(filter(None, (str(self.found) if self.path.is_dir() else "", str(self.unwrapped))))

    @property
    def folder(self) -> Path:
        """Where the model's config and tokenizer are."""
        return folder_of(self.path)

    def check_weights(self, stored: Mapping[str, StoredTensor]) -> None:
        """InputError if what is stored are no weights: codes of a quantised model, or the empty places of ZeRO-3."""
        named = next(quantiser_files(self.folder), "")
        require_weights(self.path, stored, json_of(self.folder / CONFIG_FILE), named)

    def resize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """From now on the named tensors have these shapes: surplus rows are cut, missing ones the mean of the rest."""
        self.shapes |= {name: shape for name, shape in shapes.items() if name in self.shapes}

    def alias(self, name: str, of: str) -> None:
        """From now on `name` is another name of the tensor `of`, in place of what it may have been."""
        self.rows[name], self.shapes[name] = self.rows[of], self.shapes[of]

    def borrow(self, name: str, base: "Checkpoint") -> None:
        """From now on a tensor is the base's."""
        self.rows[name], self.shapes[name] = base.rows[name], base.shapes[name]

    def drop(self, name: str) -> None:
        """From now on there is no tensor of that name."""
        self.rows.pop(name, None)
        self.shapes.pop(name, None)

    def touches(self, prefix: str) -> bool:
        """Whether a tensor whose name begins so may differ from the base's; headers tell it of adapters alone."""
        return True

    def names(self, prefix: str = "") -> list[str]:
        """Names that begin with `prefix`, in order."""
        return sorted(name for name in self.shapes if name.startswith(prefix))

    def shapes_under(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the tensors whose name begins with `prefix`."""
        return {name: self.shapes[name] for name in self.names(prefix)}

    def read(self, names: Iterable[str]) -> Params:
        """The named tensors in float32. InputError names a tensor that is missing or holds NaN or Inf."""
        return {name: self.read_rows(name) for name in names}

    def read_rows(self, name: str, rows: slice = WHOLE) -> Tensor:
        """A tensor in float32, or some rows of one that `has_rows`. InputError as `read`."""
        if name not in self.rows:
            raise InputError(f"{self.path} lacks the tensor {name}")
        row = self.rows[name]
        if row.dtype.startswith("C"):
            raise InputError(f"{row.file}: the tensor {name} holds complex numbers, which are no weights of any family")
        tensor = read_tensor(row, rows)
        if rows == WHOLE:
            tensor = of_shape(tensor, self.shapes[name])
        require_finite(tensor, row, name)
        return tensor

    def has_rows(self, name: str) -> bool:
        """Whether rows of a tensor are read by themselves: it is stored as it is given, which those of adapters, stacks
        and matched vocabularies, kinds of their own, are not."""
        return type(self) is Checkpoint and name in self.rows and self.shapes[name] == self.rows[name].shape

    def lazy(self, names: Iterable[str]) -> dict[str, LazyTensor]:
        """The named tensors, each read when it is asked for. InputError names one that is missing."""
        lazy = {}
        for name in names:
            if name not in self.shapes:
                raise InputError(f"{self.path} lacks the tensor {name}")
            lazy[name] = LazyTensor(tuple(self.shapes[name]), (partial(self.read_one, name),))
        return lazy

    def read_one(self, name: str) -> Tensor:
        """One tensor in float32."""
        return self.read([name])[name]

    def read_at(self, name: str, index: int) -> Tensor:
        """One of many things of a kind that are stacked in a tensor, in float32; no other is in memory."""
        if name not in self.rows:
            raise InputError(f"{self.path} lacks the tensor {name}")
        tensor = read_tensor(self.rows[name], slice(index, index + 1))[0]
        require_finite(tensor, self.rows[name], name, index)
        return tensor

    def read_under(self, prefix: str) -> Params:
        """All tensors whose name begins with `prefix`, the prefix taken off."""
        return {name.removeprefix(prefix): t for name, t in self.read(self.names(prefix)).items()}

    def fingerprint(self) -> str:
        """Identifies the model by every byte of its weights and of what stock libraries read beside them."""
        files = sorted({row.file for row in self.rows.values()}) + surroundings(self.folder)
        return identity([[file.name, file_hash(file)] for file in files])


def plain_names(path: Path) -> list[str]:
    """Names of the stored tensors of the model at a path, without the prefixes of training tools."""
    return list(unwrapped((row.stored for row in find_model(path).rows()), path).names.values())


def surroundings(folder: Path) -> list[Path]:
    """The config and tokenizer files in a folder, in order; none beside what is a file itself."""
    return sorted({file for pattern in SURROUNDINGS for file in folder.glob(pattern) if file.is_file()})


def read_header(file: Path) -> dict[str, Any]:
    """What this project wrote into the header of one of its files; empty if the file is not one of them."""
    with opened(file) as handle:
        return parse_object((handle.metadata() or {}).get(HEADER_KEY, "{}"), f"the header of {file}", "provenance")


# how files were made that are older than a setting
BEFORE = {"anchors.part": None, "anchors.weights": "equal", "adapt.blend": 1, "adapt.ridge": 0}
# what is recorded where it is set alone, and compared whether it is or not
WHERE_SET = ("model.arch", "model.fuse_qkv", "inputs.model.arch", "inputs.model.heads")


def check_provenance(file: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """InputError naming the first field in which what `file` was made from differs from what is `expected` now."""
    made, flat = BEFORE | flattened(found), flattened(expected)
    for field, value in (flat | {name: None for name in WHERE_SET if name not in flat}).items():
        was = made.get(field)
        if SCHEME in json.dumps(value) and was is not None and SCHEME not in json.dumps(was):
            raise InputError(
                f"{file} is of an earlier version, which looked at samples of {field} alone, so none can tell whether "
                "it is made from these very files; choose another run.name, or remove the file to have it made anew"
            )
        if was != value:
            recorded = f"was made with {field} = {was}, "
            silent = f"says nothing of {field}: it was made without, or before there was a record of it; "
            raise InputError(
                f"{file} {recorded if field in made else silent}now it is {value}; "
                "choose another run.name, or remove the file to have it made anew"
            )


def flattened(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested mappings, as JSON would give them back."""
    flat = {}
    for key, value in json.loads(json.dumps(nested)).items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def write_tensors(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file that is either whole or not there. The same contents give the same bytes."""
    metadata = {"format": "pt"} if header is None else {HEADER_KEY: json.dumps(header, sort_keys=True)}
    with replacing(file) as temporary:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary, metadata)


def write_text(file: Path, text: str) -> None:
    """Write a text file that is either whole or not there."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the named files that exist."""
    for name in names:
        if (source / name).is_file():
            with replacing(target / name) as temporary:
                shutil.copyfile(source / name, temporary)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary name beside `file` that takes its place when the block ends well; else nothing changes."""
    temporary = file.with_name(f".{file.name}.{gethostname()}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(file)
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {file}: {error}") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def remove_leftovers(file: Path) -> None:
    """Remove what killed processes of this machine began to write in the place of `file`; others may be writing it."""
    for temporary in file.parent.glob(f".{file.name}.{gethostname()}.*.tmp"):
        try:
            os.kill(int(temporary.suffixes[-2][1:]), 0)  # asks whether there is such a process
        except (ProcessLookupError, OverflowError):
            temporary.unlink(missing_ok=True)
        except (PermissionError, ValueError, IndexError):
            pass  # somebody else's


def tensor_digest(tensors: Params) -> str:
    """16 hexadecimal digits that identify tensors by name, type, shape and bytes."""
    sha = hashlib.sha256(b"" if tensors else b"{}")  # of no tensors as of {} in JSON, in files that exist
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]
