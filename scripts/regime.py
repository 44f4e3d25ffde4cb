"""Whether models lie in the method's regime, told without a single anchor: task vectors, experts, merges.

python scripts/regime.py --config configs/vision/toy.yaml [--compare.search '{ta: {scale: [0.2,0.4]}}']

Writes runs/<name>/regime/: results.json and table.md of TA, TSV and what else compare.search chooses for, alone, and
regime.json with the three conditions.
"""

import json
from dataclasses import replace
from statistics import fmean
from typing import Any

from common.command import run
from common.config import Config
from common.domain import Domain, scored_tests
from common.evaluation.rows import read_results, values_by_name
from common.evaluation.scoring import RESULTS
from common.evaluation.tuning import FDA
from common.io.checkpoints import write_text
from common.opening import open_experiment
from common.planning.regime import relative_norms
from common.run.run_log import commit
from compare import compare

NEAR = 0.03  # ‖τ‖/‖θ₀‖ of every expert at most
INDIVIDUAL, PRETRAINED = 0.80, (0.35, 0.60)  # the least mean of the experts, and the range of the base's
CLOSED = 0.2  # of the gap from Pretrained to Individual, by task arithmetic
SEARCH = {"ta": {"scale": [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8]}}  # on the validation cut


def regime(config: Config, domain: Domain) -> None:
    """Measure the conditions and print them, met or not."""
    can_search = all(domain.TASKS[test].train_split for test in scored_tests(config, domain))
    search = config.compare.search or (SEARCH if can_search else {})  # else with the coefficient that the config has
    starts = list(dict.fromkeys(["ta", "tsv", *(method for method in search if method != FDA)]))
    alone = replace(config.compare, inits=[], starts=starts, seeds=[], search=search)
    config = replace(config, compare=alone, run=replace(config.run, name=f"{config.run.name}/regime"))
    experiment = open_experiment(config, domain)
    norms = relative_norms(experiment, range(experiment.depth))
    compare(config, domain)
    rows, _ = read_results(config.run.dir / RESULTS)
    average = {name: values[-1] for name, values in values_by_name(rows, list(scored_tests(config, domain))).items()}
    found = conditions(norms, average)
    for condition in found:
        print(f"{'met' if condition['met'] else 'NOT MET':8} {condition['says']}")
    made = {"commit": commit(), "norms": norms, "averages": average, "conditions": found}
    write_text(config.run.dir / "regime.json", json.dumps(made, indent=1, ensure_ascii=False) + "\n")


def conditions(norms: dict[str, float], average: dict[str, float]) -> list[dict[str, Any]]:
    """The three conditions with their values; averages are fractions, by the names of table rows."""
    base, experts, ta, tsv = (average[name] for name in ("Pretrained", "Individual", "TA", "TSV"))
    closed = (ta - base) / (experts - base) if experts > base else 0.0
    return [
        {
            "says": f"‖τ‖/‖θ₀‖ over the blocks: {', '.join(f'{t} {100 * n:.2f} %' for t, n in norms.items())}; mean "
            f"{100 * fmean(norms.values()):.2f} %, at most {100 * NEAR:.0f} % each",
            "met": max(norms.values()) <= NEAR,
        },
        {
            "says": f"Individual {100 * experts:.2f}, at least {100 * INDIVIDUAL:.0f}; Pretrained {100 * base:.2f}, "
            f"{100 * PRETRAINED[0]:.0f} to {100 * PRETRAINED[1]:.0f}",
            "met": experts >= INDIVIDUAL and PRETRAINED[0] <= base <= PRETRAINED[1],
        },
        {
            "says": f"TA {100 * ta:.2f} closes {100 * closed:.1f} % of the gap, at least {100 * CLOSED:.0f} %; "
            f"TSV {100 * tsv:.2f}, above TA",
            "met": closed >= CLOSED and tsv > ta,
        },
    ]


if __name__ == "__main__":
    run(regime, None, __doc__)
