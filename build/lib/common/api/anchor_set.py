"""Anchors that `construct` made, as a mapping that reads them from their files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from safetensors.torch import load_file
from torch import Tensor

from common.config import Config
from common.layout import RunLayout


@dataclass(frozen=True, eq=False)
class AnchorSet(Mapping[str, list[Tensor]]):
    """{task: [x_ATD of each block]}: A anchors of T tokens of width D, float32, read when they are asked for.

    config: What they were made with. They lie in its run's folder. keeper: that folder, if it is a temporary one; it is
    removed when nothing refers to this set any more.
    """

    config: Config
    keeper: TemporaryDirectory | None = None

    def __getitem__(self, task: str) -> list[Tensor]:
        if task not in self.config.tasks:
            raise KeyError(task)
        files = sorted((RunLayout(self.config).anchor_folder / task).glob("block_*.safetensors"), key=block_number)
        return [load_file(file)["anchors"] for file in files]

    def __iter__(self) -> Iterator[str]:
        return iter(self.config.tasks)

    def __len__(self) -> int:
        return len(self.config.tasks)


def block_number(file) -> int:
    """The block of a file of anchors: names have two digits, and more where there are more than a hundred blocks."""
    return int(file.stem.removeprefix("block_"))
