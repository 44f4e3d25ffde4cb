"""What the paper's figures show besides scores, of the anchors and models of a run.

python scripts/analyse.py spectrum     --config FILE   singular values of the anchors (paper section 3.3)
python scripts/analyse.py subspace     --config FILE   their top subspace against that of real features
python scripts/analyse.py bias         --config FILE   features of merged models against each expert's
python scripts/analyse.py interference --config FILE   how far one task's anchors move another's outputs
python scripts/analyse.py blend        --config FILE   between a start and FDA: the anchors' word, and held-out scores
python scripts/analyse.py matching     --config FILE   the matching loss
python scripts/analyse.py tsne         --config FILE   anchors and real features in the plane
python scripts/analyse.py landscape    --config FILE   the loss between pretrained, merged and adapted model
python scripts/analyse.py projection   --config FILE   what of FDA's direction lies in the cone of real updates

Options as of the two stages. Writes runs/<name>/analysis/NAME.json and NAME.png. Blocks are those of run.blocks; unset,
few that stand for all. Anchors are those of compare.inits; with --anchors.snapshots [0,20,40,...] at the construction
they are shown along their optimisation, else before and after it.
"""

import sys
from functools import partial

from common.analysis.registry import ANALYSES
from common.analysis.report import analyse, check_domain_has, check_run_has, material_of
from common.command import run
from common.config import Config
from common.domain import Domain
from common.experiment import Experiment
from common.planning.dry_run import Plan, describe


def plan(name: str, config: Config, domain: Domain) -> Plan:
    """What --dry-run prints: the plan of the run, and what the analysis would refuse."""

    def check(experiment: Experiment, domain: Domain) -> None:
        check_domain_has(name, config, domain)
        check_run_has(name, material_of(name, experiment, domain))

    return describe(config, domain, [check])


if __name__ == "__main__":
    name = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1] in ANALYSES else ""
    if not name and not {"-h", "--help"} & set(sys.argv):
        print(f"error: analyse.py is called with one of {', '.join(ANALYSES)}, then options", file=sys.stderr)
        sys.exit(2)
    run(partial(analyse, name), None, __doc__, partial(plan, name))
