"""What the paper's figures show besides scores, of the anchors and models of a run.

python scripts/analyse.py spectrum     --config FILE   singular values of the anchors (paper section 3.3)
python scripts/analyse.py subspace     --config FILE   their top subspace against that of real features
python scripts/analyse.py bias         --config FILE   features of merged models against each expert's
python scripts/analyse.py interference --config FILE   how far one task's anchors move another's outputs
python scripts/analyse.py residual     --config FILE   what merges leave of the interference between tasks
python scripts/analyse.py blend        --config FILE   between a start and FDA: the anchors' word, and held-out scores
python scripts/analyse.py matching     --config FILE   the matching loss
python scripts/analyse.py tsne         --config FILE   anchors and real features in the plane
python scripts/analyse.py landscape    --config FILE   the loss between pretrained, merged and adapted model
python scripts/analyse.py projection   --config FILE   what of FDA's direction lies in the cone of real updates
python scripts/analyse.py all          --config FILE   every one that the domain has, one after the other

Several names make several figures. Options as of the two stages. Writes runs/<name>/analysis/NAME.json and NAME.png.
Blocks are those of run.blocks; unset, few that stand for all. Anchors are those of compare.inits; with
--anchors.snapshots [0,20,40,...] at the construction they are shown along their optimisation, else before and after it.
"""

import sys
from collections.abc import Sequence
from functools import partial

from common.analysis.registry import ANALYSES
from common.analysis.run import analyse, check_domain_has, check_run_has, material_of
from common.command import run
from common.config import Config
from common.core.errors import InputError
from common.domain import Domain
from common.experiment import Experiment
from common.opening import open_experiment
from common.planning.dry_run import Plan, describe

ALL = "all"


def analyse_each(names: Sequence[str], config: Config, domain: Domain) -> None:
    """Make the figures, after what each needs was found to be there."""
    chosen = possible(names, config, domain)
    if len(chosen) > 1:  # analyse looks after one by itself
        experiment = open_experiment(config, domain)
        for name in chosen:
            check(name, experiment, domain)
    for name in chosen:
        analyse(name, config, domain)


def possible(names: Sequence[str], config: Config, domain: Domain) -> list[str]:
    """The analyses that are asked for; of all of them those that the domain has, with a word on the others."""
    if ALL not in names:
        return list(names)
    chosen = []
    for name in ANALYSES:
        try:
            check_domain_has(name, config, domain)
            chosen.append(name)
        except InputError as error:
            print(f"left out: {error}")
    return chosen


def check(name: str, experiment: Experiment, domain: Domain) -> None:
    """InputError if the domain or the run lacks what an analysis needs."""
    check_domain_has(name, experiment.config, domain)
    check_run_has(name, material_of(name, experiment, domain))


def plan(names: Sequence[str], config: Config, domain: Domain) -> Plan:
    """What --dry-run prints: the plan of the run, and what the analyses would refuse."""
    return describe(config, domain, [partial(check, name) for name in possible(names, config, domain)])


def names_in(arguments: list[str]) -> list[str]:
    """The names of analyses that a command begins with, which are taken from it."""
    names = []
    while len(arguments) > 1 and arguments[1] in (ALL, *ANALYSES):
        names.append(arguments.pop(1))
    return names


if __name__ == "__main__":
    names = names_in(sys.argv)
    if not names and not {"-h", "--help"} & set(sys.argv):
        print(f"error: analyse.py is called with one of {', '.join([*ANALYSES, ALL])}, then options", file=sys.stderr)
        sys.exit(2)
    run(partial(analyse_each, names), None, __doc__, partial(plan, names))
