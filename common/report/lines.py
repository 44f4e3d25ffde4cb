"""A line of the table of results on a run's page."""

from typing import NamedTuple

INTERVAL = "95 % of Δ"  # the column of the bounds of a gain


class Cell(NamedTuple):
    """A cell, what it is sorted by, and whether it says better, worse or not told apart."""

    text: str
    order: float | str
    verdict: str = ""


class Line(NamedTuple):
    """A line of the table. kind: model, or paper (values that it prints). group: end (pretrained, individual), data or
    merge (a merge that uses data or none), fda."""

    run: str
    name: str
    kind: str
    group: str
    cells: list[Cell]
