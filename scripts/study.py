"""What one table cannot show: what FDA's gain depends on, and what it costs.

python scripts/study.py tasks     --config FILE   the first 2, 4, 6, 8 tasks
python scripts/study.py rates     --config FILE   experts tuned at other rates: when does it pay?
python scripts/study.py scale     --config FILE   experts θ₀ + s·τ, s a quarter to 1 (vision)
python scripts/study.py ablations --config FILE   the paper's: initialisation, shape, distances, steps, epochs
python scripts/study.py real      --config FILE   real inputs of each block in the place of anchors (vision)
python scripts/study.py cost      --config FILE   seconds of each row of compare's own run beside its gain
python scripts/study.py methods   --config FILE   the same, a line for each of many starts: accuracy against seconds
python scripts/make_toy.py vision --out toy/vision-RATE --rate RATE   the experts of each rate, before `rates`

Options as of scripts/compare.py, whose --compare.seeds is the study of seeds. Writes runs/<name>/study/<kind>/: a run
for each point, kept if it is there, rows.json and table.md, of rates, scale and methods also figure.png.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from common.command import run
from common.config import PRETRAINED, Config
from common.core.errors import InputError
from common.domain import Domain, anchored_part, first_tests, scored_tests
from common.evaluation.rows import INDIVIDUAL, Row, display, read_results, row_name
from common.evaluation.scoring import RESULTS
from common.evaluation.significance import average, difference, scores_of
from common.evaluation.studies import FIGURES, Rows, table_of
from common.io.checkpoints import write_text
from common.io.examples import Sample
from common.merging.calibration import block_params, first_block_inputs, next_block_inputs
from common.opening import open_experiment
from common.pipeline import merge_alone
from common.planning.regime import relative_norms
from common.run.run_log import CLOCKS
from common.validation import check_data
from compare import compare

SIZES = (2, 4, 6, 8)
SCALES = (0.25, 0.5, 0.75, 1.0)  # beyond 1 an expert soon is none: twice τ cost the toy's own 18 points
RATES = ("2e-5", "7e-5", "2e-4", "5e-4", "1e-3")  # of the fine-tuning; the toy's own is among them
TA_SCALES = [0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]  # TA's coefficient, chosen anew at each rate
SIGMAS = (1e-4, 1e-2, 1.0, 10.0)  # of Gaussian anchors
NUMBERS, TOKENS, STEPS, EPOCHS = (0.25, 0.5, 2), (0.25, 0.5), (0, 0.2, 0.5, 2), (0.1, 0.25, 0.5, 2)  # of the config's
DISTANCES, WEIGHTS = ("cos", "mse", "l1"), ("equal", "size", "norm")
REAL = (32, 256)  # inputs of each task


# ---- points: (value, experiment) -------------------------------------------------------------------------------------


def of_tasks(config: Config, domain: Domain) -> Iterator[tuple[float, Config]]:
    """The experiment with the first tasks alone."""
    for size in SIZES:
        if size <= len(config.tasks):
            yield size, named(replace(config, tasks=config.tasks[:size]), f"tasks/{size}")


def of_rates(config: Config, domain: Domain) -> Iterator[tuple[float, Config]]:
    """The experiment with experts fine-tuned at other rates, TA's coefficient chosen on the validation cut of each."""
    compared = replace(config.compare, search={"ta": {"scale": TA_SCALES}} if "ta" in config.compare.starts else {})
    roots = {rate: rate_folder(config, rate) for rate in RATES}
    for rate, root in roots.items():
        if not root.is_dir():
            made = f"python scripts/make_toy.py {domain.NAME} --out {root.parent} --rate {rate}"
            raise InputError(f"there are no experts in {root}: {made}")
    for rate, root in roots.items():
        model = replace(config.model, root=str(root))
        yield float(rate), named(replace(config, model=model, compare=compared), f"rates/{rate}")


def rate_folder(config: Config, rate: str) -> Path:
    """Where the toy's experts of a rate are: toy/vision/checkpoints -> toy/vision-RATE/checkpoints."""
    root = Path(config.model.root)
    return root.parent.with_name(f"{root.parent.name}-{rate}") / root.name


def of_scale(config: Config, domain: Domain) -> Iterator[tuple[float, Config]]:
    """The experiment with experts θ₀ + scale · τ, which are made as merges of one expert each."""
    if domain.NAME != "vision":
        raise InputError(
            "study.py scale is for vision: an expert of another domain has a head besides, which cannot be scaled"
        )
    for scale in SCALES:
        trial = named(config, f"scale/{scale:g}")
        for task in config.tasks:
            start = replace(config.start, method="ta", hyper={"ta": {"scale": scale}}, checkpoint="")
            alone = replace(trial.run, name=f"{trial.run.name}/experts/{task}", score=False)
            merge_alone(replace(config, tasks=[task], start=start, run=alone), domain)
        experts = (trial.run.dir / "experts").absolute() / "{task}" / "merged" / "ta"
        yield scale, replace(trial, model=replace(trial.model, expert=str(experts)))


def of_real(config: Config, domain: Domain) -> Iterator[tuple[float, Config]]:
    """The experiment with real inputs of each block in the place of anchors, so many of each task's training set.

    They are what reaches the block in the expert: the best that anchors could be. Vision, where all inputs are as long.
    """
    if domain.NAME != "vision" or domain.calibration_task is None:
        raise InputError("study.py real is for vision: texts are of many lengths, and anchors have one")
    check_data(config, domain, "study.py real")
    experiment, tests = open_experiment(config, domain), first_tests(config, domain)
    for inputs in REAL:
        point = named(config, f"real/{inputs}")
        for task, expert in experiment.experts.items():
            drawn = Sample(split="train", examples=inputs, batch=inputs)
            calibration = domain.calibration_task(config, tests[task], drawn, experiment.device)
            theta = expert.read(expert.shapes)
            flow = first_block_inputs(calibration, theta)
            for index, prefix in enumerate(calibration.prefixes):
                file = point.run.dir / "inputs" / task / f"dual_anchors_layer_{index + 1}.npy"
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, flow[0].x_ATD.transpose(0, 1).numpy(force=True))  # released anchors are TAD
                flow = next_block_inputs(calibration, block_params(theta, prefix), flow)
        source = replace(point.anchors, source=str(point.run.dir / "inputs"))
        yield inputs, replace(point, anchors=source, compare=replace(point.compare, inits=point.compare.inits[:1]))


def named(config: Config, name: str) -> Config:
    return replace(config, run=replace(config.run, name=f"{config.run.name}/study/{name}"))


def along(kind: str, config: Config, domain: Domain) -> Rows:
    """Run every point of a study of one number; a row for each start of each: its mean, that of FDA, and the gain."""
    rows: Rows = []
    for at, point in POINTS[kind](config, domain):
        compare(point, domain)
        rows += point_rows(at, point, domain)
    return rows


def point_rows(at: float, point: Config, domain: Domain) -> Rows:
    """A row for each start of a point: its mean, that of FDA from it, the difference and its interval."""
    results, tasks = results_of(point, domain)
    experiment, scores = open_experiment(point, domain), scores_of(results, tasks)
    norms = relative_norms(experiment, range(experiment.depth))
    ends = {name: average(scores[display(name)]) for name in (PRETRAINED, INDIVIDUAL)}
    made = []
    for start in point.compare.starts:
        for init in point.compare.inits:
            fda = scores[row_name({"method": "fda", "start": start, "init": init})]
            gain = difference(fda, scores[display(start)])
            assert gain  # of the same seeds
            row = {"at": at, "start": start, "init": init, "norm": sum(norms.values()) / len(norms)} | ends
            made.append(row | {"avg": average(scores[display(start)]), "fda": average(fda), "gain": list(gain)})
    return made


def results_of(point: Config, domain: Domain) -> tuple[Sequence[Row], list[str]]:
    results, tasks = read_results(point.run.dir / RESULTS)
    assert tasks == list(scored_tests(point, domain))
    return results, tasks


# ---- ablations -------------------------------------------------------------------------------------------------------


def of_ablations(config: Config, domain: Domain) -> Iterator[tuple[str, str, Config]]:
    """(what is changed, to what, experiment): from the pretrained model, one change at a time from the config's own.

    What leaves the anchors as they are shares the run that has them, under a label.
    """
    config = replace(config, compare=replace(config.compare, starts=[PRETRAINED], inits=[config.anchors.init]))
    anchors, adapt = config.anchors, config.adapt.for_start(PRETRAINED)
    tokens = anchors.tokens or domain.token_shape(config.model, anchored_part(config, domain))[0]

    def changed(what: str, name: str, init: str = anchors.init, **to: Any) -> tuple[str, str, Config]:
        point = replace(config, compare=replace(config.compare, inits=[init]), anchors=replace(anchors, **to))
        return what, name, named(point, f"ablations/{what}-{name}".replace(" ", "-"))

    def retrained(what: str, name: str, point: Config, **to: Any) -> tuple[str, str, Config]:
        by_start = {**point.adapt.by_start, PRETRAINED: {**point.adapt.by_start.get(PRETRAINED, {}), **to}}
        return what, name, replace(point, adapt=replace(point.adapt, by_start=by_start, label=f"{what} {name}"))

    own = named(config, "ablations/own")
    yield "as configured", "", own
    for sigma in SIGMAS:
        yield changed("init", f"σ {sigma:g}", "gauss", scale=sigma)
    if anchors.init != "weight":
        yield changed("init", "weight", "weight", scale=None)
    yield from (changed("anchors", str(n), number=n) for n in sizes(anchors.number, NUMBERS))
    yield from (changed("tokens", str(n), tokens=n) for n in sizes(tokens, TOKENS))
    yield from (changed("steps", str(n), steps=n) for n in sizes(anchors.steps, STEPS))
    yield from (changed("weights", by, weights=by) for by in WEIGHTS if by != anchors.weights)
    for first in DISTANCES:
        point = own if first == anchors.distance else changed("distance", first, distance=first)[2]
        for second in DISTANCES:
            if (first, second) != (anchors.distance, adapt.distance):
                yield retrained("distance", f"{first}, {second}", point, distance=second)
    yield from (retrained("epochs", str(n), own, epochs=n) for n in sizes(adapt.epochs, EPOCHS))


def sizes(of: int, factors: Sequence[float]) -> list[int]:
    """So many times a number, rounded, none twice nor the number itself."""
    return sorted({round(f * of) for f in factors} - {of})


def ablations(config: Config, domain: Domain) -> Rows:
    """A row for each change: the mean of FDA from the pretrained model, and its difference from the config's own."""
    rows: Rows = []
    scored: dict[str, Any] = {}
    for what, name, point in of_ablations(config, domain):
        compare(point, domain)
        results, tasks = results_of(point, domain)
        (init,) = point.compare.inits
        fda = {"method": "fda", "start": PRETRAINED, "init": init, "label": point.adapt.label}
        ours = scores_of(results, tasks)[row_name(fda)]
        scored.setdefault("own", ours)
        gain = difference(ours, scored["own"])
        assert gain
        rows.append({"what": what, "at": name, "fda": average(ours), "gain": list(gain)})
    return rows


# ---- cost ------------------------------------------------------------------------------------------------------------


def cost(config: Config, domain: Domain) -> Rows:
    """A row for each merged model of compare's own run that every test set has: its mean, its gains over the pretrained
    model and over its start, and what it took, each the mean over the seeds.

    The seconds of an FDA row are those of its start, the anchors and the adaptation together.
    """
    compare(config, domain)
    results, tasks = results_of(config, domain)
    scores, made = scores_of(results, tasks), []
    timed = {n: r for r in results if (n := row_name(r)) in scores and "cpu_seconds" in r and not r["label"]}
    spent = {name: {clock: mean_cost(results, name, clock) for clock in CLOCKS} for name in timed}
    for name, row in timed.items():
        start = display(row["start"]) if row["method"] == "fda" else display(PRETRAINED)
        gains = {
            key: difference(scores[name], scores[of]) for key, of in (("gain", display(PRETRAINED)), ("step", start))
        }
        line = {"name": name, "start": row["start"] or "", "avg": average(scores[name]), "hardware": row["hardware"]}
        line |= {clock: spent[name][clock] + spent.get(start, {}).get(clock, 0) for clock in CLOCKS}
        line |= {f"step_{clock}": spent[name][clock] for clock in CLOCKS}
        made.append(line | {key: list(gain) for key, gain in gains.items() if gain})
    return made


def mean_cost(results: Sequence[Row], name: str, clock: str) -> float:
    """What the models of a name took, on average over the seeds."""
    return fmean({row.get("seed"): row[clock] for row in results if row_name(row) == name and clock in row}.values())


# ---- the command -----------------------------------------------------------------------------------------------------


def study(kind: str, config: Config, domain: Domain) -> None:
    """Run every point, and write what came of them."""
    rows = KINDS[kind](config, domain)
    folder = config.run.dir / "study" / kind
    write_text(folder / "rows.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    text = table_of(kind, rows, domain.PERCENT)
    write_text(folder / "table.md", text)
    if kind in FIGURES:
        FIGURES[kind](rows, folder / "figure.png", domain.PERCENT)
    print(f"\n{text}\n{folder}: rows.json and table.md")


POINTS = {"tasks": of_tasks, "rates": of_rates, "scale": of_scale, "real": of_real}
KINDS = {kind: partial(along, kind) for kind in POINTS} | {"ablations": ablations, "cost": cost, "methods": cost}

if __name__ == "__main__":
    kind = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1] in KINDS else ""
    if not kind and not {"-h", "--help"} & set(sys.argv):
        print(f"error: study.py is called with one of {', '.join(KINDS)}, then options", file=sys.stderr)
        sys.exit(2)
    run(partial(study, kind), None, __doc__)
