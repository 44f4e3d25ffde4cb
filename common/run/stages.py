"""How far a command is: its stages in order, what a unit of each kind takes, and who is told when a unit is done."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from common.run.units import Units


@dataclass
class Pace:
    """What the stages of one kind took: seconds for so many units, and the units of the last such stage."""

    seconds: float = 0.0
    units: float = 0.0
    size: int = 1


@dataclass
class Going:
    """A stage that goes on."""

    name: str
    units: Units | None
    began: float


@dataclass
class Stages:
    """The stages of one command.

    expected: "run: stage" of all that are to come, in order, as far as it is known. watchers: called when a unit is
    done and when a stage has ended well. listeners: handed a line of text on each. place: of the stage that goes on, in
    `expected`. last: how far the one before came. going: the stage, and those within it.
    """

    expected: list[str] = field(default_factory=list)
    watchers: list[Callable[[], None]] = field(default_factory=list)
    listeners: list[Callable[[str], None]] = field(default_factory=list)
    place: int = -1
    last: str = ""
    going: list[Going] = field(default_factory=list)
    paces: dict[str, Pace] = field(default_factory=dict)

    def expect(self, names: Sequence[str]) -> None:
        """Say which stages the command will go through."""
        self.expected, self.place = list(names), -1

    @contextmanager
    def stage(self, run: str, name: str, units: Units | None = None) -> Iterator[None]:
        """One stage of a run; those that were expected before it had nothing left to do."""
        key = named(run, name)
        if key in self.expected[self.place + 1 :]:
            self.place = self.expected.index(key, self.place + 1)
        now = Going(name, units, time.monotonic())
        self.going.append(now)
        try:
            yield
            self.measure(now, done=units.done if units else 1)
        finally:
            within = "" if now is self.going[0] else f"{name} "
            self.last = self.reached
            self.going.remove(now)
        took = f"{self.last}, {within}done in {seconds_in_words(time.monotonic() - now.began)}"
        self.tell(f"{took}, {units.kept} kept" if units and units.kept else took)

    def measure(self, stage: Going, done: float) -> None:
        """Note what a stage took."""
        pace = self.paces.setdefault(kind_of(stage.name), Pace())
        pace.seconds += time.monotonic() - stage.began
        pace.units += done
        pace.size = stage.units.done + stage.units.kept if stage.units else 1

    def unit_done(self, name: str) -> None:
        """Tell that a unit of the stage that goes on is done."""
        if not self.going:
            return self.tell("")
        units, left = self.going[0].units, self.seconds_of_stage()
        loss = f"loss {units.loss:.4f}" if units and units.loss is not None else ""
        parts = [self.reached, name, loss, f"{seconds_in_words(left)} left" if left else "", self.left]
        self.tell(", ".join(filter(None, parts)))

    def tell(self, line: str) -> None:
        """Hand a line to the listeners, if it says anything, and call the watchers."""
        for listener in list(self.listeners) if line else []:
            listener(line)
        for watcher in list(self.watchers):
            watcher()

    @property
    def where(self) -> str:
        """ "stage 3 of 9", if it is known."""
        return f"stage {self.place + 1} of {len(self.expected)}" if self.place >= 0 else ""

    @property
    def reached(self) -> str:
        """How far the command is, in words: stage and units; of one between two stages, the last."""
        if not self.going:
            return self.last or "the beginning"
        now = self.going[0]
        units = f"{now.units.reached:.0f} of {now.units.wanted} units" if now.units else ""
        return ", ".join(filter(None, (self.where, now.name, units)))

    @property
    def said(self) -> str:
        """How far the command is, and the time that is left."""
        return ", ".join(filter(None, (self.reached, self.left)))

    def pace_of_stage(self) -> Pace | None:
        """What units of the kind that goes on took, those of this stage so far among them; None if it counts none."""
        if not self.going or not (units := self.going[0].units):
            return None
        now = self.going[0]
        before = self.paces.get(kind_of(now.name), Pace())
        return Pace(
            before.seconds + time.monotonic() - now.began, before.units + units.reached, units.wanted + units.kept
        )

    def seconds_of_stage(self) -> float:
        """Seconds that are left of the stage that goes on; 0 if nothing was measured."""
        pace = self.pace_of_stage()
        if not pace or not pace.units or not (units := self.going[0].units):
            return 0.0
        return pace.seconds / pace.units * max(0.0, units.wanted - units.reached)

    def seconds_left(self) -> tuple[float, bool]:
        """Seconds that are left by what units took so far, and whether every kind that is to come was measured."""
        kinds, paces = [kind_of(key.partition(": ")[2]) for key in self.expected[self.place + 1 :]], dict(self.paces)
        if pace := self.pace_of_stage():
            paces[kind_of(self.going[0].name)] = pace
        known = [paces[kind] for kind in kinds if kind in paces and paces[kind].units]
        later = sum(pace.seconds / pace.units * pace.size for pace in known)
        return self.seconds_of_stage() + later, len(known) == len(kinds)

    @property
    def left(self) -> str:
        """The time that is left in words; "" if nothing was measured or no stages are expected."""
        seconds, all_known = self.seconds_left()
        if not self.expected or not seconds:
            return ""
        return f"{'about' if all_known else 'more than'} {seconds_in_words(seconds)} left in all"


def named(run: str, stage: str) -> str:
    """What `Stages.expected` calls a stage of a run."""
    return f"{run}: {stage}"


def kind_of(stage: str) -> str:
    """What kind of stage it is: construct, merge, adapt, score, search."""
    return stage.partition(" ")[0]


def seconds_in_words(seconds: float) -> str:
    """A time in the unit that is worth reading."""
    size, unit = next((s, u) for s, u in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 2 * s or s == 1)
    return f"{seconds / size:.1f} {unit}"


_CURRENT: ContextVar[Stages] = ContextVar("stages")


def current() -> Stages:
    """The stages of the command that runs; outside of one, some that nobody watches."""
    return _CURRENT.get(None) or Stages()


@contextmanager
def command_stages() -> Iterator[Stages]:
    """The stages of a command; within another command, those of that one."""
    if _CURRENT.get(None):
        yield current()
        return
    token = _CURRENT.set(Stages())
    try:
        yield current()
    finally:
        _CURRENT.reset(token)


def lines_only() -> bool:
    """Whether progress is told in lines of text alone: in a command whose standard error is no terminal."""
    return bool(current().listeners) and not sys.stderr.isatty()
