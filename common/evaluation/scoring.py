"""Score a run: the pretrained model, the experts, and every merged model of the run, into results.json and a table."""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.assembly import start_in_base
from common.config import PRETRAINED, Config, as_dict
from common.core.errors import InputError
from common.descent import check_descent, fingerprints, merged_models
from common.domain import Domain, module_of, scored_tests
from common.evaluation.kept import keep_rows, known_rows, said_of
from common.evaluation.rows import INDIVIDUAL, Row, read_results, row_name, write_results
from common.evaluation.tables import of_fewer_seeds, table
from common.experiment import Experiment
from common.io.checkpoints import Checkpoint, read_header
from common.io.examples import identity_of
from common.io.hashes import digest, identity
from common.io.json_files import interpreted
from common.io.locks import locked
from common.io.paper_tables import paper_table
from common.layout import PROVENANCE_FILE, RunLayout
from common.opening import carry_out, open_experiment
from common.provenance import data_of, read_provenance, require_whole
from common.run.device import gpus_of
from common.run.engine import Memory
from common.run.progress import UnitBar, Units
from common.run.run_log import commit, record_stage, total_cost

if TYPE_CHECKING:  # imports matplotlib
    from common.evaluation.figures import Traces

RESULTS = "results.json"
ALONE = {"dtype", "test_set"}  # what a row says only of models that are scored in a type, or on a folder, that is set
Pending = dict[str, tuple[Row, Path]]
"""{row name: (what the row says before there is a score, the checkpoint)}"""


def score_run(config: Config, domain: Domain, others: Sequence[Row] = ()) -> None:
    """Score what has no row yet or has changed since; write results.json, table.md and the figures; print the table.

    A row of `others`, results of other runs with these data, is taken over where it is of the same checkpoint.
    Raises: InputError before any work if the models that are there are not all of these inputs and starts.
    """
    tests = scored_tests(config, domain)
    unscored = [task for task in config.tasks if task not in tests.values()]
    if unscored:
        print(f"not scored, as eval.tests names no test set for it: {', '.join(unscored)}")
    if not tests:
        return
    experiment, layout = open_experiment(config, domain, anchored=False), RunLayout(config)
    file, rows, here, apart = config.run.dir / RESULTS, results_of(config), list[Row](), dict[str, str]()
    check_descent(experiment, domain)
    make_same_rests(experiment, domain)
    models = {test: list(scored_models(experiment, task)) for test, task in tests.items()}
    inputs, own = identity(sorted(fingerprints(experiment).items())), bool(merged_models(experiment))
    origins = origins_of(experiment, inputs)
    bar = UnitBar("score", sum(map(len, models.values())), "scores")

    def keep(new: Iterable[Row]) -> None:
        nonlocal rows, apart
        new = [{**row, **origins.get(row_name(row), {})} for row in new]
        here.extend(new)
        rows, apart = keep_rows(file, list(tests), new, here, inputs, own)

    with record_stage(config, bar.stage, bar), bar, ExitStack() as held:
        left = left_behind(layout) if is_ours(layout.scores, held, wait=is_shared(config)) else None
        known, pending = looked_up(config, domain, models, [*known_rows(file), *(left or []), *others])
        known = [{k: v for k, v in row.items() if k != "seed"} for row in known] if own else known
        bar.keep(len(known))
        if known:
            keep(known)
        if left is not None:
            shutil.rmtree(layout.scores, ignore_errors=True)
        if is_shared(config) and len(pending) > 1:
            score_side_by_side(experiment, pending, bar, keep)
        else:
            held.close()
            for test, wanted in pending.items():
                for row in scored_rows(experiment, domain, test, wanted, bar):
                    keep([row])
    publish(config, domain, rows, traces(config.run.dir), said_of(apart))


def looked_up(
    config: Config, domain: Domain, models: Mapping[str, Iterable[tuple[Row, Checkpoint]]], rows: Sequence[Row]
) -> tuple[list[Row], dict[str, Pending]]:
    """The rows that are known of the models of each test set, and which are still to be scored on which. A row is known
    if all is as it was that decides it: model, examples and scorer. Rows of before there was a record of the scorer are
    not.

    Args:
        models: {test set: (what a row says of a model, its checkpoint)}.
    """
    found, pending = [], dict[str, Pending]()
    birth = {"config": digest(as_dict(config)), "commit": commit()}
    for test, of_test in models.items():
        examples, scorer = identity_of(config.eval, test), digest(domain.scorer(config, test))
        for model, checkpoint in of_test:
            row = {**model, "task": test, "split": config.eval.split, "limit": config.eval.limit}
            row |= {"dtype": config.eval.dtype} if config.eval.dtype else {}
            row |= {"test_set": examples} if examples else {}
            row |= {"checkpoint": checkpoint.fingerprint(), "scorer": scorer}
            cost = cost_of(config, model, checkpoint)
            unset = ALONE - row.keys()
            known = next((k for k in rows if row.items() <= k.items() and not unset & k.keys()), None)
            if known:
                found.append({**known, **cost})
            else:
                pending.setdefault(test, {})[row_name(row)] = (row | cost | birth, checkpoint.path)
    return found, pending


def scored_rows(experiment: Experiment, domain: Domain, test: str, wanted: Pending, bar: Units) -> Iterator[Row]:
    """The rows of models on a test set, whose examples are read once for all, each row as soon as it is known."""
    scores = domain.score(experiment.config, test, {n: path for n, (_, path) in wanted.items()}, experiment.device)
    for name, (row, _) in wanted.items():
        with bar.unit(f"{test}, {name}"):
            _, scored = next(scores)
        yield {**row, "metric": domain.metric(test), **scored._asdict()}


# ---- test sets side by side ------------------------------------------------------------------------------------------


def is_shared(config: Config) -> bool:
    """Whether test sets are scored side by side: where run.workers asks for it, or there are several GPUs. Not on other
    machines, which need not have the data, and not by vLLM, which looks for GPUs of its own."""
    workers = config.run.workers or gpus_of(config.run.device)
    return config.run.engine == "local" and config.eval.backend != "lm-eval-vllm" and workers > 1


def score_side_by_side(
    experiment: Experiment, pending: Mapping[str, Pending], bar: UnitBar, keep: Callable[[Iterable[Row]], None]
) -> None:
    """Score each test set in a process of its own, as many at once as run.workers says."""
    layout = RunLayout(experiment.config)
    held = 8.0 * sum(map(math.prod, experiment.base.shapes.values()))  # a model in float32, and what reads it

    def done(test: str) -> None:
        keep(read_results(layout.score_file(test))[0])

    forecast = {"seconds": 0.0, "memory": lambda: Memory(held, held, held)}
    writes = {"writes": lambda test: [layout.score_file(test)], "done": done}
    carry_out(score_each, experiment, list(pending), bar, pending, **writes, **forecast)
    shutil.rmtree(layout.scores)


def score_each(experiment: Experiment, tests: Iterable[str], bar: Units, pending: Mapping[str, Pending]) -> None:
    """Score models on some test sets, and leave their rows in a file for each."""
    domain, layout = module_of(experiment.config.domain), RunLayout(experiment.config)
    for test in tests:
        wanted, rows = pending[test], list[Row]()
        with bar.unit(f"{test}, {len(wanted)} models", len(wanted)):
            unfinished = layout.score_file(test).with_suffix(".part")
            for row in scored_rows(experiment, domain, test, wanted, Units(stage=bar.stage)):
                rows.append(row)
                write_results(unfinished, rows, [test])
            unfinished.replace(layout.score_file(test))


def is_ours(scores: Path, held: ExitStack, wait: bool) -> bool:
    """Lock the rows that are scored side by side until `held` is closed; False if another process writes some there
    now. wait: until it has written them, for there can be one at a time that does."""
    try:
        held.enter_context(locked(scores, "" if wait else f"{scores} is another's"))
    except InputError:
        return False
    return True


def left_behind(layout: RunLayout) -> list[Row]:
    """The rows that scoring side by side had written when it was interrupted."""
    files = sorted([*layout.scores.glob("*.json"), *layout.scores.glob("*.part")])  # not what a kill left half written
    return [row for file in files for row in read_results(file)[0]]


# ---- what there is to score, and what came of it ---------------------------------------------------------------------


def results_of(config: Config) -> list[Row]:
    """The rows that a run has so far."""
    file = config.run.dir / RESULTS
    return read_results(file)[0] if file.is_file() else []


def publish(
    config: Config, domain: Domain, rows: Iterable[Row], curves: Mapping[str, "Traces"], said: str = ""
) -> None:
    """Write table.md and the figures of the rows of eval.split; print the table, what it shows beyond the error, and
    what is `said` of it besides."""
    from common.evaluation.figures import write_report
    from common.evaluation.significance import findings

    rows, tests = [row for row in rows if row["split"] == config.eval.split], list(scored_tests(config, domain))
    style = {"percent": domain.PERCENT, "published": paper_table(config.eval.paper_table)}
    found = findings(rows, tests, percent=domain.PERCENT)
    write_report(config.run.dir, rows, tests, curves, found, **style)
    print(table(rows, tests, **style))
    print("".join(f"{line}\n" for line in filter(None, [of_fewer_seeds(rows), *found, said])))
    print(f"{config.run.dir}: {RESULTS}, table.md and the figures")


def cost_of(config: Config, model: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """What it took to make a model, if this run made it and knows: seconds, peak_gib, hardware; and by which commit and
    on what, which can be others than those of the scores."""
    if checkpoint.path.parent != RunLayout(config).merged:
        return {}
    made = checkpoint.path.name
    stages = [f"construct {model['init']}", f"adapt {made}"] if model["method"] == "fda" else [f"merge {made}"]
    provenance = read_provenance(checkpoint.path)
    birth = {"made": provenance.get("commit"), "made_on": provenance.get("made_on")}
    return total_cost(config.run.dir, stages) | {name: str(said) for name, said in birth.items() if said}


def scored_models(experiment: Experiment, task: str) -> Iterator[tuple[dict[str, Any], Checkpoint]]:
    """What is scored on the test sets of a task: (method, start, init, label) of the row, and the checkpoint."""
    row = {"method": PRETRAINED, "start": None, "init": None, "label": ""}
    yield row, experiment.base
    yield row | {"method": INDIVIDUAL}, experiment.experts[task]
    if experiment.config.start.checkpoint:
        yield row | {"method": experiment.config.start.method}, experiment.given_start()
    for file in sorted(RunLayout(experiment.config).merged.glob(f"*/{PROVENANCE_FILE}")):
        made = read_provenance(file.parent)
        require_whole(file.parent, made)
        yield row | identifying(made, file), Checkpoint(file.parent)


def origins_of(experiment: Experiment, inputs: str) -> dict[str, dict[str, Any]]:
    """{row name: what its row keeps for the day when the folder is gone} of every merged model of the run: what
    identifies base and experts, and of an adapted model its start."""
    found = {}
    for folder in merged_models(experiment):
        made, file = read_provenance(folder), folder / PROVENANCE_FILE
        row, start = {"start": None, "init": None, **identifying(made, file)}, made["start"].get("checkpoint")
        found[row_name(row)] = {"inputs": inputs} | ({"start_checkpoint": start} if start else {})
    return found


def make_same_rests(experiment: Experiment, domain: Domain) -> None:
    """For each start of an adapted model with the pretrained rest: the start in that rest, to be scored beside it."""
    merged = RunLayout(experiment.config).merged
    for file in sorted(merged.glob(f"fda-*/{PROVENANCE_FILE}")):
        made = read_provenance(file.parent)
        with interpreted(file, "provenance of a merged model"):
            start, rest = merged / str(made["start"]["method"]), made["adapt"]["rest"]
        if rest == PRETRAINED and (start / PROVENANCE_FILE).is_file():
            start_in_base(experiment, domain, Checkpoint(start))


def identifying(made: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What a row says of a merged model, from its provenance; InputError if that is damaged."""
    with interpreted(file, "provenance of a merged model"):
        method, used = str(made["start"]["method"]), data_of(made)
        if "anchors" not in made:
            return used | {"method": method, "label": str(made.get("label", ""))}
        adapted = {"method": "fda", "start": method, "init": str(made["anchors"]["init"])}
        return adapted | used | {key: made["adapt"][key] for key in ("label", "epochs", "rest")}


def traces(run_dir: Path) -> dict[str, "Traces"]:
    """The matching losses that a run's anchor files hold: {init: {(task, block): loss before each step}}."""
    found: dict[str, Any] = {}
    for file in sorted((run_dir / "anchors").glob("*/*/block_*.safetensors")):
        init, unit, trace = trace_of(file, file.stat().st_mtime_ns)
        found.setdefault(init, {})[unit] = trace
    return found


@cache
def trace_of(file: Path, changed: int) -> tuple[str, tuple[str, int], tuple[float, ...]]:
    """(initialisation, (task, block), losses) of a file of anchors, which was changed last at that time."""
    header = read_header(file)
    with interpreted(file, "file of anchors"):
        unit = (str(header["run"]["task"]), int(header["run"]["block"]))
        return str(header["anchors"]["init"]), unit, tuple(float(loss) for loss in header["trace"])
