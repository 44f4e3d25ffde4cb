"""What the figures of a run's page are made of: Vega-Lite specifications, drawn in the colours of the page's theme.

Colours are named by the ranges of a Vega config (category, ramp, diverging), which page.js fills for light and dark.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Spec = dict[str, Any]
COLOURS = 8  # of the range `category`; beyond them they begin again, with another dash
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])


class Panel(NamedTuple):
    """One drawing: its heading, what it shows for who cannot see it, and its specification."""

    title: str
    alt: str
    spec: Spec


class Chart(NamedTuple):
    """A figure: one panel, or several side by side that share a legend of (name, number of its colour and dash)."""

    caption: str
    panels: list[Panel]
    legend: Sequence[str] = ()


def layers(data: Sequence[Mapping[str, Any]], *marks: Spec, height: int, **more: Any) -> Spec:
    """A specification of some marks over the same data, as wide as its place on the page."""
    return {"data": {"values": list(data)}, "width": "container", "height": height, "layer": list(marks), **more}


def quantity(name: str, title: str | None, **scale: Any) -> Spec:
    return {"field": name, "type": "quantitative", "title": title, "scale": scale}


def named(name: str, title: str | None = None, **more: Any) -> Spec:
    return {"field": name, "type": "nominal", "title": title, **more}


def tips(*fields: tuple[str, str] | tuple[str, str, str]) -> list[Spec]:
    """What is shown of a mark that is pointed at: (field, title), numbers with their format."""
    return [{"field": f, "title": t, **({"format": how[0]} if how else {})} for f, t, *how in fields]
