"""Settings of an adaptation chosen on the validation cut, with its start among the candidates: there the result is
never below the start."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from common.assembly import adapted_tensors, write_model
from common.config import Config
from common.domain import Domain
from common.evaluation.tuning import (
    FDA,
    SPLIT,
    candidates,
    held_out,
    read_search,
    record,
    row_of_scores,
    scored_on,
    scores_on_cut,
    searching,
    with_fields,
)
from common.experiment import Experiment
from common.io.hashes import digest
from common.layout import RunLayout
from common.opening import open_experiment
from common.provenance import block_provenance, fit_provenance, require_anchors
from common.run.progress import UnitBar
from common.run.stages import current
from common.start import merge_start

Make = Callable[[Config, Domain], Any]
"""make(config, domain) makes the adapted model of a config from the blocks that are stored."""
Fit = Callable[[Experiment, Domain, Mapping[str, Any]], None]
"""fit(experiment, domain, provenance) stores those adapted blocks that are not stored yet where RunLayout says."""
START = {"blend": 0.0}  # the candidate that is always there


def adapt_as_chosen(config: Config, domain: Domain, fit: Fit, make: Make) -> None:
    """Make the adapted model of one start and one initialisation with the settings that compare.search.fda chooses for
    it, if there is such a search, and put the choice into search.json once the model is made."""
    with searching(config):
        chosen, fields = choose_adaptation(config, domain, fit)
        make(chosen, domain)
        if fields:
            record(config, choice={RunLayout(config).adapted.name: fields})


def choose_adaptation(config: Config, domain: Domain, fit: Fit) -> tuple[Config, Mapping[str, Any]]:
    """The config of one start and one initialisation with the best of compare.search.fda put in, by the mean score over
    all test sets; of equals the first, of which the start is the very first; and those fields. The config itself and
    none if there is no search.

    Every candidate is a row of the run's search.json; one that is there already, of the same inputs, is not made again.
    Candidates that differ in adapt.blend alone cost one adaptation, and that of the best is left where the adaptation
    with the settings that are returned finds its blocks.
    """
    grid = candidates(config, domain).get(FDA)
    if not grid:
        return config, {}
    start, layout = config.start.method, RunLayout(config)
    moving = (fields for fields in grid if with_fields(config, start, fields).adapt.for_start(start).blend)
    tried = [START, *moving]
    trials = [trial(config, fields) for fields in tried]
    bar = UnitBar(f"search {layout.adapted.name}", len(tried), "candidates")
    with current().stage(config.run.name, bar.stage, bar), bar:
        rows = [trial_row(each, domain, fields, fit, bar) for each, fields in zip(trials, tried, strict=True)]
    best = max(range(len(rows)), key=lambda i: rows[i]["avg"])
    blocks = RunLayout(trials[best]).adapted / "blocks"
    if blocks.is_dir() and not layout.adapted.exists():
        layout.adapted.mkdir(parents=True)
        blocks.rename(layout.adapted / "blocks")
    for each in trials:
        shutil.rmtree(RunLayout(each).adapted, ignore_errors=True)
    print(f"search {layout.adapted.name}: {tried[best]} is best of {len(rows)} on {SPLIT}, Avg {rows[best]['avg']:.4f}")
    return with_fields(config, start, tried[best]), tried[best]


def trial(config: Config, fields: Mapping[str, Any]) -> Config:
    """The config of a candidate: scored on the cut, in a folder that all blends of one fit share."""
    fitted = digest({name: value for name, value in fields.items() if name != "blend"})
    label = "-".join(filter(None, (config.adapt.label, "search", fitted[:8])))
    each = held_out(with_fields(config, config.start.method, fields))
    return replace(each, adapt=replace(each.adapt, label=label))


def trial_row(config: Config, domain: Domain, fields: Mapping[str, Any], fit: Fit, bar: UnitBar) -> dict[str, Any]:
    """What search.json says of a candidate, which is made and scored if it says nothing yet."""
    experiment = open_experiment(config, domain)
    domain.check_export(config.model)
    require_anchors(experiment)
    start, folder = merge_start(experiment, domain), RunLayout(config).adapted
    provenance = fit_provenance(experiment, start)
    row = {"method": FDA, "start": config.start.method, "init": config.anchors.init, "fields": fields}
    row |= {"split": SPLIT, "limit": config.eval.limit}
    made = {"checkpoint": start.fingerprint()} if fields == START else block_provenance(provenance)
    blend = provenance["adapt"]["blend"]
    made |= {"blend": blend} if blend not in (1, fields.get("blend")) else {}  # one that every candidate has
    row["id"] = digest([row, scored_on(config, domain), made])
    known = [r for r in read_search(config)["candidates"] if r["id"] == row["id"]]
    if known:
        bar.keep()
        return known[0]
    with bar.unit(", ".join(f"{name} {value}" for name, value in fields.items())):
        if fields == START:
            path = start.path
        else:
            fit(experiment, domain, provenance)
            write_model(experiment, domain, adapted_tensors(experiment, start), folder)
            path = folder
        row |= row_of_scores(config, scores_on_cut(config, domain, folder.name, path))
        record(config, candidate=row)
    return row
