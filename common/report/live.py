"""The page of a run that goes on, rewritten after each unit of work, so that it can be watched from elsewhere.

What goes wrong with a page is said once and spoils nothing: the run's results are in its other files.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from common.config import Config, as_dict
from common.core.errors import InputError
from common.core.notices import warn
from common.domain import Domain
from common.opening import open_experiment
from common.report.page import State, what_is_missing, write_page
from common.report.reading import REPORT, is_run, read_run
from common.report.vectors import measure
from common.run.stages import Stages

EVERY = 5.0  # seconds between two pages at least
SHARE = 100  # and so many times what a page takes, so that pages take one percent of the time at most


class LivePage:
    """The page of a run while it goes on."""

    def __init__(self, config: Config, domain: Domain, stages: Stages):
        self.config, self.domain, self.stages = config, domain, stages
        self.file = config.run.dir / REPORT
        self.next, self.measured = 0.0, False

    def update(self) -> None:
        """Write the page anew, unless that was done just now; between two stages measure the task vectors first."""
        began = time.monotonic()
        if not self.stages.going and not self.measured:
            self.measure()
        if began >= self.next:
            self.write(State("going", f"Running: {self.stages.said}."), refresh=10)
            self.next = time.monotonic() + max(EVERY, SHARE * (time.monotonic() - began))

    def finish(self, error: BaseException | None) -> None:
        """Write the last page."""
        if not is_run(self.config.run.dir) or (isinstance(error, InputError) and not self.next):
            return  # nothing was made, or what is there is of a run that was not this one
        left_out = "" if error else self.measure()
        how = "interrupted" if isinstance(error, KeyboardInterrupt) else f"stopped by {type(error).__name__}"
        text = f"Not finished: {how} in {self.stages.said}." if error else f"Finished. {left_out}"
        self.write(State("stopped" if error else "finished", text.strip()))

    def measure(self) -> str:
        """Measure the task vectors; a sentence if they are left out."""
        self.measured = True
        with quietly("the task vectors were not measured"):
            left_out = measure(open_experiment(self.config, self.domain, False), self.config.run.report == "full")
            return f"Task vectors {left_out}." if left_out else ""
        return "Task vectors could not be measured."

    def write(self, state: State, refresh: int = 0) -> None:
        with quietly(f"{self.file} could not be written"):
            write_page(self.file, [read_run(self.config.run.dir, as_dict(self.config))], state, refresh)


@contextmanager
def quietly(what: str) -> Iterator[None]:
    """Say in one sentence what went wrong, and go on."""
    try:
        yield
    except Exception as error:
        warn(f"{what}: {' '.join(str(error).split()) or type(error).__name__}; the results are not touched by that")


@contextmanager
def reported(config: Config, domain: Domain, stages: Stages) -> Iterator[None]:
    """While this goes on, keep the run's page up to date, and write its last one at the end; see run.report."""
    missing = what_is_missing()
    if config.run.report == "no" or missing:
        if missing and config.run.report != "no":
            warn(f"no {REPORT} is written: {missing} brings what draws it")
        yield
        return
    page, error = LivePage(config, domain, stages), None
    stages.watchers.append(page.update)
    try:
        yield
    except BaseException as stopped:
        error = stopped
        raise
    finally:
        stages.watchers.remove(page.update)
        page.finish(error)
