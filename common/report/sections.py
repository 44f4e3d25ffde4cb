"""What the page says of one run, section by section."""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from common.evaluation.rows import display
from common.report import accuracy, curves, origin
from common.report.charts import Chart
from common.report.reading import RunRecord
from common.report.results import results_of
from common.report.vectors import cosines, relative


class Part(NamedTuple):
    """A piece of a section; `fold`: what is pressed to see its table or code."""

    title: str = ""
    text: str = ""
    chart: Chart | None = None
    table: Sequence[Sequence[str]] = ()
    code: str = ""
    fold: str = ""
    image: str = ""
    alt: str = ""
    caption: str = ""


class Section(NamedTuple):
    id: str
    title: str
    body: Sequence[Part]


def shown(run: RunRecord, id: str) -> dict[str, Any]:
    """What page.html needs of a run."""
    sections = [
        Section("results", "Results", [Part()]),
        Section("accuracy", "Accuracy by task", charts(accuracy.accuracy(run))),
        Section("seconds", "Accuracy against seconds", charts(accuracy.seconds([run]))),
        Section("matching", "Matching", matching(run)),
        Section("adaptation", "Adaptation", charts(curves.adaptation(run), of_part(run))),
        Section("vectors", "Task vectors", task_vectors(run)),
        Section("analyses", "Analyses", analyses(run)),
        Section("origin", "What was made from what", made_from(run)),
        Section("cost", "Cost of each stage", cost(run)),
        Section("config", "Config and versions", settings(run)),
    ]
    return {
        "id": id,
        "name": run.name,
        "domain": run.config["domain"],
        "tasks": run.config["tasks"],
        "results": results_of(run),
        "sections": sections,
    }


def charts(chart: Chart | None, text: str = "") -> list[Part]:
    return [Part(chart=chart, text=text)] if chart else []


def of_part(run: RunRecord) -> str:
    """Which of several seeds curves are of."""
    return f"Of {run.curves_of}, the first." if run.curves_of else ""


def matching(run: RunRecord) -> list[Part]:
    """The curves of each initialisation, and where they end."""
    parts = []
    for init, traces in sorted(run.matching.items()):
        chart = curves.matching(run, init)
        table = [["block", *chart.legend]]
        for block in sorted({block for _, block in traces}):
            ends = (traces.get((task, block), ()) for task in chart.legend)
            table.append([str(block), *(f"{end[0]:.3f} → {min(end):.3f}" if end else "" for end in ends)])
        folded = "Matching loss before the first step and at best"
        parts.append(Part(f"{display(init)} initialisation", of_part(run), chart, table, fold=folded))
    return parts


def task_vectors(run: RunRecord) -> list[Part]:
    """Norms and angles."""
    found = run.vectors
    if not found:
        return []
    tasks, sizes, angles = list(found["tasks"]), relative(found), cosines(found)
    norms, pairs = [["block", *tasks]], [["", *tasks]]
    norms += ([str(i), *(f"{100 * sizes[t][i]:.2f} %" for t in tasks)] for i in range(len(found["blocks"])))
    pairs += ([task, *(f"{x:.4f}" for x in row)] for task, row in zip(tasks, angles, strict=True))
    return [
        Part("Size", of_part(run), curves.norms(found), norms, fold="‖τ‖/‖θ₀‖ in numbers"),
        *([Part("Angles", "", curves.angles(found), pairs, fold="Cosines in numbers")] if len(tasks) > 1 else []),
    ]


def analyses(run: RunRecord) -> list[Part]:
    return [
        Part(a.title, image=base64.b64encode(a.png).decode(), alt=f"{a.title}. {a.caption}".strip(), caption=a.caption)
        for a in run.analyses
    ]


def made_from(run: RunRecord) -> list[Part]:
    """The graph, and every field of what the models were made from."""
    if not (chart := origin.graph(run)):
        return []
    rows = origin.table(run)
    models = [["model", "made from"], *([name, of] for name, of, _ in rows)]
    fields = "\n\n".join(f"{name}\n" + "\n".join(f"  {line}" for line in lines) for name, _, lines in rows)
    return [
        Part(text=of_part(run), chart=chart, table=models if rows else ()),
        Part("Checkpoints", table=[["what", "where"], *map(list, origin.checkpoints(run))]),
        Part(code=fields, fold="Provenance of each model"),
    ]


def cost(run: RunRecord) -> list[Part]:
    """A line for each stage."""
    head = ["stage", "ended", "units", "seconds", "processor seconds", "peak GiB", "when", "commit"]
    lines = []
    for stage, note in run.notes.items():
        of_processors = f"{note['cpu_seconds']:.1f}" if "cpu_seconds" in note else ""
        took = [f"{note['units']} of {note['units_of']}", f"{note['seconds']:.1f}", of_processors]
        lines.append([stage, note["ended"], *took, f"{note['peak_gib']:.2f}", note["time"], note["commit"]])
    total = sum(note["seconds"] for note in run.notes.values())
    return [Part(chart=curves.stages(run)), Part(table=[head, *lines, ["all", "", "", f"{total:.1f}", "", "", "", ""]])]


def machine_of(note: Mapping[str, Any]) -> dict[str, Any]:
    """{what is said of the machine of a stage: by its note}; those of older releases have no processor."""
    return {"machine": note["machine"], "processor": note.get("processor"), "GPU": note["gpu"]}


def settings(run: RunRecord) -> list[Part]:
    """The config as YAML, and the versions and machines that the stages noted."""
    said = {k: v for k, v in run.config.items() if k != "dry_run"}
    text = yaml.safe_dump(json.loads(json.dumps(said)), sort_keys=False, allow_unicode=True, width=100)
    found: dict[str, dict[str, None]] = {}
    for note in run.notes.values():
        for part, version in {**note["versions"], **machine_of(note)}.items():
            if version:
                found.setdefault(part, {})[str(version)] = None
    table = [["part", "version"], *([part, ", ".join(versions)] for part, versions in found.items())]
    return [Part(code=text, fold="Config"), Part(table=table, fold="Versions and machine")]
