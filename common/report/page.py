"""One page for a run or several: self-contained HTML that opens offline, with tables to sort and figures to look at."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from common.core.errors import InputError
from common.core.notices import warn
from common.core.places import cache_folder
from common.io.checkpoints import write_text
from common.report import accuracy
from common.report.charts import COLOURS
from common.report.reading import RunRecord
from common.report.results import together
from common.report.sections import shown
from common.run.run_log import FINISHED, version_of

HERE = Path(__file__).parent
NEEDED = {"vl_convert": "vl-convert-python", "jinja2": "jinja2"}  # modules, and what brings them
VEGA_LITE = "6.4"
BUNDLE = f"import sys, vl_convert; sys.stdout.write(vl_convert.javascript_bundle(vl_version='{VEGA_LITE}'))"


class State(NamedTuple):
    """How far a run is. kind: going, stopped or finished."""

    kind: str
    text: str


def what_is_missing() -> str:
    """A sentence on what a page needs that is not installed; "" if all is there."""
    missing = [part for module, part in NEEDED.items() if not find_spec(module)]
    return f"pip install {' '.join(missing)} (the extra `report`)" if missing else ""


def write_page(file: Path, runs: Sequence[RunRecord], state: State | None = None, refresh: int = 0) -> Path:
    """Write the page of one run, or of several side by side.

    Args:
        file: Where to.
        runs: What to show.
        state: How far the run is; else what its notes say of its stages.
        refresh: After so many seconds a browser looks for a newer page; 0: never.
    Raises: InputError if a library for it is missing, or the file cannot be written.
    """
    if missing := what_is_missing():
        raise InputError(f"no page can be made of the results: {missing} brings what draws it")
    write_text(file, page(runs, state or noted_state(runs), refresh))
    return file


def page(runs: Sequence[RunRecord], state: State, refresh: int = 0) -> str:
    """The text of a page, see `write_page`."""
    several = len(runs) > 1
    return template().render(
        title=" and ".join(run.name for run in runs) if several else runs[0].name,
        state=state,
        written=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        refresh=refresh,
        runs=[shown(run, f"run{i}") for i, run in enumerate(runs)],
        together=together(runs) if several else None,
        together_seconds=accuracy.seconds(runs) if several else None,
        colours=COLOURS,
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        vega=vega(),
    )


@cache
def template() -> Any:
    """page.html; whatever is put into it is escaped, but the scripts and JSON, which cannot end their element."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    text = (HERE / "page.html").read_text(encoding="utf-8")
    for name in ("css", "script", "vega"):
        text = text.replace(f"{{{{ {name} }}}}", f"{{{{ as_is({name}) }}}}")

    def as_json(value: Any) -> Markup:
        return Markup(json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))

    environment.globals |= {"json": as_json, "as_is": lambda code: Markup(code.replace("</script", "<\\/script"))}
    environment.globals["is_text"] = lambda cell: cell[:1] not in "+-0123456789"  # an empty cell is none
    return environment.from_string(text)


# ---- the script that draws -------------------------------------------------------------------------------------------


@cache
def vega() -> str:
    """Vega, Vega-Lite and what embeds them as one script, from the package that has them.

    The package puts them together in two seconds, in a process of its own, as its engine asks for more address space
    than some machines let a process have; what came of it is kept in the cache folder.
    """
    kept = cache_folder() / f"vega-{version_of(NEEDED['vl_convert'])}-{VEGA_LITE}.js"
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", BUNDLE], capture_output=True, text=True, timeout=300)
    if done.returncode or "vegaEmbed" not in done.stdout:
        raise InputError(f"{NEEDED['vl_convert']} gives no script for the figures: {done.stderr.strip()[-300:]}")
    script = f"(function () {{\n{done.stdout}\n}})();"
    try:
        write_text(kept, script)
    except InputError as error:
        warn(f"{error}; every page takes two seconds more")
    return script


def noted_state(runs: Sequence[RunRecord]) -> State:
    """What the notes say: finished, or which stages are not."""
    open_ = [
        f"{run.name}, {stage} ({note['ended']})"
        for run in runs
        for stage, note in run.notes.items()
        if note["ended"] != FINISHED or note["units"] < note["units_of"]
    ]
    return State("stopped", f"Not finished: {'; '.join(open_)}.") if open_ else State("finished", "Finished.")
