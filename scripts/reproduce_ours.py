"""The tables of our own pages for scripts/reproduce.py: the commands that made each, how long they take, which cells
of the committed file differ from what they come to now, and whether that is beyond the error."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from common.analysis.material import plain
from common.config import ROOT, Config
from common.core.errors import InputError
from common.evaluation.rows import Row, read_results, row_name
from common.evaluation.scoring import RESULTS
from common.evaluation.significance import difference, in_words, scores_of
from common.evaluation.tables import MISSING
from common.io.checkpoints import write_text
from common.run.run_log import CLOCKS
from compare import compare
from regime import regime
from reproduce_tables import config_of, domain_of
from study import RATES, study

TIMES = ROOT / "configs/our_tables.yaml"


class Ours(NamedTuple):
    """A table of our own pages: what scripts/make_toy.py makes for it, the config, and the options of each command.

    by: whose commands they are: compare, regime, or the kind of a study.
    """

    toys: tuple[tuple[str, ...], ...]
    config: str
    commands: tuple[tuple[str, ...], ...] = ((),)
    by: str = "compare"


def toy(name: str, *options: str) -> tuple[str, ...]:
    """The options of scripts/make_toy.py."""
    return (name, "--out", f"toy/{name}", *options)


VISION, NLU, NLG, MINILM, SMOLLM = ((toy(name),) for name in ("vision", "nlu", "nlg", "minilm", "smollm"))
RATED = tuple(("vision", "--out", f"toy/vision-{rate}", "--rate", rate) for rate in RATES)
FIVE = "--compare.seeds=[0,1,2,3,4]"
EVERY = "--compare.starts=[pretrained,ta,tsv,wudi,swudi_a]"
FOUR, GOOD = "--compare.starts=[pretrained,ta,tsv,wudi]", "--compare.starts=[tsv,wudi]"
LONG = ("--run.name=long", "--anchors.number=48", "--anchors.steps=300")
RIDGE = ("--run.name=ridge", "--compare.starts=[swudi_a]", "--adapt.warm_start=regmean")
RIDGES = ("0", "0.01", "0.1", "1", "10", "30", "100")
GUARD = ("--run.name=guard", "--compare.seeds=[0,1,2]", EVERY)
MANY = (
    "--compare.starts=[pretrained,average,ta,rws,ties,dare_ta,dare_ties,breadcrumbs,pcb,sce,varm,consensus_ta,tsv,dc_merge,"
    "star,cart,iso_c,iso_cts,wudi,wudi_exact,swudi,swudi_a,optmerge,actmat,tact,ace,doge_ta,opcm,widen,"
    "pact+wudi,pact+swudi_a,ta+svc,tsv+svc,fisher,regmean,regmean_pp,adamerging,prodistill,fw_merging,"
    "expert_merging]"
)
WITH_SCORES = {"compare": "", "regime": "regime"}  # whose file is results.json, and where in the run's folder
DEMOS = tuple(f"{folder}/results/demo.json" for folder in ("Vision", "NLU", "NLG"))
OURS = {
    DEMOS[0]: Ours(VISION, "vision/toy"),
    DEMOS[1]: Ours(NLU, "nlu/toy"),
    DEMOS[2]: Ours(NLG, "nlg/toy"),
    "Vision/results/regime.json": Ours(VISION, "vision/toy", by="regime"),
    "Vision/results/map.json": Ours(
        VISION,
        "vision/toy",
        (("--run.name=map", "--compare.search={ta: {scale: {map: {low: 0, high: 0.6, samples: 60}}}}"),),
        "regime",
    ),
    "Vision/results/toy.json": Ours(VISION, "vision/toy", (("--run.name=toy", EVERY, FIVE),)),
    "Vision/results/long.json": Ours(
        VISION,
        "vision/toy",
        (
            (*LONG, FOUR),
            (*LONG, GOOD, "--adapt.epochs=5", "--adapt.label=e5"),
            (*LONG, GOOD, "--adapt.epochs=25", "--adapt.label=e25"),
            (*LONG, GOOD, "--adapt.lr=1e-3", "--adapt.label=lr1e-3"),
        ),
    ),
    "Vision/results/cut.json": Ours(
        VISION,
        "vision/toy",
        (GUARD, (*GUARD, "--adapt.label=cut", "--compare.search={fda: {blend: [0.2,0.4,0.6,0.8,1.0]}}")),
    ),
    "Vision/results/weights.json": Ours(
        VISION,
        "vision/toy",
        (("--run.name=weights-size", "--anchors.weights=size", "--compare.seeds=[0,1,2]", FOUR),),
    ),
    "Vision/results/ridge.json": Ours(
        VISION,
        "vision/toy",
        (
            *((*RIDGE, "--adapt.epochs=0", f"--adapt.ridge={r}", f"--adapt.label=ridge {r}") for r in RIDGES),
            (*RIDGE, "--adapt.epochs=100", "--adapt.ridge=1", "--adapt.label=ridge 1 epochs"),
        ),
    ),
    "Vision/results/studies/real.json": Ours(VISION, "vision/toy", ((FOUR,),), "real"),
    "Vision/results/studies/cost.json": Ours(
        VISION,
        "vision/toy",
        (("--run.name=cost", "--compare.starts=[pretrained,ta,tsv,wudi,swudi_a,regmean_pp,prodistill]"),),
        "cost",
    ),
    "Vision/results/studies/methods.json": Ours(
        VISION, "vision/toy", (("--run.name=methods", "--run.workers=1", "--compare.seeds=[0,1,2]", MANY),), "methods"
    ),
    "Vision/results/studies/rates.json": Ours((*VISION, *RATED), "vision/toy", ((FOUR,),), "rates"),
    "Vision/results/studies/ablations.json": Ours(VISION, "vision/toy", by="ablations"),
    "Vision/results/studies/tasks.json": Ours(VISION, "vision/toy", ((FOUR,),), "tasks"),
    "NLU/results/minilm_regime.json": Ours(MINILM, "nlu/minilm", by="regime"),
    "NLU/results/minilm.json": Ours(MINILM, "nlu/minilm", ((FIVE,),)),
    "NLU/results/studies/methods.json": Ours(
        MINILM,
        "nlu/minilm",
        (
            (
                "--run.name=minilm-methods",
                "--run.workers=1",
                "--compare.seeds=[0]",
                "--compare.starts=[pretrained,swudi_a,wudi,tsv,iso_cts]",
            ),
        ),
        "methods",
    ),
    "NLG/results/smollm_regime.json": Ours(
        SMOLLM, "nlg/smollm", (("--compare.search={ta: {scale: [0.6,0.8,1.0]}}",),), "regime"
    ),
    "NLG/results/smollm.json": Ours(SMOLLM, "nlg/smollm", ((FIVE,),)),
    "NLG/results/smollm_swudi.json": Ours(
        SMOLLM,
        "nlg/smollm",
        (("--run.name=smollm-guard", "--compare.seeds=[0]", "--compare.starts=[pretrained,swudi_a]"),),
    ),
    "NLG/results/smollm_mlp.json": Ours(
        SMOLLM,
        "nlg/smollm",
        (("--run.name=smollm_mlp", "--compare.starts=[ta,tsv,wudi]", "--adapt.rest=pretrained", "--adapt.label=mlp"),),
    ),
}


def configs_of(name: str, options: Sequence[str]) -> list[Config]:
    """The config of each command behind a table."""
    return [config_of(OURS[name].config, [*own, *options]) for own in OURS[name].commands]


def make(name: str, options: Sequence[str]) -> None:
    """Make the toys that the table needs, unless they are there, and run its commands; what is there is kept."""
    for made in OURS[name].toys:
        if subprocess.run([sys.executable, str(ROOT / "scripts/make_toy.py"), *made]).returncode:
            raise InputError(f"the toy {made[2]} of {name} could not be made, see above")
    for config in configs_of(name, options):
        command_of(OURS[name].by)(config, domain_of(config))


def command_of(by: str) -> Any:
    """(config, domain) -> None."""
    return {"compare": compare, "regime": regime}.get(by, partial(study, by))


def describe(name: str, options: Sequence[str]) -> list[str]:
    """Print the commands behind the table and how long they take. Nothing of it is refused before it is made."""
    table = OURS[name]
    script = f"{table.by}.py" if table.by in WITH_SCORES else f"study.py {table.by}"
    for made in table.toys:
        state = "there" if Path(made[2]).is_dir() else "made first"
        print(f"  {state:10} {made[2]}: python scripts/make_toy.py {' '.join(made)}")
    for own in table.commands:
        said = " ".join(f"'{option}'" if set(option) & set(" {}[]") else option for option in [*own, *options])
        print(f"  python scripts/{script} --config configs/{table.config}.yaml {said}".rstrip())
    configs_of(name, options)  # refuses options that there are not
    print(f"  {time_of(name)}")
    return []


def time_of(name: str) -> str:
    """How long it takes, and how that is known."""
    minutes, how = yaml.safe_load(TIMES.read_text(encoding="utf-8"))[name]
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
    else:
        said = moved(cells_of_study(ROOT / name), cells_of_study(made))
    text = f"{name}\n\n{said}"
    write_text(made.with_name("reproduced.md"), text)
    return text


def made_by(by: str, folder: Path) -> Path:
    """The file that a command writes in the folder of its run."""
    if by in WITH_SCORES:
        return folder / WITH_SCORES[by] / RESULTS
    return folder / "study" / by / "rows.json"


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
        f"- Avg of {name}, now against committed: {in_words(gain, percent=False)}\n"
        for name, gain in gains.items()
        if gain and any(gain)
    )
