"""Units of work: how many are done, and by whom."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from common.core.errors import InputError


@dataclass
class Units:
    """How much of a stage this session did, and how much it found done; it shows nothing.

    names: of the units that were looked at. loss: the last that was told, if any. workers: {who: what they did and what
    it took} of those who worked on it in other processes.
    """

    done: int = 0
    kept: int = 0
    stage: str = ""
    names: list[str] = field(default_factory=list)
    loss: float | None = None
    workers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def reached(self) -> float:
        """Units that this session did, with the part that is done of those it works on."""
        return self.done

    @property
    def wanted(self) -> int:
        """Units that this session has to do."""
        return self.done

    @contextmanager
    def unit(self, name: str, count: int = 1) -> Iterator[None]:
        """One unit of work, or `count`; a loss that is not finite inside becomes an InputError that names it."""
        kept = self.kept
        self.names.append(name)
        try:
            yield
        except FloatingPointError as error:
            raise InputError(f"{self.stage}: {name}: {error}") from error
        except Exception as error:
            error.add_note(f"{self.stage}, {name}")  # for the command to say
            raise
        if self.kept == kept:
            self.done += count

    def advance(self, fraction: float, loss: float) -> None:
        """Say how many units are done of what is being worked on, and how large its loss is."""
        self.loss = loss

    def keep(self, count: int = 1) -> None:
        """The work was done before: it takes no time and shall not count in the estimate of what is left."""
        self.kept += count

    def add(self, units: "Units", who: str, took: Mapping[str, Any]) -> None:
        """Count what a worker did in a process of its own: seconds, cpu_seconds, peak_gib, and where that was."""
        nothing = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_gib": 0.0, "units": []}
        record = self.workers.setdefault(who, {**took, **nothing})
        for clock in ("seconds", "cpu_seconds"):
            record[clock] = round(record[clock] + took[clock], 3)
        record["peak_gib"] = round(max(record["peak_gib"], took["peak_gib"]), 3)
        record["units"] += units.names
        self.done += units.done
        if units.kept:
            self.keep(units.kept)
        if units.loss is not None:
            self.advance(0, units.loss)
