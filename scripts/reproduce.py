"""Every table, of the paper and of our own pages, by one command.

python scripts/reproduce.py table5                              the paper's table, ours beside it; resumes
python scripts/reproduce.py table5 --anchors published          with the anchors that the authors released
python scripts/reproduce.py all --dry-run                       what it reads, needs and costs, nothing fetched
python scripts/reproduce.py toys                                the demos again: does any committed cell move?
python scripts/reproduce.py Vision/results/toy.json             any committed table by its file

Several names may be given. What stands behind them goes to every run, as to scripts/compare.py: --run.device cuda.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from common.command import parse
from common.config import ROOT, Config
from common.core.errors import InputError
from common.domain import FOLDERS, Domain, scored_tests
from common.evaluation.rows import Row, read_results, row_name, values_by_name
from common.evaluation.scoring import paper_table, results_of
from common.evaluation.significance import scores_of
from common.evaluation.tables import MISSING, aligned, cell, published_values
from common.io.checkpoints import write_text
from common.io.hub import headers_only
from common.planning.dry_run import needs
from compare import compare, plan

SETTINGS = "anchor-64-scale-{scale}-opt-1200-0.01"
VISION = {"gauss": f"init_by_gauss_random-{SETTINGS}", "weight": f"init_by_weights-{SETTINGS}"}
NLU = {"gauss": f"init_by_gauss_random_pos-{SETTINGS}", "weight": f"init_by_weights_pos-{SETTINGS}"}
SCALES = {"gauss": "0.01", "weight": "1.0"}


class Paper(NamedTuple):
    """A table of the paper: our config of it, and the folders of the released anchors by initialisation, if known."""

    config: str
    released: str = ""

    def anchors(self, init: str) -> str:
        """anchors.source of the released anchors with an initialisation."""
        names = VISION if self.config.startswith("vision") else NLU
        task = "{task}" if self.config.startswith("vision") else "{slug}"
        return f"hf://datasets/{self.released}/{names[init].format(scale=SCALES[init])}/{task}"


class Ours(NamedTuple):
    """A table of our own pages: the toy or model that it needs, the config, and the options of compare."""

    toy: str
    config: str
    options: tuple[str, ...] = ()


PAPER = {
    "table1": Paper("vision/vit_b16"),
    "table2": Paper("nlu/roberta_large", "SphereLab/FDA_for_NLU/roberta-large"),
    "table3": Paper("nlg/llama2_13b"),
    "table5": Paper("vision/vit_b32", "SphereLab/FDA_for_Vision/ViT-B-32"),
    "table6": Paper("vision/vit_l14", "SphereLab/FDA_for_Vision/ViT-L-14"),
    "table7": Paper("nlu/roberta_base", "SphereLab/FDA_for_NLU/roberta-base"),
}
FIVE = "--compare.seeds=[0,1,2,3,4]"
OURS = {
    "Vision/results/demo.json": Ours("vision", "vision/toy"),
    "NLU/results/demo.json": Ours("nlu", "nlu/toy"),
    "NLG/results/demo.json": Ours("nlg", "nlg/toy"),
    "Vision/results/toy.json": Ours(
        "vision", "vision/toy", ("--run.name=toy", "--compare.starts=[pretrained,ta,tsv,wudi,swudi_a]", FIVE)
    ),
    "NLU/results/minilm.json": Ours("minilm", "nlu/minilm", (FIVE,)),
    "NLG/results/smollm.json": Ours("smollm", "nlg/smollm", (FIVE,)),
}
SETS = {
    "all": tuple(PAPER),
    "toys": tuple(name for name in OURS if name.endswith("demo.json")),
    "ours": tuple(OURS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join([*PAPER, *SETS])}, or a committed table")
    parser.add_argument("--anchors", choices=["own", "published"], default="own", help="whose anchors (default: own)")
    parser.add_argument("--dry-run", action="store_true", help="say what each run would read, make and need")
    args, options = parser.parse_known_args()
    try:
        names = chosen(args.names)
        if args.anchors == "published":
            require_released(names)
        runs = [(name, config) for name in names for config in configs_of(name, args.anchors, options)]
        refused = [sentence for name, config in runs for sentence in reproduce(name, config, args.dry_run)]
        if not args.dry_run:
            for name in names:
                verdict(name, next(config for other, config in reversed(runs) if other == name))
    except InputError as error:
        refused = [str(error)]
    if refused:
        print("\n".join(f"error: {sentence}" for sentence in refused), file=sys.stderr)
        sys.exit(2)


def chosen(words: Sequence[str]) -> list[str]:
    """The tables that names of tables and of sets mean, each once."""
    names = [name for word in words for name in SETS.get(word, (word,))]
    for name in names:
        if name not in PAPER and name not in OURS:
            raise InputError(f"no table is called {name!r}; choose from {', '.join([*PAPER, *SETS, *OURS])}")
    return list(dict.fromkeys(names))


def require_released(names: Sequence[str]) -> None:
    """InputError if no anchors of a table are known to be released."""
    for name in names:
        if name not in PAPER or not PAPER[name].released:
            with_some = ", ".join(known for known, table in PAPER.items() if table.released)
            raise InputError(f"--anchors published: none are known for {name}, only for {with_some}; leave it out")


def configs_of(name: str, anchors: str, options: Sequence[str]) -> Iterator[Config]:
    """The runs of a table: one, or with the released anchors one for each initialisation, in one folder."""
    table = PAPER.get(name) or OURS[name]
    own = table.options if isinstance(table, Ours) else ()
    file = ROOT / "configs" / f"{table.config}.yaml"
    config = parse("", ["--config", str(file), *own, *options])
    if anchors == "own":
        yield config
        return
    config = replace(config, run=replace(config.run, name=f"{config.run.name}_published"))
    for init in config.compare.inits:
        source = replace(config.anchors, source=cast(Paper, table).anchors(init))
        yield replace(config, anchors=source, compare=replace(config.compare, inits=[init]))


def reproduce(name: str, config: Config, dry: bool) -> list[str]:
    """Make what a table is made of, or say what that takes; returns what a dry run finds refused."""
    domain = cast(Domain, import_module(f"{FOLDERS[config.domain]}.domain"))
    print(f"\n==== {name}: {config.run.dir} ====", flush=True)
    if not dry:
        make_inputs(name)
        compare(config, domain)
        return []
    if name in OURS and not (folder := Path("toy", OURS[name].toy)).is_dir():
        print(f"{folder} is made first: python scripts/make_toy.py {folder.name} --out {folder}")
        return []
    try:
        with headers_only():
            planned = plan(config, domain)
    except InputError as error:  # the hub cannot be asked: what the architecture tells
        nowhere = replace(config.model, root="not fetched", base=Path(config.model.base).name)
        print("\n".join(needs(replace(config, model=nowhere), domain)))
        return [f"{name}: {error}"]
    print(planned.text.partition("\n\n")[2])  # without the config, which stands in its file
    return [f"{name}: {sentence}" for sentence in planned.refusals]


def make_inputs(name: str) -> None:
    """Make the toy of one of our own tables, unless it is there."""
    if name in OURS:
        toy = OURS[name].toy
        command = [sys.executable, str(ROOT / "scripts/make_toy.py"), toy, "--out", f"toy/{toy}"]
        if subprocess.run(command).returncode:
            raise InputError(f"the toy {toy} of {name} could not be made, see above")


def verdict(name: str, config: Config) -> None:
    """Print what a table came to beside what is published or committed, and write it to reproduced.md of the run."""
    domain = cast(Domain, import_module(f"{FOLDERS[config.domain]}.domain"))
    text = f"{name}\n\n" + (beside_paper(config, domain) if name in PAPER else beside_committed(name, config))
    write_text(config.run.dir / "reproduced.md", text)
    print(f"\n==== {text}")


def beside_paper(config: Config, domain: Domain) -> str:
    """Avg of every row that the paper has too, Δ, and whether it is within the standard error of the test sets."""
    rows, tests = results_of(config), list(scored_tests(config, domain))
    ours, drawn = values_by_name(rows, tests), scores_of(rows, tests)
    published, percent = paper_table(config), domain.PERCENT
    if not published:
        raise InputError("eval.paper_table is empty: there is nothing to set beside our numbers")
    paper = published_values(published, tests)
    lines = [["Avg", "ours", "paper", "Δ", "standard error", "verdict"]]
    for row in filter(paper.__contains__, ours):
        gap = ours[row][-1] - paper[row][-1]
        error = float(np.std(np.mean(list(drawn[row].values()), 0)[1:])) if row in drawn else math.nan
        said = MISSING if math.isnan(error) else "within" if abs(gap) <= error else "beyond"
        numbers = (cell(ours[row][-1], percent), cell(paper[row][-1], percent), cell(gap, percent, "+"))
        lines.append([row, *numbers, cell(error, percent), said])
    return aligned(lines)


def beside_committed(name: str, config: Config) -> str:
    """Which cells differ from those of the committed file, of every seed."""
    found, known = by_cell(results_of(config)), by_cell(read_results(ROOT / name)[0])
    moved = [
        f"- {' '.join(map(str, filter(None, key)))}: {known.get(key, MISSING)}, now {found.get(key, MISSING)}\n"
        for key in sorted(known.keys() | found.keys(), key=str)
        if known.get(key) != found.get(key)
    ]
    return f"{len(known)} cells are committed, {len(moved)} moved\n" + "".join(moved)


def by_cell(rows: Iterable[Row]) -> dict[tuple, float]:
    """{(row, task, seed): value}."""
    return {(row_name(row), row["task"], row.get("seed")): row["value"] for row in rows}


if __name__ == "__main__":
    main()
