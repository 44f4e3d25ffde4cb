"""What one table cannot show: how FDA's gain changes with the number of tasks, and with how far the experts are.

python scripts/study.py tasks --config configs/vision/toy.yaml    the first 2, 4, 6, 8 tasks
python scripts/study.py scale --config configs/vision/toy.yaml    experts θ₀ + s·τ, s a quarter to 1 (vision)

Options as of scripts/compare.py. Writes runs/<name>/study/<kind>/: a run for each point, rows.json and table.md; scale
also figure.png. A point that is there already is kept.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.command import run
from common.config import PRETRAINED, Config
from common.core.errors import InputError
from common.domain import Domain, scored_tests
from common.evaluation.figures import COLOURS, GREY, save
from common.evaluation.rows import display, read_results, row_name
from common.evaluation.scoring import RESULTS
from common.evaluation.significance import Difference, difference, in_words, scores_of
from common.evaluation.tables import aligned
from common.experiment import open_experiment
from common.io.checkpoints import write_text
from common.pipeline import merge_alone
from common.planning.regime import relative_norms
from compare import compare

SIZES = (2, 4, 6, 8)
SCALES = (0.25, 0.5, 0.75, 1.0)  # beyond 1 an expert soon is none: twice τ cost the toy's own 18 points


def of_tasks(config: Config, domain: Domain) -> Iterator[tuple[float, Config]]:
    """The experiment with the first tasks alone."""
    for size in SIZES:
        if size <= len(config.tasks):
            yield size, named(replace(config, tasks=config.tasks[:size]), f"tasks/{size}")


def of_scale(config: Config, domain: Domain) -> Iterator[tuple[float, Config]]:
    """The experiment with experts θ₀ + scale · τ, which are made as merges of one expert each."""
    if domain.NAME != "vision":
        raise InputError(
            "study.py scale is for vision: an expert of another domain has a head besides, which scales not"
        )
    for scale in SCALES:
        trial = named(config, f"scale/{scale:g}")
        for task in config.tasks:
            start = replace(config.start, method="ta", hyper={"ta": {"scale": scale}}, checkpoint="")
            alone = replace(trial.run, name=f"{trial.run.name}/experts/{task}", score=False)
            merge_alone(replace(config, tasks=[task], start=start, run=alone), domain)
        experts = (trial.run.dir / "experts").absolute() / "{task}" / "merged" / "ta"
        yield scale, replace(trial, model=replace(trial.model, expert=str(experts)))


def named(config: Config, name: str) -> Config:
    return replace(config, run=replace(config.run, name=f"{config.run.name}/study/{name}"))


def study(kind: str, config: Config, domain: Domain) -> None:
    """Run every point, and write what came of them."""
    rows: list[dict[str, Any]] = []
    for at, point in KINDS[kind](config, domain):
        compare(point, domain)
        rows += point_rows(at, point, domain)
    folder = config.run.dir / "study" / kind
    write_text(folder / "rows.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    text = table_of(kind, rows, domain.PERCENT)
    write_text(folder / "table.md", text)
    if kind == "scale":
        draw(rows, folder / "figure.png")
    print(f"\n{text}\n{folder}: rows.json and table.md")


def point_rows(at: float, point: Config, domain: Domain) -> list[dict[str, Any]]:
    """A row for each start of a point: its mean, that of FDA from it, the difference and its interval."""
    results, tasks = read_results(point.run.dir / RESULTS)
    assert tasks == list(scored_tests(point, domain))
    experiment, scores = open_experiment(point, domain), scores_of(results, tasks)
    norms = relative_norms(experiment, range(experiment.depth))
    ends = {name: mean_of(scores[display(name)]) for name in (PRETRAINED, "individual")}
    made = []
    for start in point.compare.starts:
        for init in point.compare.inits:
            fda = scores[row_name({"method": "fda", "start": start, "init": init})]
            gain = difference(fda, scores[display(start)])
            assert gain  # of the same seeds
            row = {"at": at, "start": start, "init": init, "norm": sum(norms.values()) / len(norms)} | ends
            made.append(row | {"avg": mean_of(scores[display(start)]), "fda": mean_of(fda), "gain": list(gain)})
    return made


def mean_of(scores: Any) -> float:
    """The mean score on the examples as they are, over the seeds."""
    return float(sum(drawn[0] for drawn in scores.values()) / len(scores))


def table_of(kind: str, rows: list[dict[str, Any]], percent: bool) -> str:
    """A line for each point and start."""
    unit = 100 if percent else 1
    head = {"tasks": "Tasks", "scale": "Scale"}[kind]
    lines = [[head, "‖τ‖/‖θ₀‖", "Pretrained", "Individual", "Start", "Avg", "FDA", "Δ"]]
    for row in rows:
        values = [f"{unit * row[key]:.2f}" for key in (PRETRAINED, "individual")]
        ends = [f"{unit * row[key]:.2f}" for key in ("avg", "fda")]
        gain = in_words(Difference(*row["gain"]), percent)
        lines.append([f"{row['at']:g}", f"{100 * row['norm']:.1f} %", *values, display(row["start"]), *ends, gain])
    return aligned(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """FDA's gain against the size of the task vectors, a line a start, with intervals (PNG)."""
    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for start, colour in zip(dict.fromkeys(row["start"] for row in rows), COLOURS, strict=False):
        points = [row for row in rows if row["start"] == start]
        x, gains = [100 * row["norm"] for row in points], [[100 * g for g in row["gain"]] for row in points]
        errors = [[mean - low for mean, low, _ in gains], [high - mean for mean, _, high in gains]]
        axes.errorbar(x, [g[0] for g in gains], errors, color=colour, marker="o", markersize=4, label=display(start))
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("‖τ‖/‖θ₀‖ of the blocks, mean over the experts (%)")
    axes.set_ylabel("FDA minus its start (points)")
    axes.legend(frameon=False, title="start")
    save(figure, path)


KINDS = {"tasks": of_tasks, "scale": of_scale}

if __name__ == "__main__":
    kind = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1] in KINDS else ""
    if not kind and not {"-h", "--help"} & set(sys.argv):
        print(f"error: study.py is called with one of {', '.join(KINDS)}, then options", file=sys.stderr)
        sys.exit(2)
    run(partial(study, kind), None, __doc__)
