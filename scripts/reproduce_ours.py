"""The tables of our own pages for scripts/reproduce.py: the commands that made each, how long they take, which cells
of the committed file differ from what they come to now, and whether that is beyond the error."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.analysis.material import plain
from common.analysis.registry import ANALYSES
from common.analysis.run import analyse
from common.command import watched
from common.config import ROOT, Config
from common.core.errors import InputError
from common.domain import Domain, module_of
from common.evaluation.rows import Row, read_results, row_name
from common.evaluation.scoring import RESULTS
from common.evaluation.significance import difference, difference_in_words, scores_of
from common.evaluation.tables import MISSING
from common.io.checkpoints import write_text
from common.io.yaml_files import read_yaml_file
from common.run.run_log import CLOCKS
from compare import compare
from our_tables import OURS, WITH_SCORES
from regime import regime
from reproduce_tables import config_of
from study import study

TIMES = ROOT / "configs/our_tables.yaml"


def configs_of(name: str, options: Sequence[str]) -> list[Config]:
    """The config of each command behind a table."""
    return [config_of(OURS[name].config, [*own, *options]) for own in OURS[name].commands]


def make(name: str, options: Sequence[str]) -> None:
    """Make the toys that the table needs, unless they are there, and run its commands; what is there is kept."""
    for made in OURS[name].toys:
        if subprocess.run([sys.executable, str(ROOT / "scripts/make_toy.py"), *made]).returncode:
            raise InputError(f"the toy {made[2]} of {name} could not be made, see above")
    for config in configs_of(name, options):
        with watched(config, domain := module_of(config.domain)):
            command_of(OURS[name].by)(config, domain)


def command_of(by: str) -> Any:
    """(config, domain) -> None."""
    if by in ANALYSES:
        return partial(analysed, by)
    return {"compare": compare, "regime": regime}.get(by, partial(study, by))


def analysed(name: str, config: Config, domain: Domain) -> None:
    """An analysis of models that are made and scored before."""
    compare(config, domain)
    analyse(name, config, domain)


def scripts_of(by: str) -> list[str]:
    """The scripts of a command, one after the other."""
    if by in ANALYSES:
        return ["compare.py", f"analyse.py {by}"]
    return [f"{by}.py" if by in WITH_SCORES else f"study.py {by}"]


def describe(name: str, options: Sequence[str]) -> list[str]:
    """Print the commands behind the table and how long they take. Nothing of it is refused before it is made."""
    table = OURS[name]
    for made in table.toys:
        state = "there" if Path(made[2]).is_dir() else "made first"
        print(f"  {state:10} {made[2]}: python scripts/make_toy.py {' '.join(made)}")
    for own in table.commands:
        said = " ".join(f"'{option}'" if set(option) & set(" {}[]") else option for option in [*own, *options])
        for script in scripts_of(table.by):
            print(f"  python scripts/{script} --config configs/{table.config}.yaml {said}".rstrip())
    configs_of(name, options)  # refuses options that there are not
    print(f"  {time_of(name)}")
    return []


def time_of(name: str) -> str:
    """How long it takes, and how that is known."""
    minutes, how = read_yaml_file(TIMES)[name]
    if minutes is None:
        return f"not measured: {how}"
    return f"{in_minutes(minutes)} of one core, at best half as long on two: {how}"


def in_minutes(minutes: float) -> str:
    if minutes < 1:
        return f"{60 * minutes:.0f} seconds"
    return f"{minutes:.2g} minutes" if minutes < 90 else f"{minutes / 60:.2g} hours"


# ---- the cells that moved --------------------------------------------------------------------------------------------


def verdict(name: str, options: Sequence[str]) -> str:
    """Which cells differ from those of the committed file, which reproduced.md of the run gets too."""
    made = made_by(OURS[name].by, configs_of(name, options)[-1].run.dir)
    if OURS[name].by in WITH_SCORES:
        said = moved(cells_of_scores(ROOT / name), cells_of_scores(made)) + shifted(ROOT / name, made)
        said += elsewhere(ROOT / name, made)
    else:
        cells = cells_of_analysis if OURS[name].by in ANALYSES else cells_of_study
        said = moved(cells(ROOT / name), cells(made))
    text = f"{name}\n\n{said}"
    write_text(made.with_name("reproduced.md"), text)
    return text


def made_by(by: str, folder: Path) -> Path:
    """The file that a command writes in the folder of its run."""
    if by in WITH_SCORES:
        return folder / WITH_SCORES[by] / RESULTS
    if by in ANALYSES:
        return folder / "analysis" / f"{by}.json"
    return folder / "study" / by / "rows.json"


def elsewhere(known: Path, found: Path) -> str:
    """A line on what the committed models and these were made on, if that is not the same or not known."""
    machines = [
        ", ".join(dict.fromkeys(row["made_on"] for row in read_results(file)[0] if "made_on" in row))
        for file in (known, found)
    ]
    before, now = (names or "what their rows do not say" for names in machines)
    if before == now:
        return ""
    return (
        f"- The committed models were made on {before}, these on {now}, "
        "where sums can be rounded otherwise: FDA's cells then move as from seed to seed\n"
    )


def cells_of_scores(file: Path) -> dict[tuple, Any]:
    """{(row, task, seed): value} of every seed."""
    rows: Iterable[Row] = read_results(file)[0]
    return {(row_name(row), row["task"], row.get("seed")): row["value"] for row in rows}


def cells_of_study(file: Path) -> dict[tuple, Any]:
    """{(what tells a row from the others, column): value to six digits} of a study, but for what is of one machine."""
    found, rows = {}, json.loads(file.read_text(encoding="utf-8"))
    for row in rows:
        key = tuple(str(row[part]) for part in ("name", "what", "at", "start", "init") if part in row)
        found |= {(*key, column): plain(value) for column, value in row.items() if not is_of_machine(column)}
    return found


def cells_of_analysis(file: Path) -> dict[tuple, Any]:
    """{(model, column): value to six digits} of an analysis that has a number of columns for each model."""
    models = json.loads(file.read_text(encoding="utf-8"))["models"]
    return {(name, *column): value for name, model in models.items() for column, value in leaves(plain(model))}


def leaves(nested: Mapping[str, Any]) -> Iterable[tuple[tuple[str, ...], Any]]:
    """(keys, value) of everything in nested dictionaries."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from (((key, *keys), leaf) for keys, leaf in leaves(value))
        else:
            yield (key,), value


def is_of_machine(column: str) -> bool:
    """Whether a column is of one machine on one day."""
    return column == "hardware" or column.endswith(CLOCKS)


def moved(known: Mapping[tuple, Any], found: Mapping[tuple, Any]) -> str:
    """How many cells are committed, and each of them that is another now; others that the run has are counted alone."""
    lines = [
        f"- {' '.join(str(part) for part in key if part not in (None, ''))}: "
        f"{known[key]}, now {found.get(key, MISSING)}\n"
        for key in sorted(known, key=str)
        if known[key] != found.get(key)
    ]
    besides = f", {more} not committed are there" if (more := len(found.keys() - known.keys())) else ""
    return f"{len(known)} cells are committed, {len(lines)} moved{besides}\n" + "".join(lines)


def shifted(known: Path, found: Path) -> str:
    """A line for each row of another Avg than the committed one: the difference, and whether it is beyond the error."""
    (rows, tests), (now, _) = read_results(known), read_results(found)
    committed, made = scores_of(rows, tests), scores_of(now, tests)
    gains = {name: difference(made[name], committed[name]) for name in committed if name in made}
    return "".join(
        f"- Avg of {name}, now against committed: {difference_in_words(gain, percent=False)}\n"
        for name, gain in gains.items()
        if gain and any(gain)
    )
