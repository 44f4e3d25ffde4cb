"""Labelled examples through `datasets`: from a local folder in any layout it reads, or from the hub."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from common.config import Eval
from common.core.errors import InputError
from common.io.hashes import file_hash, identity

if TYPE_CHECKING:  # an import of a second or more, which commands that read no examples go without
    import datasets


SEVERAL = 64  # images or sounds of a data set that are read to tell it from another
MEDIA = (  # endings of images, sounds and films; what is none of them is always read
    ".png", ".jpg", ".jpeg", ".jpe", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".j2k", ".avif", ".heic", ".heif", ".tga", ".ico", ".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a",
    ".aac", ".aif", ".aiff", ".au", ".wma", ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What a merge method draws of each task: so many examples of a split, None for all, in batches; other ones with
    each seed."""

    split: Literal["train", "test"]
    examples: int | None
    batch: int
    seed: int = 0


class Sets(Protocol):
    """Where the examples of a task are: what load_dataset takes, and the names of the splits."""

    hub: str
    hub_config: str | None
    split: str
    train_split: str


def load_scored(options: Eval, task: str, row: Sets, columns: Sequence[str]) -> "datasets.Dataset":
    """What models are scored on: the test set of a task or the validation cut, as eval.split and eval.limit say."""
    cut = options.split == "validation_cut"
    split = row.train_split if cut else row.split
    records = load_records(Path(options.data), task, row.hub, row.hub_config, split, columns)
    return first(validation_cut(records) if cut else records, options.limit)


def load_sample(options: Eval, task: str, row: Sets, columns: Sequence[str], sample: Sample) -> "datasets.Dataset":
    """Examples for a merge method, as many as there are if it asks for more; eval.limit does not count.

    Of the training set the first of the permutation whose last tenth is the validation cut, so that no example is in
    both; with seed 1 those that follow, and so on, from its end on from its beginning. Of the test set those of a
    permutation by `seed`.
    """
    train = sample.split == "train"
    split = row.train_split if train else row.split
    records = load_records(Path(options.data), task, row.hub, row.hub_config, split, columns)
    if train:
        order = cut_order(len(records))[0]
        order = np.roll(order, -sample.seed * (sample.examples or 0))
    else:
        order = np.random.RandomState(sample.seed).permutation(len(records))
    return records.select(order[: sample.examples])


def identity_of(options: Eval, task: str) -> str | None:
    """What tells the data set of a task in its folder from another: its files' names and bytes. Of images, sounds and
    films, MEDIA, names and sizes alone where they are more than SEVERAL: to read them takes as long as to score. Tables
    and texts beside them, where labels are, are read all the same. None where there is no folder, and the hub is read.
    """
    folder = Path(options.data).expanduser() / task
    if not folder.is_dir():
        return None
    files = {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}
    kept = {name: files[name] for name in sorted(files) if not any(part[0] == "." for part in name.parts)}
    stored = {name: file for name, file in kept.items() if not name.name.startswith("cache-")}  # by `datasets`
    media = {name for name in stored if name.suffix.lower() in MEDIA}
    unread = media if len(media) > SEVERAL else set()
    return identity([[n.as_posix(), f.stat().st_size, "" if n in unread else file_hash(f)] for n, f in stored.items()])


def first(records: "datasets.Dataset", limit: int | None) -> "datasets.Dataset":
    """The first `limit` records; all if it is unset or larger."""
    return records.select(range(min(len(records), limit or len(records))))


def load_records(
    root: Path, task: str, hub: str, hub_config: str | None, split: str, columns: Sequence[str]
) -> "datasets.Dataset":
    """One split of a task: root/task if that folder exists (parquet, csv, save_to_disk, imagefolder, …), else the hub.

    Raises: InputError if neither can be read (it says which id and which folder would do), if the split or a column is
        missing (it names those that are there).
    """
    import datasets

    folder = root.expanduser() / task
    try:
        found = read_folder(folder, split) if folder.is_dir() else read_hub(hub, hub_config, split)
    except Exception as error:  # `datasets` raises some thirty kinds, all of which mean the same here
        offered = f"a folder {folder}" + (f", or the hub's {hub}" if hub else "")
        raise InputError(f"no data for task {task}: {offered} would do ({type(error).__name__}: {error})") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise InputError(f"the data of task {task} has no split {split!r}; it has {', '.join(map(str, found))}")
        found = found[split]
    missing = [c for c in columns if c not in found.column_names]
    if missing:
        lacking = f"the column{'s'[: len(missing) > 1]} {', '.join(missing)}"
        raise InputError(f"the data of task {task} lacks {lacking}; it has {', '.join(found.column_names)}")
    return found


def validation_cut(train: "datasets.Dataset") -> "datasets.Dataset":
    """The last tenth of a fixed permutation of a training set, on which MergeLM chose its experts' epochs."""
    return train.select(cut_order(len(train))[1])


def cut_order(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the training examples are left to train on, and which are the validation cut."""
    order = np.random.RandomState(0).permutation(examples)
    return order[: int(0.9 * examples)], order[int(0.9 * examples) :]


def read_folder(folder: Path, split: str) -> "datasets.Dataset | datasets.DatasetDict":
    """A folder as save_to_disk wrote it, with files named after the split, or as load_dataset understands it."""
    import datasets

    datasets.disable_progress_bars()  # a folder is read in moments, and their bars would break into ours
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return datasets.load_from_disk(str(folder))
    files = [f.name for f in sorted(folder.glob(f"{split}[-.]*"))]  # `datasets` takes validation_matched for validation
    return datasets.load_dataset(str(folder), data_files={split: files} if files else None)


def read_hub(hub: str, hub_config: str | None, split: str) -> "datasets.Dataset":
    """One split of a data set of the hub; FileNotFoundError for a task that has no hub id."""
    import datasets

    if not hub:
        raise FileNotFoundError("there is no such folder")
    (datasets.enable_progress_bars if sys.stderr.isatty() else datasets.disable_progress_bars)()
    return datasets.load_dataset(hub, hub_config, split=split)
