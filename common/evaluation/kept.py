"""results.json while it is written: what other processes wrote meanwhile stays, and so do rows of removed models.

People remove large folders and keep their scores. Such a row stands beside others as long as it was scored on the same
examples, and made from the same inputs and start, as far as it says; else it is kept apart, where no table finds it.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from common.evaluation.rows import KEY, Row, display, read_apart, read_results, row_name, upsert, write_results
from common.io.locks import locked

MEASURED = ("metric", "n", "limit", "test_set", "dtype")  # what two rows of a task and a split have to agree in
Apart = Mapping[str, str]
"""{row name: why it is kept apart}"""


def keep_rows(
    file: Path, tests: Sequence[str], new: Iterable[Row], here: Sequence[Row], inputs: str, own: bool = False
) -> tuple[list[Row], Apart]:
    """Put new rows into results.json, where other processes may put theirs.

    Args:
        here: All rows so far of models that are there, the new ones among them.
        inputs: What identifies the base and the experts that are there.
        own: Whether the run has models of its own: then rows of compare.seeds go, which stand in the run of each seed.
    Returns: The rows that are in the file, in the order of the test sets, but those that are kept apart; and these.
    """
    with locked(file):
        rows = [row for row in known_rows(file) if not (own and "seed" in row)]
        for row in new:
            rows = upsert(rows, row)
        there = set(map(key_of, here))
        reasons = ["" if key_of(row) in there else why_apart(row, rows, here, inputs) for row in rows]
        beside = [row for row, why in zip(rows, reasons, strict=True) if not why]
        apart = [row for row, why in zip(rows, reasons, strict=True) if why]
        write_results(file, beside, tests, apart)
    place = {test: i for i, test in enumerate(tests)}
    beside.sort(key=lambda row: place.get(row["task"], len(place)))
    return beside, {row_name(row): why for row, why in zip(rows, reasons, strict=True) if why}


def known_rows(file: Path) -> list[Row]:
    """All rows of results.json, those that are kept apart among them; none if it is not there."""
    return [*read_results(file)[0], *read_apart(file)] if file.is_file() else []


def why_apart(row: Row, rows: Sequence[Row], here: Sequence[Row], inputs: str) -> str:
    """In what the row of a model that is gone differs from those of models that are there, so that no table may hold
    both; "" if in nothing."""
    for other in (other for other in here if same_test(row, other)):
        for field in MEASURED:
            if row.get(field) != other.get(field):
                return f"its {field} was {row.get(field)}, now it is {other.get(field)}"
        if row.get("scorer") != other.get("scorer"):
            return "it was scored with another head, tokenizer, prompt or the like, or before that was recorded"
        if row.get("inputs", inputs) != inputs:
            return "it was made from another base, other experts or for other tasks"
    for adapted, start in pairs(row, rows):
        known = "checkpoint" in start and "start_checkpoint" in adapted
        goes = row is adapted or key_of(adapted) in map(key_of, here)  # the one of the two whose model is gone
        if known and goes and adapted["start_checkpoint"] != start["checkpoint"]:
            return f"{row_name(adapted)} was adapted from another {row_name(start)}"
    return ""


def pairs(row: Row, rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """The row with that of its start, if it is adapted; else with those of what was adapted from it."""
    of_test = [other for other in rows if same_test(row, other)]
    if row["method"] == "fda":
        return [(row, other) for other in of_test if row_name(other) == display(row["start"])]
    return [(other, row) for other in of_test if other["method"] == "fda" and display(other["start"]) == row_name(row)]


def same_test(row: Row, other: Row) -> bool:
    """Whether two rows are of one test set, split and seed."""
    return all(row.get(key) == other.get(key) for key in ("task", "split", "seed"))


def key_of(row: Row) -> tuple:
    return tuple(row.get(key) for key in KEY)


def said_of(apart: Apart) -> str:
    """A sentence on rows that are kept apart; "" if none are."""
    if not apart:
        return ""
    named = ", ".join(f"{name} ({why})" for name, why in apart.items())
    return f"not in the table, as they are of models that are not there any more and compare with no other: {named}"
