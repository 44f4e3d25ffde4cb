"""The progress of a stage over its units of work."""

import io
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

from common.run.stages import current, lines_only
from common.run.units import Units

EVERY = 30.0  # seconds, after which a line says how far a long piece of work is
T = TypeVar("T")


def counted(items: Iterable[T], name: str) -> Iterator[T]:
    """The items of a piece of work within a stage, one after the other: with a bar of its own on a terminal, and with a
    line for logs twice a minute if it takes so long."""
    going = current().going
    title = f"{current().reached}, {name}" if going and not going[0].units else name  # else a bar says where it is
    of = f" of {len(items)}" if isinstance(items, Sized) else ""
    bar, told = tqdm(items, desc=title, leave=False, disable=lines_only() or of == " of 0"), time.monotonic()
    for done, item in enumerate(bar, start=1):
        yield item
        if time.monotonic() - told >= EVERY:
            told = time.monotonic()
            current().tell(f"{current().reached}, {name}, {done}{of}")


class Nowhere(io.StringIO):
    """Where a bar is drawn that nobody shall see."""

    def write(self, text: str) -> int:
        return len(text)


class UnitBar(Units):
    """A progress bar over units of work, each of which moves it on in fractions and shows its loss."""

    def __init__(self, stage: str, units: int, noun: str = "units"):
        self.layout = (
            f"{{desc}} |{{bar:20}}| {{n:.1f}}/{{total}} {noun} [{{elapsed}} gone, {{remaining}} left{{postfix}}]"
        )
        super().__init__(stage=stage)
        self.units = units
        self.bar: Any = None

    @contextmanager
    def unit(self, name: str, count: int = 1) -> Iterator[None]:
        """One unit of work, or `count`, shown by its name."""
        self.bar.set_description_str(f"{self.heading}: {name}", refresh=False)
        before = self.done
        with super().unit(name, count):
            yield
        if self.done > before:
            self.bar.update(self.done - self.bar.n)
            current().unit_done(name)

    @property
    def heading(self) -> str:
        """The stage, and which of all it is."""
        return " ".join(filter(None, (current().where, self.stage)))

    @property
    def reached(self) -> float:
        return self.bar.n if self.bar is not None else 0

    @property
    def wanted(self) -> int:
        return self.bar.total if self.bar is not None else self.units

    def advance(self, fraction: float, loss: float) -> None:
        """Say how many units are done of what is being worked on, and how large its loss is."""
        self.loss = loss
        self.bar.set_postfix_str(", ".join(filter(None, (f"loss {loss:.4f}", current().left))), refresh=False)
        self.bar.update(self.done + fraction - self.bar.n)

    def keep(self, count: int = 1) -> None:
        """The work was done before: it takes no time and shall not count in the estimate of what is left."""
        super().keep(count)
        self.bar.total -= count
        self.bar.refresh()

    def add(self, units: Units, who: str, took: Mapping[str, Any]) -> None:
        """Count and show what a worker did in a process of its own."""
        names, before = ", ".join(units.names), self.done
        self.bar.set_description_str(f"{self.heading}: {names}", refresh=False)
        super().add(units, who, took)
        if self.done > before:
            self.bar.update(self.done - self.bar.n)
            current().unit_done(names)

    def __enter__(self) -> "UnitBar":
        file = Nowhere() if lines_only() else sys.stderr
        looks = {"desc": self.heading, "bar_format": self.layout, "mininterval": 0.5, "smoothing": 0.05}
        self.bar = tqdm(total=self.units, file=file, **looks)
        return self

    def __exit__(self, *failure: object) -> None:
        self.bar.set_description_str(self.heading + (f" ({self.kept} kept)" if self.kept else ""))
        self.bar.close()
