"""The table of results as the paper sets it, in LaTeX."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from common.evaluation.tables import MISSING
from common.report.lines import INTERVAL, Line

TEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    | {MISSING: "--", "±": r"$\pm$", "Δ": r"$\Delta$", "α": r"$\alpha$", "λ": r"$\lambda$", "τ": r"$\tau$"}
)


def latex_of(head: Sequence[str], lines: Sequence[Line], run: bool = False) -> str:
    """The table as the paper sets it, for the package booktabs: pretrained and individual, merges that use data, and
    those without. Each start has what was adapted from it below and a little space around; what was adapted from the
    pretrained model comes before the merges without data. `run` puts the run's name in front. Costs and intervals are
    left out.
    """
    shown = [i for i, name in enumerate(head) if name not in ("Time", "Memory", INTERVAL)]
    first = ["Run", "Method"] if run else ["Method"]
    body, before = [row_of([*first, *(head[i] for i in shown)])], Family("", -1, [])
    for family in families(lines):
        if (family.run, family.place) != (before.run, before.place):
            body.append(r"\midrule")
        elif family.is_adapted or before.is_adapted:
            body.append(r"\addlinespace")
        for line in family.lines:
            names = [line.run, line.name] if run else [line.name]
            body.append(row_of([*names, *(line.cells[i].text for i in shown)]))
        before = family
    columns = "l" * len(first) + "c" * len(shown)
    begin = [r"% \usepackage{booktabs}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    return "\n".join([*begin, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


class Family(NamedTuple):
    """A start and what was adapted from it; the ends of a run; or what was adapted from the pretrained model.

    place: 0 of the ends, 1 of merges that use data, 2 of the others.
    """

    run: str
    place: int
    lines: list[Line]

    @property
    def is_adapted(self) -> bool:
        return any(line.group == "fda" for line in self.lines)


def families(lines: Iterable[Line]) -> list[Family]:
    """The lines of each run, in the order of the places; each start comes with what was adapted from it behind it."""
    found: list[Family] = []
    for line in lines:
        place = {"end": 0, "data": 1}.get(line.group, 2)
        last = found[-1] if found and found[-1].run == line.run else None
        if last and line.group == "fda" and last.place:
            place = last.place
        if last and last.place == place and (line.group in ("end", "fda") or line.kind == "paper"):
            last.lines.append(line)
        else:
            found.append(Family(line.run, place, [line]))
    runs = list(dict.fromkeys(family.run for family in found))
    return sorted(found, key=lambda family: (runs.index(family.run), family.place))


def row_of(texts: Iterable[str]) -> str:
    """A row of a LaTeX table."""
    return " & ".join(re.sub(r"(?<![\w.])-(?=\d)", "$-$", text.translate(TEX)) for text in texts) + r" \\"
