"""Where a run keeps its files. What each was made from is in provenance.py.

runs/<name>/anchors/<init>/<task>/block_07.safetensors   the anchors of one unit; the header has their provenance
runs/<name>/anchors/<init>/<task>/snapshots_07.safetensors   the same along the optimisation, with anchors.snapshots
runs/<name>/merged/<method>/                             a start: a checkpoint that stock libraries open
runs/<name>/merged/fda-<method>-<init>/                  an adapted model; blocks/ holds its blocks while it is made
.../adaptation.json                                      the losses of each block while it was adapted
runs/<name>/merged/<method>-pretrained-rest/             a start's blocks in the pretrained model, to be scored
.../provenance.json                                      written last: the folder is whole, and made from this
runs/<name>/scores/<test set>.json                       rows of a test set, while others are scored beside it
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import Config
from common.experiment import Unit

PROVENANCE_FILE = "provenance.json"
CARD = "README.md"  # of a merged model, written anew when there are scores
ADAPTATION_FILE = "adaptation.json"  # {"traces": {block: mean loss per anchor in each epoch}}
SAME_REST = "pretrained rest"  # label of a start that is scored with what an adapted model has around its blocks


@dataclass(frozen=True)
class RunLayout:
    """The files and folders of one run."""

    config: Config

    def anchor_file(self, task: str, index: int) -> Path:
        """The anchors of a unit: ours, or those of anchors.source in the released layout."""
        anchors = self.config.anchors
        if anchors.source:
            return anchors.path(task) / f"dual_anchors_layer_{index + 1}.npy"
        return self.anchor_folder / task / f"block_{index:02d}.safetensors"

    def snapshot_file(self, task: str, index: int) -> Path:
        """The anchors of a unit along their optimisation, if anchors.snapshots asked for any."""
        return self.anchor_folder / task / f"snapshots_{index:02d}.safetensors"

    def anchor_files(self, unit: Unit) -> list[Path]:
        """What a unit of construction writes: the anchors of each of its tasks, and what snapshots are asked for."""
        index, tasks = unit
        snapshots = tasks if self.config.anchors.snapshots else []
        return [self.anchor_file(t, index) for t in tasks] + [self.snapshot_file(t, index) for t in snapshots]

    @property
    def anchor_folder(self) -> Path:
        """All anchors that are made from anchors.init."""
        return self.config.run.dir / "anchors" / self.config.anchors.init

    @property
    def merged(self) -> Path:
        """All models that the run makes, a folder each."""
        return self.config.run.dir / "merged"

    @property
    def start(self) -> Path:
        """The merge that adaptation starts from, where start.method is one."""
        return self.merged / self.config.start.method

    @property
    def adapted(self) -> Path:
        """The adapted model."""
        parts = ["fda", self.config.start.method, self.config.anchors.init, self.config.adapt.label]
        return self.merged / "-".join(part for part in parts if part)

    def block_file(self, index: int) -> Path:
        """Where an adapted block waits until all are there."""
        return self.adapted / "blocks" / f"block_{index:02d}.safetensors"

    def part_file(self, number: int) -> Path:
        """Where a part of the start waits until all are there, if it is merged in parts."""
        return self.start / "parts" / f"part_{number:03d}.safetensors"

    def part_files(self, part: tuple[int, Sequence[str]]) -> list[Path]:
        """What a unit of a merge writes, a number and names of tensors."""
        return [self.part_file(part[0])]

    @property
    def scores(self) -> Path:
        """The rows of test sets that are scored side by side, until they are among the results."""
        return self.config.run.dir / "scores"

    def score_file(self, test: str) -> Path:
        """The rows of one test set."""
        return self.scores / f"{test}.json"

    def files_for_block(self, index: int) -> list[Path]:
        """What a unit of adaptation reads of the run: the anchors of every task, and the start that is merged here."""
        ours = not self.config.anchors.source
        anchors = [self.anchor_file(task, index) for task in self.config.tasks if ours]
        merged = sorted(self.start.rglob("*")) if not self.config.start.checkpoint else []
        return anchors + [file for file in merged if file.is_file()]

    def block_files(self, index: int) -> list[Path]:
        """What a unit of adaptation writes."""
        return [self.block_file(index)]


def with_same_rest(start: Path) -> Path:
    """Where a start's blocks in the pretrained model are, beside the start."""
    return start.with_name(f"{start.name}-{SAME_REST.replace(' ', '-')}")
