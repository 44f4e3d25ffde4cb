"""The paper's figures besides scores for scripts/reproduce.py: the analyses behind them on our config of ViT-B/32, and
our numbers beside those read off the paper's (configs/paper_figures.yaml)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from common.analysis.material import Numbers, spread
from common.analysis.projection import BATCH, STARTS, UPDATES
from common.analysis.registry import ANALYSES
from common.analysis.run import analyse
from common.command import watched
from common.config import PRETRAINED, ROOT, Config
from common.domain import Domain, anchored_part, module_of
from common.evaluation.rows import display, values_by_name
from common.evaluation.scoring import results_of
from common.evaluation.tables import MISSING, aligned
from common.io.checkpoints import write_text
from common.io.json_files import read_object
from common.io.yaml_files import read_yaml_file
from common.pipeline import construct
from common.planning.dry_run import CONSTRUCT, Plan
from common.planning.dry_run import describe as plan_of
from common.planning.on_paper import all_of_fine_tuning, hours_in_words
from compare import compare
from compare import plan as plan_of_compare
from reproduce_tables import PAPER, config_of, described, not_fetched

CONFIG, DEPTH = PAPER["table5"].config, 12  # ViT-B/32
STEPS = (0, 20, 40, 60, 80, 100, 200, 400, 600, 800, 1000, 1200)  # of the construction, as the paper shows them
ALL = ("weight", "σ 0.01", "σ 1", "σ 0.0001", "σ 10")
"""Initialisations of anchors: of weights, or Gaussian of a scale σ."""


class Figure(NamedTuple):
    """A figure of the paper: its analysis, and the tasks and initialisations that it shows.

    starts: of an analysis that looks at adapted models, which are made by scripts/compare.py in the table's own run.
    Else every initialisation has a run of its own, which keeps the anchors along the way.
    """

    analysis: str
    inits: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()


FIGURES = {
    "figure2": Figure("landscape", ("gauss",), starts=(PRETRAINED, "ta")),
    "figure3": Figure("spectrum", ("σ 0.0001", "σ 0.01", "σ 10", "weight"), ("MNIST",)),
    "figure5": Figure("subspace", ALL, ("MNIST", "SVHN", "Cars", "GTSRB")),
    "figure6": Figure("projection", ALL, ("MNIST", "Cars")),
    "appendix_matching": Figure("matching", ALL),
    "appendix_bias": Figure("bias", ("weight", "gauss"), starts=(PRETRAINED, "ta", "tsv", "wudi")),
    "appendix_tsne": Figure("tsne", ("weight", "σ 0.01"), ("MNIST",)),
}


def config_of_figure(name: str, options: Sequence[str]) -> Config:
    """The config whose run has the analysis: the table's own, or one of the figures beside it."""
    figure, config = FIGURES[name], config_of(CONFIG, options)
    if figure.starts:
        inits: list[Literal["weight", "gauss"]] = [i for i in ("weight", "gauss") if i in figure.inits]
        compared = replace(config.compare, starts=list(figure.starts), inits=inits)
        return replace(config, anchors=replace(config.anchors, init=inits[0]), compare=compared)
    blocks = config.run.blocks if config.run.blocks is not None else spread(DEPTH, ANALYSES[figure.analysis].blocks)
    return replace(config, run=replace(config.run, name=f"{config.run.name}/figures", blocks=blocks))


def runs_of(name: str, config: Config) -> dict[str, Config]:
    """{initialisation: the run that has its anchors}; none where the run of the analysis has them."""
    return {} if FIGURES[name].starts else {init: with_anchors(config, init) for init in FIGURES[name].inits}


def with_anchors(config: Config, init: str) -> Config:
    """The run of an initialisation, with anchors kept along the way."""
    sigma = float(init.removeprefix("σ ")) if init.startswith("σ ") else None
    scheme: Literal["weight", "gauss"] = "weight" if sigma is None else "gauss"
    steps = sorted({step for step in STEPS if step < config.anchors.steps} | {config.anchors.steps})
    anchors = replace(config.anchors, init=scheme, scale=sigma, snapshots=steps)
    named = f"{config.run.name}/{scheme}{'' if sigma is None else f'_{sigma:g}'}"
    return replace(config, anchors=anchors, run=replace(config.run, name=named))


def constructed(name: str, run: Config) -> Config:
    """The run with the tasks that the figure shows, for a unit does not ask which others there are."""
    return replace(run, tasks=list(FIGURES[name].tasks or run.tasks))


def make(name: str, options: Sequence[str]) -> None:
    """Make the anchors and models that the figure shows, and measure and draw it; what is there already is kept."""
    figure, config = FIGURES[name], config_of_figure(name, options)
    domain, runs = module_of(config.domain), runs_of(name, config)
    for run in runs.values():
        own = constructed(name, run)
        with watched(own, domain):
            construct(own, domain)
    with watched(config, domain):
        if not runs:
            compare(config, domain)
        analyse(figure.analysis, config, domain, tasks=figure.tasks, runs=runs)


def describe(name: str, options: Sequence[str]) -> list[str]:
    """Print what the figure reads, makes and needs; returns what would be refused."""
    figure, config = FIGURES[name], config_of_figure(name, options)
    domain, runs = module_of(config.domain), runs_of(name, config)
    print(f"{figure.analysis}: {ANALYSES[figure.analysis].title}; of {', '.join(figure.tasks or config.tasks)}")
    if needed := ANALYSES[figure.analysis].needs:
        print(f"reads of each task's {'test set inputs and labels' if needed == 'labels' else 'test set 64 inputs'}")
    if figure.analysis == "projection":
        print(fine_tuning_of(len(STARTS) * len(figure.tasks), not_fetched(config), domain))
    if not runs:
        return described(config, domain, plan_of_compare)
    first = next(iter(runs.values()))
    refused = described(constructed(name, first), domain, plan_of_construction)
    units = len(first.run.blocks or ()) * len(constructed(name, first).tasks)
    print(f"  {'initialisations':18} {', '.join(map(display, runs))}: {len(runs)} times {units} units")
    return refused


def fine_tuning_of(times: int, config: Config, domain: Domain) -> str:
    """What is fine-tuned for a projection, and the hours of an H100 that it takes on paper."""
    part = anchored_part(config, domain)
    family = domain.family(config.model, part)
    batch = (BATCH, *domain.token_shape(config.model, part))
    work = all_of_fine_tuning(config, family, family.modules(domain.skeleton(config.model)), batch, UPDATES)
    said = f"fine-tunes {times} times, {UPDATES} updates of {BATCH} training examples each"
    return f"{said}: on an H100 {hours_in_words(work * times, 0, 'float32')}; nothing of it is measured"


def plan_of_construction(config: Config, domain: Domain) -> Plan:
    return plan_of(config, domain, CONSTRUCT)


# ---- ours beside the paper's -----------------------------------------------------------------------------------------

Curves = Mapping[str, Mapping[str, float]]
"""{panel: {curve: value}}."""


def verdict(name: str, options: Sequence[str]) -> str:
    """What the figure came to beside what was read off the paper's, which NAME.md beside it gets too."""
    config = config_of_figure(name, options)
    folder = config.run.dir / "analysis"
    analysis = FIGURES[name].analysis
    numbers = read_object(folder / f"{analysis}.json", "numbers of an analysis")
    text = f"{name}: {folder / analysis}.png\n\n{beside_paper(name, numbers, config)}"
    write_text(folder / f"{name}.md", text)
    return text


def paper_figures() -> dict[str, Any]:
    """What was read off the paper's figures, see the head of the file."""
    return read_yaml_file(ROOT / "configs/paper_figures.yaml")


def beside_paper(name: str, numbers: Numbers, config: Config) -> str:
    """A line for each number that was read off, and ours."""
    read = paper_figures().get(name)
    if not read:
        return "The paper's figure has no numbers that could be read off.\n"
    ours = SHOWN[FIGURES[name].analysis](numbers, config)
    lines = [["Panel", "curve", "ours", "paper", "Δ"]]
    for panel, curves in read["values"].items():
        for curve, paper in curves.items():
            value = ours.get(panel, {}).get(curve)
            compared = [MISSING, f"{paper:g}", MISSING] if value is None else both(value, paper)
            lines.append([panel, display(curve) if curve in ALL else curve, *compared])
    return f"{aligned(lines)}\n{read['what']}\n"


def both(ours: float, paper: float) -> list[str]:
    return [f"{ours:.3f}", f"{paper:g}", f"{ours - paper:+.3f}"]


def last(curve: Mapping[str, Any]) -> Any:
    """What a curve {step: value} comes to."""
    return curve[max(curve, key=int)]


def spectra(numbers: Numbers, config: Config) -> Curves:
    """s_D / s_1 of each panel at each step."""
    return {p["title"]: {f"step {step}": k[-1] for step, k in p["curves"].items()} for p in numbers["panels"]}


def subspaces(numbers: Numbers, config: Config) -> Curves:
    return {p["title"]: {init: last(curve) for init, curve in p["curves"].items()} for p in numbers["panels"]}


def projections(numbers: Numbers, config: Config) -> Curves:
    """The mean of both parts of the block."""

    def ends(panel: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        yield "expert", panel["reference"]["mean"]
        yield from ((init, last(curve)) for init, curve in panel["curves"]["mean"].items())

    return {panel["title"]: dict(ends(panel)) for panel in numbers["panels"]}


def averages(numbers: Numbers, config: Config) -> Curves:
    """Avg of every model that was scored, in percent."""
    rows = results_of(config)
    tests = sorted({row["task"] for row in rows})
    return {"Avg": {name: 100 * values[-1] for name, values in values_by_name(rows, tests).items()}}


SHOWN: dict[str, Callable[[Numbers, Config], Curves]] = {
    "landscape": averages,
    "spectrum": spectra,
    "subspace": subspaces,
    "projection": projections,
}
