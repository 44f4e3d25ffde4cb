"""How far a command is: its stages in order, what a unit of each kind takes, and who is told when a unit is done."""

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
    done and when a stage has ended well. place: of the stage that goes on, in `expected`. last: what was said of the
    one before. going: the stage, and those within it.
    """

    expected: list[str] = field(default_factory=list)
    watchers: list[Callable[[], None]] = field(default_factory=list)
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
            self.last = self.said
            self.going.remove(now)
        self.tell()

    def measure(self, stage: Going, done: float) -> None:
        """Note what a stage took."""
        pace = self.paces.setdefault(kind_of(stage.name), Pace())
        pace.seconds += time.monotonic() - stage.began
        pace.units += done
        pace.size = stage.units.done + stage.units.kept if stage.units else 1

    def tell(self) -> None:
        """Call the watchers."""
        for watcher in list(self.watchers):
            watcher()

    @property
    def where(self) -> str:
        """ "stage 3 of 9", if it is known."""
        return f"stage {self.place + 1} of {len(self.expected)}" if self.place >= 0 else ""

    @property
    def said(self) -> str:
        """Where the command is, in words: stage, units and the time that is left; of one between stages, the last."""
        if not self.going:
            return self.last or "the beginning"
        now = self.going[0]
        units = f"{now.units.reached:.0f} of {now.units.wanted} units" if now.units else ""
        return ", ".join(filter(None, (self.where, now.name, units, self.left)))

    def seconds_left(self) -> tuple[float, bool]:
        """Seconds that are left by what units took so far, and whether every kind that is to come was measured."""
        kinds = [kind_of(key.partition(": ")[2]) for key in self.expected[self.place + 1 :]]
        paces, left = dict(self.paces), 0.0
        if self.going and self.going[0].units:
            now, units = self.going[0], self.going[0].units
            before = paces.get(kind_of(now.name), Pace())
            spent, reached = before.seconds + time.monotonic() - now.began, before.units + units.reached
            paces[kind_of(now.name)] = Pace(spent, reached, units.wanted)
            left += spent / reached * max(0, units.wanted - units.reached) if reached else 0
        known = [paces[kind] for kind in kinds if kind in paces and paces[kind].units]
        left += sum(pace.seconds / pace.units * pace.size for pace in known)
        return left, len(known) == len(kinds)

    @property
    def left(self) -> str:
        """The time that is left in words; "" if nothing was measured or no stages are expected."""
        seconds, all_known = self.seconds_left()
        if not self.expected or not seconds:
            return ""
        return f"{'about' if all_known else 'more than'} {in_words(seconds)} left in all"


def named(run: str, stage: str) -> str:
    """What `Stages.expected` calls a stage of a run."""
    return f"{run}: {stage}"


def kind_of(stage: str) -> str:
    """What kind of stage it is: construct, merge, adapt, score, search."""
    return stage.partition(" ")[0]


def in_words(seconds: float) -> str:
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
