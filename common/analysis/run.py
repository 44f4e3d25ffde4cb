"""One analysis of a run: refused or measured, then written as JSON and drawn."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import product
from textwrap import wrap
from typing import Any

from matplotlib.figure import Figure

from common.analysis.material import Material, Numbers, plain, spread
from common.analysis.registry import ANALYSES, functions
from common.config import Config, as_dict
from common.core.errors import InputError
from common.domain import Domain
from common.evaluation.figures import INK, legend, panels, save
from common.experiment import Experiment
from common.io.checkpoints import write_text
from common.io.hashes import digest
from common.layout import RunLayout
from common.opening import open_experiment
from common.provenance import no_anchors
from common.run.device import threads_for
from common.run.run_log import commit, record_stage
from common.validation import check_data


def analyse(
    name: str, config: Config, domain: Domain, *, tasks: Sequence[str] = (), runs: Mapping[str, Config] | None = None
) -> Numbers:
    """Measure what the analysis shows, and write runs/<name>/analysis/NAME.json and NAME.png.

    Args:
        tasks: Those that are looked at; all of the config if empty.
        runs: {initialisation: the config of the run that has its anchors}; else the config's own run has those of
            compare.inits.
    Returns: the numbers of the JSON.
    Raises: InputError before the work begins if the domain or the run lacks what it needs.
    """
    check_domain_has(name, config, domain)
    material = material_of(name, open_experiment(config, domain), domain, tasks, runs)
    check_run_has(name, material)
    measure, _ = functions(name)
    threads = nullcontext() if ANALYSES[name].units else threads_for(material.experiment.largest_product)
    with threads, record_stage(config, f"analyse {name}"):
        measured = plain(measure(material))
    said = {"analysis": name, "title": ANALYSES[name].title.replace("$", "")}
    birth = said | {"config": digest(as_dict(config)), "commit": commit(), "seed": config.run.seed}
    folder = config.run.dir / "analysis"
    write_text(folder / f"{name}.json", json.dumps(birth | measured, indent=1, ensure_ascii=False) + "\n")
    save(figure_of(name, measured), folder / f"{name}.png")
    print(f"{folder}: {name}.json and {name}.png")
    return measured


def inits_of(name: str, config: Config) -> list[str]:
    """The initialisations of the anchors that an analysis looks at."""
    several = ANALYSES[name].anchors != "one" and not config.anchors.source
    return list(config.compare.inits) if several else [config.anchors.init]


def blocks_of(name: str, experiment: Experiment) -> list[int]:
    """The blocks that an analysis looks at."""
    chosen = experiment.config.run.blocks is not None
    return experiment.blocks if chosen else spread(experiment.depth, ANALYSES[name].blocks)


def material_of(
    name: str,
    experiment: Experiment,
    domain: Domain,
    tasks: Sequence[str] = (),
    runs: Mapping[str, Config] | None = None,
) -> Material:
    """What the analysis reads, see `analyse`."""
    config = experiment.config
    inits = list(runs or inits_of(name, config))
    return Material(domain, experiment, blocks_of(name, experiment), list(tasks or config.tasks), inits, runs or {})


# ---- what it needs ---------------------------------------------------------------------------------------------------


def check_domain_has(name: str, config: Config, domain: Domain) -> None:
    """InputError if the domain has no inputs of the tasks, or no labels, for an analysis that needs them."""
    if name not in ANALYSES:
        raise InputError(f"there is no analysis {name!r}; choose from {', '.join(ANALYSES)}")
    needs = ANALYSES[name].needs
    if needs:
        check_data(config, domain, f"analyse.py {name}")
    if needs == "labels" and domain.labelled_task is None:
        raise InputError(f"analyse.py {name} needs labelled examples of the tasks; {domain.NAME} has none for it")


def check_run_has(name: str, material: Material) -> None:
    """InputError if anchors that an analysis looks at are not there, or it would look at nothing."""
    if ANALYSES[name].anchors == "merges":
        if not material.config.compare.starts:
            raise InputError(f"analyse.py {name} looks at the merges of compare.starts, which names none")
        return
    if not material.inits:
        raise InputError(f"analyse.py {name} looks at the anchors of compare.inits, which names none")
    if ANALYSES[name].anchors == "models":
        return
    for init, task, index in product(material.inits, material.tasks, material.blocks):
        of_init = material.at(init).config
        file = RunLayout(of_init).anchor_file(task, index)
        if not file.is_file():
            raise no_anchors(file, of_init)


# ---- how it is drawn -------------------------------------------------------------------------------------------------


def figure_of(name: str, numbers: Numbers) -> Figure:
    """The panels of an analysis, and one legend of all that is in them."""
    row, shown = ANALYSES[name], numbers["panels"]
    columns = min(len(shown), row.columns)
    lines = math.ceil(len(shown) / columns)
    size = (row.size[0] * columns + 1.7, row.size[1] * lines + 0.9)
    figure, grid = panels(size, lines, columns, len(shown), shared=row.shared)
    entries: dict[str, Any] = {}
    for axes, panel in zip(grid, shown, strict=True):
        functions(name)[1](axes, panel, numbers)
        axes.set_title(panel["title"], fontsize=9, color=INK, pad=4)
        handles, labels = axes.get_legend_handles_labels()
        entries |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in entries}
    figure.suptitle("\n".join(wrap(row.title, int(10 * size[0]))), fontsize=12, color=INK)
    figure.set_figheight(max(size[1], 0.24 * len(entries) + 0.5))  # the legend has room
    figure.supxlabel(row.x, fontsize=10, color=INK)
    figure.supylabel(row.y, fontsize=10, color=INK)
    if entries:
        legend(figure, list(entries.values()))
    return figure
