"""The grid of the paper's tables in one process: anchors from every initialisation, FDA from every start, one table.

python scripts/compare.py --config configs/vision/toy.yaml --compare.starts [pretrained,ta] --compare.inits [weight]
python scripts/compare.py --config FILE --compare.seeds [0,1,2] --compare.search '{ta: {scale: [0.1,0.2,0.3]}}'
"""

from collections.abc import Sequence
from dataclasses import replace

from common.command import run
from common.config import PRETRAINED, Config
from common.core.errors import InputError
from common.domain import Domain, scored_tests
from common.evaluation.cards import write_cards
from common.evaluation.refinement import choose_adaptation
from common.evaluation.rows import Row, write_results
from common.evaluation.scoring import RESULTS, publish, results_of, score_run
from common.evaluation.tuning import FDA, SPLIT, candidates, choose_hyperparameters, held_out
from common.merging.registry import hyperparameters
from common.merging.starts import chain_of
from common.pipeline import adapt, adapt_blocks, construct, merge_alone
from common.planning.dry_run import Plan, check_export, describe
from common.validation import check_choices


def compare(config: Config, domain: Domain) -> None:
    """Choose the hyperparameters of compare.search, then run the grid, once or with each of compare.seeds."""
    check_choices(config, domain)
    runs_of(config)  # refuses here what it would after the search
    config = choose_hyperparameters(config, domain)
    if not config.compare.seeds:
        return grid(config, domain)
    runs = runs_of(config)
    for each in runs:
        grid(each, domain, [row for other in runs for row in results_of(other)])
    rows = [row | {"seed": each.run.seed} for each in runs for row in results_of(each)]
    write_results(config.run.dir / RESULTS, rows, list(scored_tests(config, domain)))
    publish(config, domain, rows, {})


def grid(config: Config, domain: Domain, others: Sequence[Row] = ()) -> None:
    """Construct with each of compare.inits, adapt from each of compare.starts, then score everything once; without an
    initialisation the starts alone are made and scored."""
    quiet = replace(config, run=replace(config.run, score=False))
    for start in [] if config.compare.inits else config.compare.starts:
        if start != PRETRAINED:
            merge_alone(quiet.at_start(start), domain)
    for init in config.compare.inits:
        of_init = replace(quiet, anchors=replace(config.anchors, init=init))
        if not config.anchors.source:
            construct(of_init, domain)
        for start in config.compare.starts:
            adapt(choose_adaptation(of_init.at_start(start), domain, adapt_blocks), domain)
    score_run(config, domain, others)
    write_cards(config, domain)


def runs_of(config: Config) -> list[Config]:
    """A complete run for each of compare.seeds: <name>/seed_<s>, run.seed s, and s for merges that draw at random."""
    seeds, starts = config.compare.seeds, config.compare.starts
    if len(set(seeds)) < len(seeds):
        raise InputError(f"compare.seeds names a seed twice: {', '.join(map(str, seeds))}")
    given = {PRETRAINED, *([config.start.method] if config.start.checkpoint else [])}
    parts = {part: None for start in starts if start not in given for part in chain_of(start).parts}
    runs, drawing = [], [part for part in parts if "seed" in hyperparameters(part)]
    for seed in seeds:
        hyper = config.start.hyper | {m: {"seed": seed} | config.start.hyper.get(m, {}) for m in drawing}
        each = replace(config.run, name=f"{config.run.name}/seed_{seed}", seed=seed)
        runs.append(replace(config, run=each, start=replace(config.start, hyper=hyper)))
    return runs


def plan(config: Config, domain: Domain) -> Plan:
    """What --dry-run prints: the plan of one run, and the search and the runs of the grid."""
    one_run, grids = describe(config, domain, [check_export]), candidates(config, domain)
    if grids:
        check_choices(held_out(config), domain)
    lines = [
        f"  {'search ' + m:18} {len(g)} candidates{' of each model, and its start,' if m == FDA else ', merged and'} "
        f"scored on {SPLIT}"
        for m, g in grids.items()
    ]
    for each in runs_of(config) or [config]:
        models = [f"{start} x {init}" for start in config.compare.starts for init in config.compare.inits]
        lines.append(f"  {f'seed {each.run.seed}':18} {len(models)} models in {each.run.dir}: {', '.join(models)}")
    return replace(one_run, text="\n".join([one_run.text, "", "Compare", *lines]))


if __name__ == "__main__":
    run(compare, None, __doc__, plan)
