"""The tables of the paper, configs/paper_results.yaml, whose head explains what they hold."""

from functools import cache
from typing import Any

from common.config import ROOT
from common.core.errors import InputError
from common.io.yaml_files import read_yaml_file


@cache
def paper_tables() -> dict[str, Any]:
    """{name: table}, read once."""
    return read_yaml_file(ROOT / "configs" / "paper_results.yaml")


def paper_table(name: str) -> dict[str, Any] | None:
    """The table that eval.paper_table names, None for ""; InputError if there is none of that name."""
    if name and name not in paper_tables():
        raise InputError(f"eval.paper_table: unknown table {name!r}; choose from {', '.join(paper_tables())}")
    return paper_tables()[name] if name else None
