"""The grid of the paper's tables in one process: anchors from every initialisation, FDA from every start, one table.

python scripts/compare.py --config configs/vision/toy.yaml --compare.starts [pretrained,ta] --compare.inits [weight]
python scripts/compare.py --config FILE --compare.seeds [0,1,2] --compare.search '{ta: {scale: [0.1,0.2,0.3]}}'
python scripts/compare.py --runs runs/A runs/B [--out FILE]   runs that are there on one page, which is written anew
"""

import argparse
import os
import shutil
import sys
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.command import run
from common.config import PRETRAINED, Config
from common.core.errors import InputError
from common.descent import check_descent
from common.domain import Domain, scored_tests
from common.evaluation.cards import write_cards
from common.evaluation.front import TRIED, map_search
from common.evaluation.refinement import adapt_as_chosen
from common.evaluation.rows import Row, write_results
from common.evaluation.scoring import RESULTS, publish, results_of, score_run
from common.evaluation.tuning import FDA, SPLIT, candidates, choose_hyperparameters, held_out, searching
from common.experiment import Experiment
from common.layout import PROVENANCE_FILE, RunLayout, with_same_rest
from common.merging.registry import hyperparameters
from common.merging.starts import chain_of
from common.opening import open_experiment, open_inputs
from common.pipeline import adapt, adapt_blocks, construct, merge_alone
from common.planning.dry_run import (
    Plan,
    Refusals,
    check_adapted,
    check_anchors_made,
    check_export,
    check_start,
    describe,
)
from common.provenance import is_finished, merge_provenance
from common.report.page import write_page
from common.report.reading import REPORT, read_run
from common.run.stages import current, named
from common.validation import check_choices, check_test_data


def compare(config: Config, domain: Domain) -> None:
    """Choose the hyperparameters of compare.search, then run the grid, once or with each of compare.seeds."""
    check_choices(config, domain)
    current().expect(stages_of(config))  # refuses here what it would after the search
    check_test_data(config, domain, always=True)
    searched = candidates(config, domain)
    if searched:  # refused before anything is opened, or the run's folder taken
        check_choices(held_out(config), domain)
    with searching(config):
        for each in (runs_of(config) or [config]) if searched else []:  # else compare_all is next, and asks
            check_what_is_there(each, domain, set(config.compare.search))
        compare_all(choose_hyperparameters(config, domain), domain)


def compare_all(config: Config, domain: Domain) -> None:
    """Run the grid, once or with each of compare.seeds; what compare.search chooses for merges is chosen."""
    runs = runs_of(config)
    for each in runs or [config]:
        check_what_is_there(each, domain)
    if not runs:
        return grid(config, domain)
    for each in runs:
        if each is not runs[0]:
            share_merges(each, domain, runs[0])
        grid(each, domain, [row for other in runs for row in results_of(other)])
    rows = [row | {"seed": each.run.seed} for each in runs for row in results_of(each)]
    write_results(config.run.dir / RESULTS, rows, list(scored_tests(config, domain)))
    publish(config, domain, rows, {})


def grid(config: Config, domain: Domain, others: Sequence[Row] = ()) -> None:
    """Construct with each of compare.inits, adapt from each of compare.starts, then score everything once; without an
    initialisation the starts alone are made and scored."""
    quiet = replace(config, run=replace(config.run, score=False))
    for start in [] if config.compare.inits else merges_of(config):
        merge_alone(quiet.at_start(start), domain)
    for init in config.compare.inits:
        of_init = replace(quiet, anchors=replace(config.anchors, init=init))
        if not config.anchors.source:
            construct(of_init, domain)
        for start in config.compare.starts:
            adapt_as_chosen(of_init.at_start(start), domain, adapt_blocks, adapt)
    score_run(config, domain, others)
    write_cards(config, domain)


def share_merges(config: Config, domain: Domain, first: Config) -> None:
    """Take over the starts of the first seed's run that are the same in this one, and their blocks in the pretrained
    model."""
    experiment = open_experiment(config, domain)
    for start in merges_of(config):
        there, here = (RunLayout(each.at_start(start)).start for each in (first, config))
        if draws(config, start) != draws(first, start) or here.exists():
            continue
        if is_finished(there, merge_provenance(replace(experiment, config=config.at_start(start)), domain)):
            for made, wanted in ((with_same_rest(there), with_same_rest(here)), (there, here)):
                if (made / PROVENANCE_FILE).is_file() and not wanted.exists():
                    link_tree(made, wanted)


def link_tree(source: Path, target: Path) -> None:
    """A folder of the same files, which are no copies where the file system can link them; it is there when whole."""
    unfinished = target.parent.with_name(f"{target.name}.part")  # what lies beside the target is a model
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        shutil.copytree(source, unfinished, symlinks=True, copy_function=os.link)
    except shutil.Error:
        shutil.rmtree(unfinished)
        shutil.copytree(source, unfinished, symlinks=True)
    target.parent.mkdir(exist_ok=True)
    unfinished.replace(target)


def check_what_is_there(config: Config, domain: Domain, to_choose: Collection[str] = ()) -> None:
    """InputError if the run's folder holds anchors, merges or models that were made otherwise, before work goes into
    what lacks, or if run.blocks leaves blocks to others, for what is scored is whole. What compare.search chooses for
    the adaptation, and for starts `to_choose`, is not known yet."""
    if config.run.blocks is not None and config.compare.inits:
        raise InputError(
            "run.blocks leaves blocks to other machines, and a grid scores whole models: unset it, or divide the work "
            "by construct_fda.py and adapt.py, after which compare.py without it finds all blocks"
        )
    for init in config.compare.inits or [config.anchors.init]:
        of_init = replace(config, anchors=replace(config.anchors, init=init))
        experiment = open_inputs(of_init, domain, lambda _: nullcontext())
        assert experiment  # what is missing has been refused
        if config.compare.inits and not config.anchors.source:
            check_anchors_made(experiment, domain)
        for start in config.compare.starts:
            of_start = replace(experiment, config=of_init.at_start(start))
            if start not in to_choose:
                check_start(of_start, domain)
            if config.compare.inits and FDA not in config.compare.search:
                check_adapted(of_start, domain)
        check_descent(experiment, domain)


def runs_of(config: Config) -> list[Config]:
    """A complete run for each of compare.seeds: <name>/seed_<s>, run.seed s, and s for merges that draw at random."""
    seeds, starts = config.compare.seeds, config.compare.starts
    given = {PRETRAINED, *([config.start.method] if config.start.checkpoint else [])}
    parts = {part: None for start in starts if start not in given for part in chain_of(start).parts}
    runs, drawing = [], [part for part in parts if "seed" in hyperparameters(part)]
    for seed in seeds:
        hyper = config.start.hyper | {m: {"seed": seed} | config.start.hyper.get(m, {}) for m in drawing}
        each = replace(config.run, name=f"{config.run.name}/seed_{seed}", seed=seed)
        runs.append(replace(config, run=each, start=replace(config.start, hyper=hyper)))
    return runs


def stages_of(config: Config) -> list[str]:
    """Every stage of the search and the grid, in order; those of which all is there already are passed over."""
    merges = merges_of(config)
    stages = [named(config.run.name, f"search {method}") for method in config.compare.search if method != FDA]
    runs = runs_of(config) or [config]
    for i, each in enumerate(runs):
        of_run, left = [], [start for start in merges if i == 0 or draws(each, start) != draws(runs[0], start)]
        for init in each.compare.inits:
            of_init = replace(each, anchors=replace(each.anchors, init=init))
            of_run += [] if each.anchors.source else [f"construct {init}"]
            for start in each.compare.starts:
                of_run += [f"merge {start}"] if start in left else []
                model = RunLayout(of_init.at_start(start)).adapted.name
                of_run += [f"search {model}"] if FDA in each.compare.search else []
                of_run.append(f"adapt {model}")
            left = []
        of_run += [*(f"merge {start}" for start in left), "score"]
        stages += [named(each.run.name, stage) for stage in of_run]
    return stages


def merges_of(config: Config) -> list[str]:
    """The starts that are merged here."""
    return [start for start in config.compare.starts if start not in (PRETRAINED, given_start(config))]


def draws(config: Config, start: str) -> list[Any]:
    """The seed of each method of a start, None of one that draws nothing: starts of the same seeds are the same."""
    return [config.start.hyper.get(part, {}).get("seed") for part in chain_of(start).parts]


def given_start(config: Config) -> str:
    """The start that is a checkpoint made elsewhere, if one is."""
    return config.start.method if config.start.checkpoint else ""


def check_all_scored(experiment: Experiment, domain: Domain) -> None:
    """There is something to score models on, which a grid does whatever run.score says."""
    check_test_data(experiment.config, domain, always=True)


def plan(config: Config, domain: Domain) -> Plan:
    """What --dry-run prints: the plan of one run, and the search and the runs of the grid."""
    one_run, grids = describe(config, domain, [check_all_scored, check_export]), candidates(config, domain)
    refusals = Refusals()
    for each in [] if one_run.refusals else runs_of(config) or [config]:
        with refusals.noted(each.run.name):
            check_what_is_there(each, domain, set(config.compare.search))
    if grids:
        check_choices(held_out(config), domain)
    lines = [
        f"  {'search ' + m:18} {len(g)} candidates{' of each model, and its start,' if m == FDA else ', merged and'} "
        f"scored on {SPLIT}{of_front(config, m)}"
        for m, g in grids.items()
    ]
    for each in runs_of(config) or [config]:
        models = [f"{start} x {init}" for start in config.compare.starts for init in config.compare.inits]
        lines.append(f"  {f'seed {each.run.seed}':18} {len(models)} models in {each.run.dir}: {', '.join(models)}")
    refused = [*one_run.refusals, *(sentence for of_one in refusals.values() for sentence in of_one)]
    return Plan("\n".join([one_run.text, "", "Compare", *lines]), refused)


def of_front(config: Config, method: str) -> str:
    """What a search does besides, if it is MAP's."""
    asked = map_search(method, config.compare.search[method], len(config.tasks))
    return f", then up to {TRIED} of their Pareto front" if asked else ""


def side_by_side(argv: Sequence[str]) -> None:
    """Write the page of some runs from what their folders hold: of one into its folder, of several beside them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", nargs="+", type=Path, required=True, help="folders of runs")
    options.add_argument("--out", type=Path, help="the page; else report.html in the run's folder, or beside several")
    said = options.parse_args(argv)
    try:
        runs = [read_run(folder) for folder in said.runs]
        first = said.runs[0]
        print(write_page(said.out or (first if len(runs) == 1 else first.parent) / REPORT, runs))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    if any(word == "--runs" or word.startswith("--runs=") for word in sys.argv[1:]):
        side_by_side(sys.argv[1:])
    else:
        run(compare, None, __doc__, plan)
