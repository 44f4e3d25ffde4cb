"""Every table and figure, of the paper and of our own pages, by one command.

python scripts/reproduce.py table5                              the paper's table, ours beside it; resumes
python scripts/reproduce.py table5 --anchors published          with the anchors that the authors released
python scripts/reproduce.py figure5                             the paper's figure, ours beside what it shows; resumes
python scripts/reproduce.py all --dry-run                       what it reads, needs and costs, nothing fetched
python scripts/reproduce.py demos                               the three demos again: does any committed cell move?
python scripts/reproduce.py toys --dry-run                      every table of our own pages, and how long each takes
python scripts/reproduce.py Vision/results/regime.json          any of them by its file

Several names may be given. What stands behind them goes to every run, as to scripts/compare.py: --run.device cuda.
"""

import argparse
from collections.abc import Sequence
from types import ModuleType

import reproduce_figures as figures
import reproduce_ours as ours
import reproduce_tables as tables
from common.command import answered
from common.core.errors import InputError
from our_tables import DEMOS, OURS
from reproduce_figures import FIGURES
from reproduce_tables import PAPER

SETS = {"all": (*PAPER, *FIGURES), "demos": DEMOS, "toys": tuple(OURS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = ", ".join([*PAPER, *FIGURES, *SETS])
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"{listed}, or a committed table of our pages")
    parser.add_argument("--anchors", choices=["own", "published"], default="own", help="whose anchors (default: own)")
    parser.add_argument("--dry-run", action="store_true", help="say what each run would read, make and need")
    args, options = parser.parse_known_args()
    with answered():
        names = chosen(args.names)
        how = {"published": True} if args.anchors == "published" else {}
        if how:
            require_released(names)
        refused, told = [], []
        for number, name in enumerate(names, start=1):
            print(f"\n==== {name}{f', {number} of {len(names)}' if len(names) > 1 else ''} ====", flush=True)
            kind = kind_of(name)
            if args.dry_run:
                refused += [f"{name}: {sentence}" for sentence in kind.describe(name, options, **how)]
                continue
            kind.make(name, options, **how)
            told.append(kind.verdict(name, options, **how))
            print(f"\n{told[-1]}", flush=True)
        if refused:
            raise InputError("\nerror: ".join(dict.fromkeys(refused)))
        if len(told) > 1:  # together, where each stands hours above
            print("".join(f"\n==== {text}" for text in told))


def kind_of(name: str) -> ModuleType:
    """Who makes it: a module with describe, make and verdict of a name and the options behind it."""
    return tables if name in PAPER else figures if name in FIGURES else ours


def chosen(words: Sequence[str]) -> list[str]:
    """The tables and figures that names of them and of sets mean, each once."""
    names = [name for word in words for name in SETS.get(word, (word,))]
    for name in names:
        if name not in (*PAPER, *FIGURES, *OURS):
            known = ", ".join([*PAPER, *FIGURES, *SETS, *OURS])
            raise InputError(f"no table or figure is called {name!r}; choose from {known}")
    return list(dict.fromkeys(names))


def require_released(names: Sequence[str]) -> None:
    """InputError if no anchors of a table are known to be released."""
    for name in names:
        if name not in PAPER or not PAPER[name].released:
            with_some = ", ".join(known for known, table in PAPER.items() if table.released)
            raise InputError(f"--anchors published: none are known for {name}, only for {with_some}; leave it out")


if __name__ == "__main__":
    main()
