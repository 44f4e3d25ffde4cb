"""Model cards: what a merged model was made of and how, and what it scored, as the hub shows it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from common.config import PRETRAINED, Config, as_dict
from common.core.errors import InputError
from common.core.places import place_name
from common.descent import fingerprints, other_origin
from common.domain import Domain, scored_tests
from common.evaluation.rows import INDIVIDUAL, Row, display, row_name
from common.evaluation.scoring import identifying, results_of
from common.evaluation.tables import table
from common.experiment import Experiment
from common.io.checkpoints import write_text
from common.io.model_files import CONFIG_FILE, OPEN_CLIP_CONFIG, folder_of, json_of
from common.io.tokenizer_files import MODULES_FILE
from common.layout import CARD, PROVENANCE_FILE, SAME_REST, RunLayout
from common.merging.registry import hyperparameters
from common.merging.starts import by_part, chain_of
from common.opening import open_experiment
from common.provenance import anchor_hashes, read_provenance, require_anchors
from common.run.run_log import PARTS, version_of

OPENED = {
    "open_clip": 'import open_clip\n\nmodel = open_clip.create_model("local-dir:FOLDER")',
    "sentence-transformers": "from sentence_transformers import SentenceTransformer\n\n"
    'model = SentenceTransformer("FOLDER")',
    "transformers": 'from transformers import {name}\n\nmodel = {name}.from_pretrained("FOLDER")',
}
FDA = (
    "Functional Dual Anchors (Shi, Wen, Liu; [arXiv 2510.21223](https://arxiv.org/abs/2510.21223)): for each block and "
    "each task, a few synthetic inputs were optimised until their gradient on the pretrained block points "
    "along that task's vector; the merged block was then trained to answer on the anchors of every task as its expert."
)


def write_cards(config: Config, domain: Domain) -> None:
    """Write the card of every merged model of a run that is whole; one that says the same already is left as it is, and
    so is that of a model of other inputs, or of another start, than those that are there: the config is not its own."""
    experiment, rows = open_experiment(config, domain, anchored=False), results_of(config)
    now = fingerprints(experiment)
    for file in sorted(RunLayout(config).merged.glob(f"*/{PROVENANCE_FILE}")):
        made = identifying(read_provenance(file.parent), file)
        if made["label"] == SAME_REST or other_origin(experiment, file.parent, now):
            continue
        text = card(experiment, domain, file.parent, made, rows)
        there = file.with_name(CARD)
        if not there.is_file() or there.read_text(encoding="utf-8") != text:
            write_text(there, text)


def card(experiment: Experiment, domain: Domain, folder: Path, made: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """The text of a model's card: metadata in front, then how it opens, what it is made of, and its scores."""
    config, how = experiment.config, settings(experiment, read_provenance(folder))
    name = row_name({"start": None, "init": None, **made})
    parts = [
        front_matter(config, folder),
        f"# {name}: {', '.join(config.tasks)}",
        f"{len(config.tasks)} fine-tuned models in one, merged by {method_of(made)}, {data_used(made)}.",
        f"```python\n{opening(folder)}\n```",
        "## Made of\n\n" + "\n".join(made_of(config)),
        "## How\n\n" + (f"{FDA}\n\n" if made["method"] == "fda" else "") + f"```yaml\n{how}```",
        scores(config, domain, made, rows),
        f"Versions: {', '.join(f'{part} {version_of(part)}' for part in ('functional-dual-anchors', *PARTS))}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def anchor_card(config: Config, init: str, count: int) -> str:
    """The card of a data set of anchors."""
    anchors = as_dict(config.anchors) | {"source": ""}
    said = yaml.safe_dump({key: value for key, value in anchors.items() if value not in ("", None)}, sort_keys=False)
    parts = [
        "---\ntags:\n- model-merging\n- functional-dual-anchors\n---",
        f"# Functional dual anchors: {', '.join(config.tasks)}",
        f"{count} files, one for each task and block, of anchors that begin at {init}. {FDA}",
        f"`--anchors.source hf://datasets/ORG/NAME/{init}` takes them; they are made for these models alone:",
        "\n".join(made_of(config)),
        f"```yaml\n{said}```",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(config: Config, folder: Path) -> str:
    """The metadata that the hub reads: what was merged, tags, library, and the licence that the base's card says."""
    from huggingface_hub import ModelCardData

    places = [config.model.named("base"), *(config.model.named("expert", task) for task in config.tasks)]
    ids = map(place_name, places)
    known = [name for name in dict.fromkeys(ids) if "/" in name]
    data = ModelCardData(
        base_model=known or None,
        base_model_relation="merge" if known else None,
        library_name=library_of(folder),
        license=licence_of(folder_of(config.model.path("base"))),
        tags=["merge", "model-merging", "functional-dual-anchors"],
        ignore_metadata_errors=True,
    )
    return f"---\n{data.to_yaml()}\n---"


def library_of(folder: Path) -> str:
    """What opens a merged model."""
    marks = {OPEN_CLIP_CONFIG: "open_clip", MODULES_FILE: "sentence-transformers"}
    return next((library for mark, library in marks.items() if (folder / mark).is_file()), "transformers")


def licence_of(base: Path) -> str | None:
    """The licence in the card beside the base; None if it has no card that says one."""
    text = (base / CARD).read_text(encoding="utf-8") if (base / CARD).is_file() else ""
    try:
        said = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except yaml.YAMLError:
        return None
    return said.get("license") if isinstance(said, dict) and isinstance(said.get("license"), str) else None


def opening(folder: Path) -> str:
    """The lines that open a merged model with the library that it is for."""
    library = library_of(folder)
    named = (json_of(folder / CONFIG_FILE).get("architectures") or ["AutoModel"])[0]
    return OPENED[library].replace("{name}", named).replace("FOLDER", folder.name)


def method_of(made: Mapping[str, Any]) -> str:
    """In words: the merge method, or FDA and what it began with."""
    if made["method"] != "fda":
        return display(made["method"])
    start = "the pretrained model" if made["start"] == PRETRAINED else f"the merge of {display(made['start'])}"
    return f"Functional Dual Anchors, from {start}"


def data_used(made: Mapping[str, Any]) -> str:
    """Whether inputs of the tasks were used, and which."""
    if "data" not in made:
        return "without data of their tasks"
    counts = made["data"]["examples"]
    return f"with {made['data']['split']} inputs of their tasks ({', '.join(f'{t} {n}' for t, n in counts.items())})"


def made_of(config: Config) -> list[str]:
    """A line for the base and for each expert, by its name on the hub or that of its folder."""
    experts = [f"- {task}: `{place_name(config.model.named('expert', task))}`" for task in config.tasks]
    return [f"- base: `{place_name(config.model.named('base'))}`", *experts]


def settings(experiment: Experiment, made: Mapping[str, Any]) -> str:
    """What made the model, by its provenance, as the YAML of a config: the options that are set now can be others."""
    config, method = experiment.config, str(made["start"]["method"])
    start, folder = made["start"], RunLayout(config.at_start(method)).start
    if "anchors" in made and (folder / PROVENANCE_FILE).is_file():
        start = read_provenance(folder)["start"]
    hyper = by_part(chain_of(method), start["hyper"]) if "hyper" in start else {}
    defaults = {part: {name: p.default for name, p in hyperparameters(part).items()} for part in hyper}
    own = {part: {n: v for n, v in of_part.items() if v != defaults[part].get(n)} for part, of_part in hyper.items()}
    own = {part: of_part for part, of_part in own.items() if of_part}
    said = {"start": {"method": method} | ({"hyper": own} if own else {})}
    if "anchors" in made:
        said |= {"anchors": anchors_said(experiment, made), "adapt": without_empty(made["adapt"])}
    return yaml.safe_dump({"domain": config.domain, "tasks": config.tasks, **said}, sort_keys=False)


def anchors_said(experiment: Experiment, made: Mapping[str, Any]) -> dict[str, Any]:
    """How the anchors of an adapted model were made: as the config says if they are those that are there, of these
    settings; else what its provenance has of it."""
    config, init = experiment.config, str(made["anchors"]["init"])
    of_init = replace(experiment, config=replace(config, anchors=replace(config.anchors, init=init)))
    try:
        require_anchors(of_init)
    except InputError:
        return {"init": init}
    if anchor_hashes(of_init) != made["anchors"]["files"]:
        return {"init": init}
    anchors = of_init.config.anchors
    source = place_name(anchors.source) if anchors.source else "made by this run"
    return without_empty(as_dict(anchors)) | {"source": source}


def without_empty(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in ({}, "", None)}


def scores(config: Config, domain: Domain, made: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """The table of this model beside the base, the experts and its start; "" if it was not scored."""
    own = row_name({"start": None, "init": None, **made})
    wanted = {own, display(PRETRAINED), display(INDIVIDUAL), display(str(made.get("start") or PRETRAINED))}
    shown = [
        {key: value for key, value in row.items() if key not in ("seconds", "cpu_seconds", "peak_gib", "hardware")}
        for row in rows
        if row_name(row) in wanted and row["split"] == config.eval.split
    ]
    if not any(row_name(row) == own for row in shown):
        return ""
    tests: Sequence[str] = list(scored_tests(config, domain))
    unit = "percent" if domain.PERCENT else "fractions"
    return f"## Scores\n\nTest sets, in {unit}.\n\n{table(shown, tests, percent=domain.PERCENT)}".rstrip()
