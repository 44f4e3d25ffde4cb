"""Score a run: the pretrained model, the experts, and every merged model of the run, into results.json and a table."""

import json
from collections.abc import Iterator
from typing import Any

import yaml

from common import report
from common.checkpoints import Checkpoint, digest, read_header
from common.config import Config, as_dict
from common.experiment import PRETRAINED, Domain, Experiment, open_experiment
from common.merged import PROVENANCE_FILE
from common.runtime import ROOT, commit, recorded


def score_run(config: Config, domain: Domain) -> None:
    """Score what has no row yet or has changed since; write results.json, table.md and the figures; print the table.

    The examples of a task are read once for all models that are to be scored on it.
    """
    if not config.tests:
        return print("nothing is scored: eval.tests has no test set for any task")
    experiment = open_experiment(config, domain)
    file = config.run.dir / "results.json"
    rows = report.read_results(file)[0] if file.is_file() else []
    tests = list(config.tests)
    with recorded(config, "score"):
        for test, task in config.tests.items():
            pending = {}
            for model, checkpoint in scored_models(experiment, task):
                row = model | {"task": test, "split": config.eval.split, "limit": config.eval.limit}
                row["checkpoint"] = checkpoint.fingerprint()
                if not any(row.items() <= known.items() for known in rows):
                    pending[report.row_name(row)] = (row, checkpoint.path)
            if not pending:
                continue
            paths = {name: path for name, (_, path) in pending.items()}
            for name, (value, n) in domain.score(config, test, paths, experiment.device).items():
                result = {"metric": domain.metric(test), "value": value, "n": n}
                birth = {"config": digest(as_dict(config)), "commit": commit()}
                rows = report.upsert(rows, pending[name][0] | result | birth)
            report.write_results(file, rows, tests)
    rows = [row for row in rows if row["split"] == config.eval.split]
    report.write_report(
        config.run.dir, rows, tests, traces(experiment), percent=domain.PERCENT, published=published(config)
    )
    print(report.table(rows, tests, percent=domain.PERCENT, published=published(config)))
    print(f"\n{file.parent}: results.json, table.md and the figures")


def scored_models(experiment: Experiment, task: str) -> Iterator[tuple[dict[str, Any], Checkpoint]]:
    """What is scored on the test sets of a task: (method, start, init, label) of the row, and the checkpoint."""
    row = {"method": PRETRAINED, "start": None, "init": None, "label": ""}
    yield row, experiment.base
    yield row | {"method": "individual"}, experiment.experts[task]
    if experiment.config.start.checkpoint:
        yield row | {"method": experiment.config.start.method}, experiment.given_start()
    for file in sorted((experiment.config.run.dir / "merged").glob(f"*/{PROVENANCE_FILE}")):
        made = json.loads(file.read_text())
        method = made["start"]["method"]
        if "anchors" in made:
            adapted = {"method": "fda", "start": method, "init": made["anchors"]["init"]}
            yield row | adapted | {"label": made["adapt"]["label"]}, Checkpoint(file.parent)
        else:
            yield row | {"method": method}, Checkpoint(file.parent)


def traces(experiment: Experiment) -> dict[str, report.Traces]:
    """The matching losses that the run's anchor files hold: {init: {(task, block): loss before each step}}."""
    found = {}
    for file in sorted((experiment.config.run.dir / "anchors").glob("*/*/block_*.safetensors")):
        header = read_header(file)
        unit = (header["run"]["task"], header["run"]["block"])
        found.setdefault(header["anchors"]["init"], {})[unit] = header["trace"]
    return found


def published(config: Config) -> dict[str, Any] | None:
    """The paper's table for the config's model, if the config names one."""
    if not config.eval.paper_table:
        return None
    return yaml.safe_load((ROOT / "configs" / "paper_results.yaml").read_text())[config.eval.paper_table]
