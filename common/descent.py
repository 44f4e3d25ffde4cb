"""Whether the merged models of a run are of one descent, so that one table may hold them all.

Each was made from the base and the experts that the config names, and what was adapted or put into another rest was
made from the start that is there now. Other settings may differ between the models of a run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import PRETRAINED
from common.core.errors import InputError
from common.domain import Domain
from common.experiment import Experiment
from common.io.checkpoints import Checkpoint
from common.io.hashes import SCHEME
from common.io.hub import is_stand_in
from common.io.json_files import interpreted
from common.layout import PROVENANCE_FILE, RunLayout
from common.provenance import read_provenance
from common.start import opened_start

Fingerprints = Mapping[str, str]
"""{task: what identifies its expert}, and "" the base"""


def check_descent(experiment: Experiment, domain: Domain) -> None:
    """InputError if a merged model of the run is of other inputs, or of another start, than those that are there."""
    check_given_name(experiment)
    models = merged_models(experiment)
    read = [experiment.base, *experiment.experts.values()]
    if not models or any(is_stand_in(model.path) for model in read):  # of which headers alone are known
        return
    now = fingerprints(experiment)
    others = {folder: said for folder in models if (said := other_origin(experiment, folder, now))}
    if others:
        (folder, said), *more = others.items()
        besides = f" (nor do {', '.join(other.name for other, _ in more)} beside it)" if more else ""
        raise InputError(
            f"{folder} {said}, so it does not belong in one table with the models that are made now{besides}; "
            "choose another run.name, or remove the folder to have it made anew"
        )


def check_compared(experiment: Experiment, domain: Domain) -> None:
    """As `check_descent`, before something is made that is to be scored beside those models; see run.score."""
    if experiment.config.run.score:
        check_descent(experiment, domain)


def merged_models(experiment: Experiment) -> list[Path]:
    """The folders of the merged models that the run has."""
    return [file.parent for file in sorted(RunLayout(experiment.config).merged.glob(f"*/{PROVENANCE_FILE}"))]


def fingerprints(experiment: Experiment) -> dict[str, str]:
    """What identifies the base and the experts."""
    return {"": experiment.base.fingerprint()} | {t: e.fingerprint() for t, e in experiment.experts.items()}


def check_given_name(experiment: Experiment) -> None:
    """InputError if the run has a merge of its own under the name that start.method gives to start.checkpoint."""
    start, folder = experiment.config.start, RunLayout(experiment.config).start
    if not start.checkpoint or not (folder / PROVENANCE_FILE).is_file():
        return
    if Checkpoint(folder).fingerprint() != experiment.given_start().fingerprint():
        raise InputError(
            f"{folder} is another model than start.checkpoint, {start.path}, and tables would call both "
            f"{start.method}; name the checkpoint otherwise with start.method"
        )


def other_origin(experiment: Experiment, folder: Path, now: Fingerprints) -> str:
    """In what a model's origin differs from what is there, as a part of a sentence; "" if in nothing."""
    file = folder / PROVENANCE_FILE
    made = read_provenance(folder)
    with interpreted(file, "provenance of a merged model"):
        return next(differences(experiment, made, now), "")


def differences(experiment: Experiment, made: Mapping[str, Any], now: Fingerprints) -> Iterator[str]:
    """Each difference between what a model was made from, as its provenance says, and what is there now."""
    inputs, method = made["inputs"], str(made["start"]["method"])
    if not str(inputs["base"]).startswith(SCHEME):
        yield "is of an earlier version, which looked at samples of its inputs alone, and none can tell what they were"
    if inputs["base"] != now[""]:
        yield f"was made from another base than {experiment.base.path} is now ({was(inputs['base'], now[''])})"
    experts = dict(inputs["experts"]) if "experts" in inputs else {}
    if experts and experts.keys() != experiment.experts.keys():
        yield f"was made for the tasks {', '.join(experts)}, and tasks is now {', '.join(experiment.experts)}"
    for task, expert in experts.items():
        if expert != now[task]:
            path = experiment.experts[task].path
            yield f"was made from another expert of {task} than {path} is now ({was(expert, now[task])})"
    then = made["start"].get("checkpoint") or inputs.get("start")
    start = start_of(experiment, method) if then else None
    if start and (found := start.fingerprint()) != then:
        how = "adapted" if "anchors" in made else "made"
        yield f"was {how} from another start than {start.path} is now ({was(then, found)})"


def was(then: Any, now: str) -> str:
    return f"it was {then}, now it is {now}"


def start_of(experiment: Experiment, method: str) -> Checkpoint | None:
    """The start of that name as it is now; None if it is not there any more, or is the base."""
    config = experiment.config.at_start(method)
    if method == PRETRAINED:
        return None
    if not config.start.checkpoint and not (RunLayout(config).start / PROVENANCE_FILE).is_file():
        return None
    return opened_start(replace(experiment, config=config))
