"""What was made from what: merged models, their starts, anchors and checkpoints, as a graph and a table."""

import json
from collections.abc import Mapping
from typing import Any

from common.config import PRETRAINED
from common.core.places import for_task
from common.evaluation.rows import display
from common.io.checkpoints import flattened
from common.report.charts import Chart, Panel, Spec, layers, quantity, tips
from common.report.reading import Made, RunRecord

COLUMNS = ((0, 24), (33, 60), (68, 100))  # left and right edge of the boxes, in hundredths of the width
HALF = 0.4  # of a box's height, in lines


def graph(run: RunRecord) -> Chart | None:
    """Three columns: checkpoints; merges and anchors; adapted models. A line leads from each to what was made of it."""
    if not run.made and not run.matching:
        return None
    experts = f"{len(run.config['tasks'])} experts"
    nodes = {"base": (0, "base", "checkpoint"), "experts": (0, experts, "checkpoint")}
    edges = []
    fda = [made for made in run.made if made.row["method"] == "fda"]
    inits = sorted({*run.matching, *(made.row["init"] for made in fda)})
    for init in inits:
        nodes[f"anchors {init}"] = (1, f"anchors\n{display(init)}", "anchors")
        edges += [("base", f"anchors {init}"), ("experts", f"anchors {init}")]
    for made in run.made:
        if made.row["method"] != "fda":
            nodes[made.row["method"]] = (1, made.name, "merge")
            edges += [("base", made.row["method"]), ("experts", made.row["method"])]
    for made in fda:
        start = str(made.row["start"])
        key = "base" if start == PRETRAINED else start
        if key not in nodes:  # a merge made elsewhere
            nodes[key] = (1, display(start), "merge")
        nodes[made.folder] = (2, made.name.replace(" (", "\n").replace(")", ""), "adapted")
        edges += [(key, made.folder), (f"anchors {made.row['init']}", made.folder)]
    caption = "Adapted models also take the experts' answers on the anchors" + rest_of(run) + "."
    alt = "; ".join(f"{made.name} from {', '.join(made_from(made))}" for made in run.made)
    return Chart(caption, [Panel("", alt, drawn(nodes, edges))])


def rest_of(run: RunRecord) -> str:
    """Where the adapted models have what lies around the blocks from."""
    rests = {made.provenance["adapt"]["rest"] for made in run.made if made.row["method"] == "fda"}
    return {"pretrained": ", and what lies around the blocks from the base"}.get(rests.pop(), "") if rests else ""


def drawn(nodes: Mapping[str, tuple[int, str, str]], edges: list[tuple[str, str]]) -> Spec:
    """Boxes in columns, each column spread over the height, and the lines between them."""
    columns = [[key for key, (column, *_) in nodes.items() if column == i] for i in range(len(COLUMNS))]
    tallest = max(map(len, columns))
    at = {key: (line + 0.5) * tallest / len(keys) for keys in columns for line, key in enumerate(keys)}
    boxes = [
        {"kind": "node", "what": what, "text": text, "x": COLUMNS[column][0], "x2": COLUMNS[column][1]}
        | {
            "y": at[key] - HALF,
            "y2": at[key] + HALF,
            "xm": sum(COLUMNS[column]) / 2,
            "ym": at[key] - 0.13 * text.count("\n"),
        }
        for key, (column, text, what) in nodes.items()
    ]
    links = [
        {"kind": "edge", "x": COLUMNS[nodes[a][0]][1], "x2": COLUMNS[nodes[b][0]][0], "y": at[a], "y2": at[b]}
        for a, b in edges
    ]
    x, y = quantity("x", None, domain=[0, 100]), quantity("y", None, domain=[0, tallest], reverse=True)
    x, y = x | {"axis": None}, y | {"axis": None}
    ends = {"x": x, "y": y, "x2": {"field": "x2"}, "y2": {"field": "y2"}}
    colour = {"field": "what", "type": "nominal", "legend": None}
    colour |= {"scale": {"domain": ["checkpoint", "anchors", "merge", "adapted"]}}
    middle = {"x": x | {"field": "xm"}, "y": y | {"field": "ym"}, "text": {"field": "text"}}

    def of(kind: str, mark: Spec, encoding: Spec) -> Spec:
        return {"transform": [{"filter": {"field": "kind", "equal": kind}}], "mark": mark, "encoding": encoding}

    return layers(
        [*links, *boxes],
        of("edge", {"type": "rule", "style": "edge"}, ends),
        of("node", {"type": "rect", "style": "node"}, ends | {"stroke": colour, "tooltip": tips(("what", "what"))}),
        of("node", {"type": "text", "fontSize": 10, "lineBreak": "\n", "lineHeight": 12, "dy": -1}, middle),
        height=46 * tallest,
    )


def made_from(made: Made) -> list[str]:
    """In words: checkpoints, and of an adapted model start and anchors."""
    if made.row["method"] != "fda":
        return ["base", "experts"]
    return [display(str(made.row["start"])), f"anchors {display(made.row['init'])}", "experts"]


def table(run: RunRecord) -> list[tuple[str, str, list[str]]]:
    """For each merged model: its name, what it was made from, and every field of its provenance."""
    return [
        (made.name, ", ".join(made_from(made)), [f"{k}: {said(v)}" for k, v in flattened(made.provenance).items()])
        for made in run.made
    ]


def said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def checkpoints(run: RunRecord) -> list[tuple[str, str]]:
    """The base and every expert, and where the config says that it is."""
    model = run.config["model"]
    experts = [(task, for_task(model["experts"].get(task) or model["expert"], task)) for task in run.config["tasks"]]
    return [("base", model["base"]), *experts]
