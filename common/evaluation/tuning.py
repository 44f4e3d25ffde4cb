"""Hyperparameters of merge methods and of the adaptation, chosen on held-out examples: the validation cut, never a
test set."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from common.config import Adapt, Config, as_dict
from common.core.annotations import require_kind
from common.core.errors import InputError
from common.domain import Domain, module_of, scored_tests
from common.evaluation.front import TRIED, front_of, map_search, write_front
from common.io.checkpoints import write_text
from common.io.examples import identity_of
from common.io.hashes import digest
from common.io.json_files import read_object
from common.io.locks import locked
from common.merging.starts import chain_of, check_hyper
from common.opening import libraries_of, open_experiment
from common.provenance import inputs_of
from common.run.device import prepare
from common.run.engine import Demand, Files, Memory, asks_for_workers, place_for, value_of
from common.run.progress import UnitBar
from common.run.run_log import commit
from common.run.stages import current
from common.start import merge_start
from common.validation import check_settings

SPLIT = "validation_cut"
SEARCH = "search"  # the folder of a run where candidates are made
FDA = "fda"  # of compare.search: the adaptation


def candidates(config: Config, domain: Domain) -> dict[str, list[dict[str, Any]]]:
    """{method: every combination of the values that compare.search lists for it, or the samples of MAP}.

    Raises InputError, before anything is opened, on a method or hyperparameter that does not exist, a value that does
    not fit, an empty list, and a method that compare does not merge.
    """
    grids = {}
    for method, lists in config.compare.search.items():
        if not scored_tests(config, domain):
            raise InputError(
                f"compare.search cannot choose for {method}: there is no test set for any task; eval.tests can name one"
            )
        if method != FDA and len(parts := chain_of(method).parts) > 1:
            raise InputError(f"compare.search chooses for one method at a time: {method} is {' and '.join(parts)}")
        asked = map_search(method, lists, len(config.tasks))
        empty = [name for name, values in lists.items() if not values]
        if empty or not lists:
            raise InputError(f"compare.search.{'.'.join([method, *empty[:1]])} lists no value to try")
        if asked and method == FDA:
            raise InputError(f"compare.search.fda.{asked.name} must be a list of values to try; map is for merges")
        grids[method] = (
            asked.grid(asked.draw(len(config.tasks), config.run.seed, method))
            if asked
            else [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]
        )
        if method == FDA:
            check_fields(config, lists, grids[method])
            continue
        for chosen in grids[method]:
            check_hyper(method, config.start.hyper.get(method, {}) | chosen, len(config.tasks))
        given = config.start.method if config.start.checkpoint else None
        if method not in config.compare.starts or method == given:
            raise InputError(f"compare.search names {method}, which no start of compare.starts is merged by")
    return grids


def check_fields(config: Config, lists: Mapping[str, Any], grid: list[dict[str, Any]]) -> None:
    """InputError if a field that compare.search.fda lists is none of adapt to be chosen, or a value does not fit."""
    known = {f.name: f.type for f in fields(Adapt) if f.name not in ("label", "by_start")}
    if not config.compare.inits:
        raise InputError("compare.search.fda chooses for adapted models, and compare.inits names none to make")
    for name in lists:
        if name not in known:
            raise InputError(f"compare.search.fda: adapt has no field {name!r} to choose; fields: {', '.join(known)}")
    for chosen in grid:
        for name, value in chosen.items():
            require_kind(value, known[name], f"compare.search.fda.{name}")
        for start in config.compare.starts:
            check_settings(with_fields(config, start, chosen))


def with_fields(config: Config, start: str, chosen: Mapping[str, Any]) -> Config:
    """The config of one start, with fields of adapt set for it."""
    by_start = {start: {**config.adapt.by_start.get(start, {}), **chosen}}
    return replace(config.at_start(start), adapt=replace(config.adapt, by_start=by_start))


def held_out(config: Config) -> Config:
    """The config of an experiment whose models are scored on the validation cut."""
    return replace(config, eval=replace(config.eval, split=SPLIT))


def searching(config: Config) -> AbstractContextManager[None]:
    """While this goes on no other process searches in the run's folder, where they would remove each other's models.

    Raises: InputError if another one does.
    """
    if not config.compare.search:
        return nullcontext()
    folder = config.run.dir / SEARCH
    return locked(
        folder,
        f"another process is at work with compare.search in {config.run.dir}; wait until it has finished, or choose "
        "another run.name",
    )


def choose_hyperparameters(config: Config, domain: Domain) -> Config:
    """The config with the best candidate of each method, by the mean score over all test sets, put into start.hyper.

    Every candidate is a row of search.json; one that is there already, of the same inputs, is not scored again.
    Raises: InputError if another process searches in the run's folder.
    """
    grids = candidates(config, domain)
    grids.pop(FDA, None)  # which needs the anchors
    with searching(config):
        return with_choices(config, domain, grids)


def with_choices(config: Config, domain: Domain, grids: Mapping[str, list[dict[str, Any]]]) -> Config:
    """As `choose_hyperparameters`, of these candidates, while no other process searches there."""
    hyper = dict(config.start.hyper)
    for method, grid in grids.items():
        asked = map_search(method, config.compare.search[method], len(config.tasks))
        bar = UnitBar(f"search {method}", len(grid) + (TRIED if asked else 0), "candidates")
        measure = partial(candidate_rows, held_out(config), domain, method, bar)
        with current().stage(config.run.name, bar.stage, bar), bar:
            rows = measure(grid)
            found = front_of(asked, rows, config.run.seed) if asked else None
            if asked and found:
                grid = asked.grid(found["tried"])
                rows = measure(grid)
                bar.keep(TRIED - len(grid))
        best = max(range(len(grid)), key=lambda i: rows[i]["avg"])  # the first of equals
        if asked and found:
            write_front(config.run.dir, method, found, rows, best, domain.PERCENT)
        hyper[method] = hyper.get(method, {}) | grid[best]
        record(config, choice={method: hyper[method]})
        print(f"search {method}: {grid[best]} is best of {len(grid)} on {SPLIT}, Avg {rows[best]['avg']:.4f}")
    return replace(config, start=replace(config.start, hyper=hyper))


def candidate_rows(
    config: Config, domain: Domain, method: str, bar: UnitBar, grid: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What search.json says of merges with these hyperparameters in place of start.hyper's; what it does not know yet
    is merged and scored: here one after the other, or side by side where the config asks for workers.
    """
    rows: list[dict[str, Any]] = []
    trials: dict[int, Config] = {}
    known, where = {row["id"]: row for row in read_search(config)["candidates"]}, scored_on(config, domain)
    for chosen in grid:
        trial = trial_of(config, method, {**config.start.hyper.get(method, {}), **chosen}, len(rows))
        experiment = open_experiment(trial, domain)
        row = {"method": method, "hyper": experiment.hyper(method), "split": SPLIT, "limit": config.eval.limit}
        row["id"] = digest([row, where, inputs_of(experiment)])
        if row["id"] not in known and row["id"] not in [rows[number]["id"] for number in trials]:
            trials[len(rows)] = trial
        rows.append(row)
    domain.check_export(config.model)
    bar.keep(len(rows) - len(trials))
    for number, scores in scored_trials(config, domain, trials):
        with bar.unit(f"candidate {number}"):
            row = rows[number] | row_of_scores(config, scores)
            record(config, candidate=row)
            known[row["id"]] = row
    record(config, order=[row["id"] for row in rows])
    return [known[row["id"]] for row in rows]


def scored_on(config: Config, domain: Domain) -> dict[str, list[str | None]]:
    """{test set: its task, and what identifies its examples and how they are scored}."""
    return {
        test: [task, identity_of(config.eval, test), digest(domain.scorer(config, test))]
        for test, task in scored_tests(config, domain).items()
    }


def trial_of(config: Config, method: str, hyper: dict[str, Any], number: int) -> Config:
    """The experiment of one candidate, in a folder of its own, by one process."""
    run = replace(config.run, name=f"{config.run.name}/{SEARCH}/{number}", engine="local", workers=1)
    run = replace(run, address="", gpus_per_unit=None)
    return replace(config, start=replace(config.start, hyper={method: hyper}), run=run).at_start(method)


def scored_trials(
    config: Config, domain: Domain, trials: Mapping[int, Config]
) -> Iterator[tuple[int, dict[str, dict[str, Any]]]]:
    """The numbers of some candidates with their scores, as they come."""
    folder = config.run.dir / SEARCH
    shutil.rmtree(folder, ignore_errors=True)  # a kill can have left one
    place = None
    if asks_for_workers(config.run) and trials:
        model = 8.0 * sum(map(math.prod, open_experiment(config, domain).base.shapes.values()))  # as made, as scored
        asked = Demand(len(trials), 0.0, True, lambda: Memory(model, model, model))
        place = place_for(config.run, asked, libraries_of(config))
    if place is None:
        yield from ((number, score_candidate(domain, trials[number])) for number in trials)
    else:
        there = {n: replace(t, run=replace(t.run, root=place.root or t.run.root)) for n, t in trials.items()}
        files = Files(Path(config.run.root).expanduser(), lambda number: (), lambda number: ())
        with closing(place.outcomes(partial(scores_at_worker, there), list(trials), files)) as outcomes:
            yield from ((number, value_of(outcome)) for number, outcome in outcomes)
    shutil.rmtree(folder, ignore_errors=True)


def scores_at_worker(trials: Mapping[int, Config], number: int) -> dict[str, dict[str, Any]]:
    """The scores of a candidate, in a process that has its domain still to import."""
    return score_candidate(module_of(trials[number].domain), trials[number])


def score_candidate(domain: Domain, trial: Config) -> dict[str, dict[str, Any]]:
    """{test set: value and examples} of a candidate, which is merged for it and removed again."""
    path = merge_start(open_experiment(trial, domain), domain).path
    scores = scores_on_cut(trial, domain, trial.start.method, path)
    shutil.rmtree(trial.run.dir)
    return scores


def scores_on_cut(config: Config, domain: Domain, name: str, path: Path) -> dict[str, dict[str, Any]]:
    """{test set: value and examples} of a model."""
    device, tests = prepare(config.run.device), scored_tests(config, domain)
    found = {test: dict(domain.score(config, test, {name: path}, device))[name] for test in tests}
    return {test: {"value": of_test.value, "n": of_test.n} for test, of_test in found.items()}


def row_of_scores(config: Config, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a row of search.json says besides of a model with these scores."""
    average = sum(of_test["value"] for of_test in scores.values()) / len(scores)
    return {"scores": scores, "avg": average, "config": digest(as_dict(config)), "commit": commit()}


def read_search(config: Config) -> dict[str, Any]:
    """What search.json of a run says so far."""
    file = config.run.dir / "search.json"
    empty = {"split": SPLIT, "candidates": [], "choices": {}}
    return read_object(file, "record of a search") if file.is_file() else empty


def record(
    config: Config,
    candidate: dict[str, Any] | None = None,
    choice: dict[str, Any] | None = None,
    order: Sequence[str] = (),
) -> None:
    """Put a candidate or a choice into search.json, or the candidates of these ids in their order behind others."""
    found = read_search(config)
    found["candidates"].sort(key=lambda row: order.index(row["id"]) if row["id"] in order else -1)
    found["candidates"] += [candidate] if candidate else []
    found["choices"] |= choice or {}
    write_text(config.run.dir / "search.json", json.dumps(found, indent=2, sort_keys=True) + "\n")
