"""The paper's tables for scripts/reproduce.py: our config of each, and our numbers beside the published ones."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.command import parse, watched
from common.config import ROOT, Config
from common.core.errors import InputError
from common.domain import Domain, module_of, scored_tests
from common.evaluation.rows import values_by_name
from common.evaluation.scoring import results_of
from common.evaluation.significance import scores_of
from common.evaluation.tables import MISSING, aligned, cell, published_values
from common.io.checkpoints import write_text
from common.io.hub import headers_only
from common.io.paper_tables import paper_table
from common.planning.dry_run import Plan, needs
from compare import compare, plan

SETTINGS = "anchor-64-scale-{scale}-opt-1200-0.01"
VISION = {"gauss": f"init_by_gauss_random-{SETTINGS}", "weight": f"init_by_weights-{SETTINGS}"}
NLU = {"gauss": f"init_by_gauss_random_pos-{SETTINGS}", "weight": f"init_by_weights_pos-{SETTINGS}"}
SCALES = {"gauss": "0.01", "weight": "1.0"}


class Paper(NamedTuple):
    """A table of the paper: our config of it, and the folders of the released anchors by initialisation, if known."""

    config: str
    released: str = ""

    def anchors(self, init: str) -> str:
        """anchors.source of the released anchors with an initialisation."""
        names = VISION if self.config.startswith("vision") else NLU
        task = "{task}" if self.config.startswith("vision") else "{slug}"
        return f"hf://datasets/{self.released}/{names[init].format(scale=SCALES[init])}/{task}"


PAPER = {
    "table1": Paper("vision/vit_b16"),
    "table2": Paper("nlu/roberta_large", "SphereLab/FDA_for_NLU/roberta-large"),
    "table3": Paper("nlg/llama2_13b"),
    "table5": Paper("vision/vit_b32", "SphereLab/FDA_for_Vision/ViT-B-32"),
    "table6": Paper("vision/vit_l14", "SphereLab/FDA_for_Vision/ViT-L-14"),
    "table7": Paper("nlu/roberta_base", "SphereLab/FDA_for_NLU/roberta-base"),
}


def config_of(file: str, options: Sequence[str]) -> Config:
    """The config configs/FILE.yaml under some options."""
    return parse("", ["--config", str(ROOT / "configs" / f"{file}.yaml"), *options])


def configs_of(name: str, options: Sequence[str], published: bool = False) -> list[Config]:
    """The runs of a table: one, or with the released anchors one for each initialisation, in one folder."""
    config = config_of(PAPER[name].config, options)
    if not published:
        return [config]
    config = replace(config, run=replace(config.run, name=f"{config.run.name}_published"))
    return [
        replace(
            config,
            anchors=replace(config.anchors, source=PAPER[name].anchors(init)),
            compare=replace(config.compare, inits=[init]),
        )
        for init in config.compare.inits
    ]


def make(name: str, options: Sequence[str], published: bool = False) -> None:
    """Make what the table is made of; what is there already is kept."""
    for config in configs_of(name, options, published):
        with watched(config, domain := module_of(config.domain)):
            compare(config, domain)


def describe(name: str, options: Sequence[str], published: bool = False) -> list[str]:
    """Print what the table reads, makes and needs; returns what would be refused."""
    configs = configs_of(name, options, published)
    return [sentence for config in configs for sentence in described(config, module_of(config.domain), plan)]


def described(config: Config, domain: Domain, planned: Callable[[Config, Domain], Plan]) -> list[str]:
    """Print the plan of a run, or without the hub what its architecture tells; returns what would be refused."""
    print(f"---- {config.run.dir}")
    try:
        with headers_only():
            said = planned(config, domain)
    except InputError as error:
        print("\n".join(needs(not_fetched(config), domain)))
        return [str(error)]
    print(said.text.partition("\n\n")[2])  # without the config, which stands in its file
    return said.refusals


def not_fetched(config: Config) -> Config:
    """The config with models that are nowhere, of which the architecture is known all the same."""
    return replace(config, model=replace(config.model, root="not fetched", base=Path(config.model.base).name))


def verdict(name: str, options: Sequence[str], published: bool = False) -> str:
    """What the table came to beside what is published, which reproduced.md of the run gets too."""
    config = configs_of(name, options, published)[-1]
    text = f"{name}\n\n{beside_paper(config, module_of(config.domain))}"
    write_text(config.run.dir / "reproduced.md", text)
    return text


def verdict_of(gap: float, error: float) -> str:
    """How many standard errors there are between our score and the paper's. Scores of two equally good models on other
    examples would be more than one apart in half of the cases; on the same ones they are nearer."""
    return "within" if gap <= error else "within two" if gap <= 2 * error else "beyond"


def beside_paper(config: Config, domain: Domain) -> str:
    """Avg of every row that the paper has too, Δ, and whether it is within one or two standard errors of ours, by the
    bootstrap over the test sets' examples."""
    rows, tests = results_of(config), list(scored_tests(config, domain))
    ours, drawn = values_by_name(rows, tests), scores_of(rows, tests)
    published, percent = paper_table(config.eval.paper_table), domain.PERCENT
    if not published:
        raise InputError("eval.paper_table is empty: there is nothing to set beside our numbers")
    paper = published_values(published, tests)
    lines = [["Avg", "ours", "paper", "Δ", "standard error", "verdict"]]
    for row in filter(paper.__contains__, ours):
        gap = ours[row][-1] - paper[row][-1]
        error = float(np.std(np.mean(list(drawn[row].values()), (0, 1))[1:])) if row in drawn else math.nan
        said = MISSING if math.isnan(error) else verdict_of(abs(gap), error)
        numbers = (cell(ours[row][-1], percent), cell(paper[row][-1], percent), cell(gap, percent, "+"))
        lines.append([row, *numbers, cell(error, percent), said])
    return aligned(lines)
