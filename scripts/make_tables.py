"""Write the tables of the pages between their markers, from the files that they are made of.

python scripts/make_tables.py                                            rewrite every page that git tracks
python scripts/make_tables.py --keep runs/demo Vision/results/demo.json  commit the rows of a run, without their times

A table stands between `<!-- table: KIND WORDS -->` and `<!-- end of table -->`; WORDS, separated by " | ", are paths
from the repository's root and names of rows:

    scores FILE            the paper's table of the rows in FILE, and what they were measured on
    scores FILE | ROW ...  those rows of it alone
    gains FILE | FILE ...  a line for each start: its mean, and what FDA with each initialisation makes of it
    study FILE             the table of scripts/study.py; FILE is the rows.json of a study, named as its kind
    residual FILE          what scripts/analyse.py residual measured of each merge; FILE is its residual.json
    merges FILE | FILE ... scripts/benchmark.py merge's recipes, by both; a FILE is what its --out wrote
    methods                the merge methods
    architectures DOMAIN   what is anchored of each architecture that the tests merge, found in a pico model of it
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmark_merge import RECIPES
from common.config import ROOT, Model
from common.core.errors import InputError
from common.domain import FOLDERS
from common.evaluation.rows import Row, display, read_results, row_name, values_by_name, write_results
from common.evaluation.scoring import RESULTS
from common.evaluation.significance import Scores, difference, findings, scores_of
from common.evaluation.studies import FIGURES, table_of
from common.evaluation.tables import MISSING, aligned, cell, footnotes, of_fewer_seeds, table
from common.io.checkpoints import write_text
from common.merging.registry import method_table

TABLE = re.compile(r"(?<=<!-- table: )(?P<what>.+?)(?P<end> -->\n).*?(?=<!-- end of table -->)", re.DOTALL)
# of one machine on one day: pages and their rows leave them out
COST = {"seconds", "cpu_seconds", "peak_gib", "hardware"}
INITS = ("gauss", "weight")
MODELS = {"minilm": "MiniLM", "smollm": "SmolLM2"}  # by file; those of a toy go by its domain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs=2, type=Path, metavar=("RUN", "FILE"), help="write the rows of RUN to FILE")
    args = parser.parse_args()
    try:
        if args.keep:
            keep_rows(*args.keep)
        for study in sorted(ROOT.glob("*/results/studies/*.json")):
            if study.stem in FIGURES:
                percent = import_module(f"{study.relative_to(ROOT).parts[0]}.domain").PERCENT
                FIGURES[study.stem](json.loads(study.read_text("utf-8")), study.with_suffix(".png"), percent)
        for page in pages():
            write_text(page, with_tables(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def pages() -> list[Path]:
    """The Markdown files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return sorted({ROOT / name for name in names if (ROOT / name).is_file()})


def with_tables(text: str, page: str) -> str:
    """The text of a page with every table made anew. InputError, naming the page, if a marker cannot be read."""
    if len(TABLE.findall(text)) != text.count("<!-- table:") or text.count("<!-- table:") != text.count("<!-- end of"):
        raise InputError(f"{page}: a table needs the lines <!-- table: KIND WORDS --> and <!-- end of table -->")

    def made(match: re.Match) -> str:
        kind, _, words = match["what"].partition(" ")
        if kind not in KINDS:
            raise InputError(f"{page}: there is no table of kind {kind!r}; choose one of {', '.join(KINDS)}")
        return match["what"] + match["end"] + "\n" + KINDS[kind](*filter(None, words.split(" | "))) + "\n"

    return TABLE.sub(made, text)


def keep_rows(run: Path, file: Path) -> None:
    """Write what results.json of a run holds, but for time and memory."""
    rows, tasks = read_results(run / RESULTS)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_results(file, [{k: v for k, v in row.items() if k not in COST} for row in rows], tasks)


def scores(file: str, *names: str) -> str:
    """The table of the rows in a file and its footnotes, or of its lines those of some names."""
    rows, tasks, percent = kept_rows(file)
    lines = table(rows, tasks, percent=percent).splitlines(keepends=True)
    fewer = f"\n{line}\n" if (line := of_fewer_seeds(rows, names or None)) else ""
    if not names:
        said = "".join(f"- {finding}\n" for finding in findings(rows, tasks, percent=percent))
        return "".join(lines) + fewer + "\n" + said + "\n" * bool(said) + footnotes(rows, None, bool(said))
    of_name = {line.split("|")[1].strip(): line for line in lines[2:]}
    if unknown := [name for name in names if name not in of_name]:
        raise InputError(f"{file} has no row {', '.join(unknown)}; choose from {', '.join(of_name)}")
    return "".join([*lines[:2], *(of_name[name] for name in names), fewer])


def kept_rows(file: str) -> tuple[list[Row], list[str], bool]:
    """(rows, tasks, whether they are printed in percent) of DOMAIN/results/NAME.json."""
    rows, tasks = read_results(ROOT / file)
    return rows, tasks, import_module(f"{Path(file).parts[0]}.domain").PERCENT


def gains(*files: str) -> str:
    """A line for each model that adaptation started from: its mean over the tasks in percent, and mean and Δ of FDA."""
    read = {file: kept_rows(file) for file in files}
    used = {row["init"] for rows, _, _ in read.values() for row in rows}
    inits = [init for init in INITS if init in used]
    heads = [head for init in inits for head in (f"FDA ({display(init)})", "Δ")]
    lines: list[Sequence[str]] = [["Model", "Start", "Avg", *heads]]
    for file, (rows, tasks, _) in read.items():
        average = {name: values[-1] for name, values in values_by_name(rows, tasks).items()}
        drawn = scores_of(rows, tasks)
        for start in dict.fromkeys(row["start"] for row in rows if row["method"] == "fda"):
            cells = [text for init in inits for text in gain_cells(average, drawn, start, init)]
            model = MODELS.get(Path(file).stem, Path(file).parts[0])
            lines.append([model, display(start), cell(average[display(start)], percent=True), *cells])
    found = {Path(file).stem: of_fewer_seeds(rows) for file, (rows, _, _) in read.items()}
    return aligned(lines) + "".join(f"\n{name}: {said}\n" for name, said in found.items() if said)


def gain_cells(average: Mapping[str, float], drawn: Mapping[str, Scores], start: str, init: str) -> tuple[str, str]:
    """The mean of what FDA made of a start, and how far it is above the start's, in percent, in brackets if that is
    within the error; the error is known where the rows have answers."""
    name = row_name({"method": "fda", "start": start, "init": init})
    if name not in average:
        return MISSING, MISSING
    gain = cell(average[name] - average[display(start)], percent=True, sign="+")
    found = difference(drawn[name], drawn[display(start)]) if {name, display(start)} <= drawn.keys() else None
    within = found is not None and found.low <= 0 <= found.high
    return cell(average[name], percent=True), f"({gain})" if within else gain


def merges(*files: str) -> str:
    """A line for each recipe that scripts/benchmark.py merge timed, medians, and what they were measured with."""
    head = ["Recipe", "Seconds", "of mergekit", "Ratio", "Peak GiB", "of mergekit", "Ratio", "Commit"]
    lines: list[Sequence[str]] = [head]
    said = set()
    for file in files:
        measured = json.loads((ROOT / file).read_text(encoding="utf-8"))
        result, repeats = measured["result"], measured["command"]["repeats"]
        said.add(f"medians of {repeats} by the clock; threads: {measured['threads']}; {result['mergekit']}")
        for recipe, both in ((name, both) for name, both in result.items() if name in RECIPES):
            own, other, ratio = both["ours"], both["mergekit"], both["ours_in_parts_of_mergekit"]
            of_time = (f"{own['seconds']:.1f}", f"{other['seconds']:.1f}", f"{ratio['seconds']:.2f}")
            of_peak = (f"{own['peak_gib']:.1f}", f"{other['peak_gib']:.1f}", f"{ratio['peak_gib']:.2f}")
            lines.append([f"`{recipe}`", *of_time, *of_peak, measured["commit"]])
    return aligned(lines) + f"\nSeconds and GiB: {'; '.join(sorted(said))}.\n"


def methods() -> str:
    """The merge methods, a line each."""
    head, *rows = [tuple(row) for row in method_table()]
    return "\n".join([line(head), line([":---"] * len(head)), *map(line, rows)]) + "\n"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def studied(file: str) -> str:
    """The table of a study, from its rows."""
    rows = json.loads((ROOT / file).read_text(encoding="utf-8"))
    return table_of(Path(file).stem, rows, import_module(f"{Path(file).parts[0]}.domain").PERCENT)


def residuals(file: str) -> str:
    """What each merge leaves of the interference, the least first, and what that has to do with the score."""
    found = json.loads((ROOT / file).read_text(encoding="utf-8"))
    percent = import_module(f"{Path(file).parts[0]}.domain").PERCENT
    lines: list[Sequence[str]] = [["Merge", "Residual", "Length", "Avg"]]
    for name, model in sorted(found["models"].items(), key=lambda named: named[1]["mean"]):
        lines.append([name, f"{model['mean']:.2f}", f"{model['length']:.2f}", cell(model["avg"], percent)])
    said = f"Residual: mean over the tasks and {found['matrices']} matrices. Length: in mean lengths of a task vector."
    ranks = f"Rank correlation of residual and Avg over these {len(lines) - 1} models: {found['rank_correlation']:.2f}."
    birth = f"Config {found['config']}; commit {found['commit']}; seed {found['seed']}."
    return aligned(lines) + f"\n{said}\n\n{ranks}\n\n{birth}\n"


def architectures(domain: str) -> str:
    """A line for each name that anchored modules have, and the architectures that have it."""
    sys.path.append(str(ROOT / "tests"))
    from transformers import logging

    logging.set_verbosity_error()  # of pico configs it warns that their numbers are odd
    module, listed = PICO[domain]
    of, pico = import_module(f"{FOLDERS[domain]}.domain"), import_module(module)
    found: dict[str, list[str]] = {}
    for kind in getattr(pico, listed):
        with TemporaryDirectory() as place:
            if domain == "vision":  # where there are two libraries
                pico.write_config(Path(place), kind)
            else:
                write_text(Path(place) / "config.json", json.dumps(pico.fields_of(kind)))
            model = Model(base=place)
            prefixes = [prefix for prefix, _ in of.family(model).modules(of.skeleton(model))]
        named = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".N", prefix).removesuffix(".") for prefix in prefixes)
        found.setdefault(", ".join(f"`{name}`" for name in named), []).append(f"`{kind}`")
    lines = [(named, ", ".join(kinds)) for named, kinds in found.items()]
    head = ("Anchored", "Architectures (`model_type`)")
    lined = "\n".join([line(head), line([":---"] * len(head)), *map(line, lines)]) + "\n"
    if domain != "nlg":
        return lined
    return lined + whole_layers(pico.MIXTURES, [kind for kind in pico.LAYERS if kind not in pico.DECODERS])


def whole_layers(mixtures: Sequence[str], alone: Sequence[str]) -> str:
    """A sentence on the architectures of which anchors.part layer anchors the layers."""
    without, besides = (", ".join(f"`{kind}`" for kind in kinds) for kinds in (mixtures, alone))
    return f"\nWhole layers (`anchors.part: layer`): of all but the mixtures {without}; and of {besides} besides.\n"


PICO = {  # of tests/: what architectures are tested
    "nlg": ("pico_decoders", "DECODERS"),
    "nlu": ("pico_encoders", "ARCHITECTURES"),
    "vision": ("pico_vision_architectures", "ARCHITECTURES"),
}
KINDS = {
    "scores": scores, "gains": gains, "study": studied, "residual": residuals, "merges": merges,
    "methods": methods, "architectures": architectures,
}  # fmt: skip

if __name__ == "__main__":
    main()
