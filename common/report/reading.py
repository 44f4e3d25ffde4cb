"""What the folder of a run holds, read for its page: rows, notes, curves, provenance. No weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.core.errors import InputError
from common.domain import FOLDERS
from common.evaluation.rows import Row, read_results, row_name
from common.evaluation.scoring import RESULTS, identifying, traces
from common.io.json_files import interpreted, read_object
from common.io.paper_tables import paper_table
from common.layout import ADAPTATION_FILE, PROVENANCE_FILE, SAME_REST
from common.provenance import read_provenance
from common.report.vectors import VECTORS_FILE
from common.run.run_log import NOTES, WHAT, read_notes

if TYPE_CHECKING:  # imports matplotlib
    from common.evaluation.figures import Traces

REPORT = "report.html"


@dataclass(frozen=True)
class Made:
    """A merged model: its folder's name, the row it has in tables, and what it was made from."""

    folder: str
    row: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @property
    def name(self) -> str:
        return row_name({"start": None, "init": None, **self.row})


@dataclass(frozen=True)
class Analysis:
    """A figure of an analysis, as analysis/NAME.json describes it."""

    name: str
    title: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class RunRecord:
    """A run as its files tell it.

    notes: of each stage, see run_log.py; with seeds "seed 0: stage". curves_of: what the curves, the models and the
    task vectors are of, where there are several seeds: the first. adapted: {model: {block: losses}}.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    rows: Sequence[Row]
    tasks: Sequence[str]
    notes: Mapping[str, Mapping[str, Any]]
    curves_of: str
    matching: Mapping[str, "Traces"]
    adapted: Mapping[str, Mapping[int, Sequence[float]]]
    made: Sequence[Made]
    vectors: Mapping[str, Any] | None
    analyses: Sequence[Analysis]

    @property
    def percent(self) -> bool:
        """Whether tables print percent."""
        return import_module(f"{FOLDERS[self.config['domain']]}.domain").PERCENT

    @property
    def published(self) -> dict[str, Any] | None:
        """The paper's table beside the results, if the config names one."""
        return paper_table(self.config["eval"]["paper_table"])


def is_run(folder: Path) -> bool:
    """Whether a stage of a run, or of one of its seeds, was noted there."""
    return (folder / NOTES).is_file() or any(folder.glob(f"seed_*/{NOTES}"))


def parts_of(folder: Path, seeds: Sequence[int]) -> dict[str, Path]:
    """{"": the folder itself} of a run, {"seed 0": its folder} of a grid of seeds; of those named, if any are."""
    subs = {int(sub.name.removeprefix("seed_")): sub for sub in folder.glob("seed_*") if sub.is_dir()}
    found = {f"seed {seed}": subs[seed] for seed in sorted(subs) if not seeds or seed in seeds}
    return {"": folder} if (folder / NOTES).is_file() or not found else found


def read_run(folder: Path, config: Mapping[str, Any] | None = None) -> RunRecord:
    """Read a run's folder.

    Args:
        folder: runs/<name>.
        config: That of the command that goes on, which may have noted nothing yet; else that of the last stage on the
            test sets that were scored, if any were.
    Raises: InputError if there is no run, or a file of it is damaged.
    """
    if config is None and not is_run(folder):
        raise InputError(f"{folder} is the folder of no run: there is no {NOTES} in it")
    parts = parts_of(folder, config["compare"]["seeds"] if config else [])
    notes = {": ".join(filter(None, (p, s))): note for p, sub in parts.items() for s, note in read_notes(sub).items()}
    rows, tasks = result_rows(folder, parts)
    with interpreted(folder / NOTES, WHAT):
        notes = dict(sorted(notes.items(), key=lambda item: item[1]["time"]))
        configs = [note["config"] for note in notes.values()]
        scored = [c for c in configs if c["eval"]["split"] in {row["split"] for row in rows}]  # a search has its own
        config = dict((scored or configs)[-1]) if config is None else config
        split = config["eval"]["split"]
    shown = next(iter(parts.values()))
    return RunRecord(
        name=folder.name,
        folder=folder,
        config=config,
        rows=[row for row in rows if row["split"] == split],
        tasks=tasks,
        notes=notes,
        curves_of=next(iter(parts)) if len(parts) > 1 else "",
        matching=traces(shown),
        adapted={file.parent.name: adaptation(file) for file in sorted(shown.glob(f"merged/*/{ADAPTATION_FILE}"))},
        made=models_of(shown),
        vectors=read_object(file, "record of task vectors") if (file := shown / VECTORS_FILE).is_file() else None,
        analyses=analyses_of(folder),
    )


def result_rows(folder: Path, parts: Mapping[str, Path]) -> tuple[list[Row], list[str]]:
    """Rows and test sets of results.json; of a grid of seeds that goes on, those that there are so far."""
    if (folder / RESULTS).is_file():
        return read_results(folder / RESULTS)
    rows, tasks = [], []
    for part, sub in parts.items():
        if part and (sub / RESULTS).is_file():
            found, tasks = read_results(sub / RESULTS)
            rows += [{**row, "seed": int(part.removeprefix("seed "))} for row in found]
    return rows, tasks


def models_of(folder: Path) -> list[Made]:
    """Every merged model that is whole, but those that are there for a difference alone."""
    found = []
    for file in sorted(folder.glob(f"merged/*/{PROVENANCE_FILE}")):
        provenance = read_provenance(file.parent)
        row = identifying(provenance, file)
        if row["label"] != SAME_REST:
            found.append(Made(file.parent.name, row, provenance))
    return found


def adaptation(file: Path) -> dict[int, list[float]]:
    """{block: mean loss per anchor in each epoch}"""
    found = read_object(file, what := "record of an adaptation")
    with interpreted(file, what):
        return {int(block): [float(loss) for loss in trace] for block, trace in found["traces"].items()}


def analyses_of(folder: Path) -> list[Analysis]:
    """The figures of analysis/, with title and caption where a file of the same name has them."""
    found = []
    for png in sorted(folder.glob("analysis/*.png")):
        said = read_object(beside, "analysis") if (beside := png.with_suffix(".json")).is_file() else {}
        title, caption = (str(said.get(key) or "") for key in ("title", "caption"))
        found.append(Analysis(png.stem, title or png.stem.replace("_", " "), caption, png.read_bytes()))
    return found
