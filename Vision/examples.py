"""The images of a task as they are read: every one in RGB, every label the number of its class in tasks.yaml.

What cannot be read is refused in a sentence that names the task, the example and its file.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.core.errors import InputError
from Vision.class_names import places_of
from Vision.hf_files import Pixels
from Vision.tasks import TASKS

if TYPE_CHECKING:  # an import of a second, which commands that read no examples go without
    import datasets


class Examples:
    """Records of a task with columns image and, if they are `labelled`, label: rows[i] has the image in RGB, and the
    number of its class in tasks.yaml. InputError at once if a label is the number of none."""

    def __init__(self, records: "datasets.Dataset", task: str, labelled: bool):
        self.records, self.task = records, task
        self.labels = labels_of(records, task) if labelled else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> dict[str, Any]:
        label = {} if self.labels is None else {"label": self.labels[number]}
        return {"image": self.image(number)} | label

    def image(self, number: int) -> Image.Image:
        """An image in RGB; InputError if there is none, or none that can be read."""
        try:
            image = self.records[number]["image"]
            if isinstance(image, Image.Image):
                return in_rgb(image)
            said = f"the column image holds {'nothing' if image is None else f'a {type(image).__name__}, no image'}"
        except Exception as error:  # PIL and `datasets` raise a dozen kinds, all of which mean the same here
            said = f"the image cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"
        raise InputError(f"the data of task {self.task}, {self.called(number)}: {said}; mend it or leave it out")

    def called(self, number: int) -> str:
        """An example's number among those that are read, counted from 0, and its file if it is known."""
        import datasets

        path = None
        if isinstance(self.records.features["image"], datasets.Image):
            stored = self.records.cast_column("image", datasets.Image(decode=False))[number]["image"]
            path = (stored or {}).get("path")
        return f"example {number} of {len(self)} from 0" + (f", {path}" if path else "")


def labels_of(records: "datasets.Dataset", task: str) -> list[int]:
    """The number in tasks.yaml of each record's class; InputError names the first label that is no class."""
    classes = TASKS[task].classes
    names = getattr(records.features["label"], "names", None)
    if names is not None and len(names) != len(classes):
        raise InputError(f"the data of task {task} has {len(names)} classes; Vision/tasks.yaml has {len(classes)}")
    where = f"the data of task {task}"
    places = range(len(classes)) if names is None else places_of(names, classes, where)
    labels = list(records.select_columns("label")["label"])
    for number, label in enumerate(labels):
        if not isinstance(label, int | float) or label not in range(len(classes)):
            raise InputError(
                f"{where} has {label!r} in the column label of example {number} of {len(labels)} from 0; numbers 0 to "
                f"{len(classes) - 1} are needed, in the order of Vision/tasks.yaml, or a ClassLabel with its names"
            )
    return [places[int(label)] for label in labels]


def in_rgb(image: Image.Image) -> Image.Image:
    """An image in three channels of 8 bits; of 16-bit grey the higher byte, where PIL would clip.

    Raises: ValueError if it has pixels of 32 bits, integers beyond 255 or fractions, whose range nothing tells.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 255 or (pixels != np.round(pixels)).any():
            raise ValueError(f"pixels of 32 bits from {pixels.min()} to {pixels.max()}, where 0 to 255 are needed")
    return image.convert("RGB")


class Batches:
    """Examples as a model is called with them, batch by batch, anew in each pass; labels are under "labels".

    workers: processes that read images.
    """

    def __init__(self, examples: Examples, pixels: Pixels, size: int, workers: int):
        self.examples, self.pixels = examples, pixels
        self.loader = torch.utils.data.DataLoader(
            range(len(examples)),  # pyright: ignore[reportArgumentType]
            size,
            collate_fn=self.read,
            num_workers=workers,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader:
            if isinstance(batch, InputError):
                raise batch
            yield batch

    def read(self, numbers: list[int]) -> dict[str, Tensor] | InputError:
        """The examples of these numbers; a refusal is handed over, for a worker's exception would lose its sentence."""
        try:
            return batch_of(self.examples, self.pixels, numbers)
        except InputError as error:
            return error


def batch_of(examples: Examples, pixels: Pixels, numbers: list[int]) -> dict[str, Tensor]:
    """Some examples as a model is called with them, and their labels under "labels" if they have any."""
    rows = [examples[number] for number in numbers]
    labels = {} if examples.labels is None else {"labels": torch.tensor([row["label"] for row in rows])}
    return pixels(rows) | labels
