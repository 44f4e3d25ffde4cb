"""What a run's page is made of, and when it is written: task vectors, tables to be copied, a run that goes on."""

import csv
import io
import json
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import common.report.live as live
from common.core import notices
from common.core.errors import InputError
from common.evaluation.scoring import score_run
from common.io.checkpoints import Checkpoint
from common.opening import open_experiment
from common.pipeline import adapt, construct, merge_alone
from common.report.curves import thinned
from common.report.latex import latex_of
from common.report.lines import Cell, Line
from common.report.page import write_page
from common.report.reading import read_run
from common.report.results import csv_of, order_of, results_of
from common.report.vectors import cosines, measure, relative
from helpers import change, command
from pico_run import run_reported
from Vision import domain


def test_task_vectors_are_measured_once_and_are_what_the_weights_say(pico_config, monkeypatch):
    assert measure(open_experiment(pico_config, domain), False) == ""
    file = pico_config.run.dir / "task_vectors.json"
    found = json.loads(file.read_text())
    base, *experts = (
        Checkpoint(pico_config.model.path(*which))
        for which in (("base",), *(("expert", task) for task in pico_config.tasks))
    )
    for block, prefix in enumerate(found["blocks"]):
        theta_0, *thetas = (
            torch.cat([p.flatten() for p in model.read(base.names(prefix)).values()]).double()
            for model in (base, *experts)
        )
        sizes = [float((theta - theta_0).norm() / theta_0.norm()) for theta in thetas]
        assert [relative(found)[task][block] for task in pico_config.tasks] == pytest.approx(sizes, rel=1e-5)
    taus = [
        torch.cat(
            [(e.read([n])[n] - base.read([n])[n]).flatten() for p in found["blocks"] for n in base.names(p)]
        ).double()
        for e in experts
    ]
    cosine = float(torch.nn.functional.cosine_similarity(*taus, dim=0))
    assert [row for row in cosines(found)] == [pytest.approx([1, cosine]), pytest.approx([cosine, 1])]
    monkeypatch.setattr("common.report.vectors.measured", None)  # a second time would fail
    assert measure(open_experiment(pico_config, domain), False) == ""


def test_an_expert_that_is_the_base_in_other_files_is_said(pico_config, tmp_path, capsys, monkeypatch):
    """An adapter that was never trained, say: no byte of it is the base's."""
    monkeypatch.setattr(notices, "_said", set())
    base = load_file(pico_config.model.path("base") / "open_clip_model.safetensors")
    save_file(base, tmp_path / "same.safetensors", {"format": "pt", "note": "saved anew"})
    config = change(pico_config, "model", experts={"MNIST": str(tmp_path / "same.safetensors")})
    measure(open_experiment(config, domain), False)
    assert "the expert of MNIST equals the base in every block" in capsys.readouterr().err


def test_a_task_vector_of_zeros_has_no_angle():
    assert cosines({"gram": [[[4.0, 0.0], [0.0, 0.0]]]}) == [[1, 0], [0, 0]]


def test_huge_models_are_measured_on_request_alone(pico_config, monkeypatch):
    monkeypatch.setattr("common.report.vectors.MOST", 10)
    experiment = open_experiment(pico_config, domain)
    assert "billion weights would be read; --run.report full does it" in measure(experiment, False)
    assert not (pico_config.run.dir / "task_vectors.json").exists()
    assert measure(experiment, True) == "" and (pico_config.run.dir / "task_vectors.json").is_file()


def test_the_losses_of_an_adaptation_outlive_its_blocks(pico_config):
    quiet = change(pico_config, "run", score=False)
    construct(quiet, domain)
    folder = adapt(quiet, domain)
    traces = json.loads((folder / "adaptation.json").read_text())["traces"]
    assert list(traces) == ["0", "1"] and not (folder / "blocks").exists()
    assert all(len(trace) == pico_config.adapt.epochs and min(trace) > 0 for trace in traces.values())


def test_a_curve_keeps_its_ends():
    assert thinned([]) == ([], []) and thinned([0.5]) == ([0], [0.5])
    steps, values = thinned([float(i) for i in range(1201)])
    assert (steps[0], steps[-1], values[-1]) == (0, 1200, 1200) and len(steps) <= 81
    assert {b - a for a, b in pairwise(steps)} == {15}


@pytest.mark.parametrize(
    ("text", "order"),
    [("56.33 ± 0.21", 56.33), ("-1.27", -1.27), ("1.5 min", 90), ("2.0 h", 7200), ("9.0 s", 9), ("–", ""), ("", "")],
)
def test_a_cell_is_sorted_by_its_number(text, order):
    assert order_of(text) == order


def test_latex_is_the_papers_table():
    """Three groups, each start with its FDA rows below; from rows to text, written here by hand."""
    values = {
        ("pretrained", None): (0.5, 0.25),
        ("individual", None): (0.9, 1.0),
        ("regmean", None): (0.6, 0.5),
        ("fisher", None): (0.4, 0.5),
        ("ta", None): (0.5, 0.5),
        ("tsv", None): (0.75, 0.5),
        ("fda", "pretrained"): (0.7, 0.5),
        ("fda", "regmean"): (0.65, 0.5),
        ("fda", "ta"): (0.45, 0.5),
    }
    rows = [
        {"method": method, "start": start, "init": start and init, "label": "", "task": task, "split": "test"}
        | {"metric": "accuracy", "n": 4, "value": value, "config": "c", "commit": "d", "seconds": 1.0, "peak_gib": 1.0}
        | {"cpu_seconds": 1.0, "hardware": "CPU"}
        for (method, start), both in values.items()
        for init in (("gauss", "weight") if start == "ta" else ("weight",))
        for task, value in zip(("DTD_1", "R&C"), both, strict=True)
    ]
    published = {"title": "t", "source": "s", "unit": "percent", "tasks": ["DTD_1", "R&C"]}
    published |= {"rows": {"TSV": [74.0, 51.0, 62.5]}}
    run = SimpleNamespace(name="r", rows=rows, tasks=["DTD_1", "R&C"], percent=True, published=published)
    assert (
        results_of(run).latex
        == r"""% \usepackage{booktabs}
\begin{tabular}{lcccc}
\toprule
Method & DTD\_1 & R\&C & Avg & $\Delta$ \\
\midrule
Pretrained & 50.00 & 25.00 & 37.50 &  \\
Individual & 90.00 & 100.00 & 95.00 &  \\
\midrule
Fisher & 40.00 & 50.00 & 45.00 &  \\
\addlinespace
RegMean & 60.00 & 50.00 & 55.00 &  \\
FDA (RegMean, Weight) & 65.00 & 50.00 & 57.50 & +2.50 \\
\midrule
FDA (Pretrained, Weight) & 70.00 & 50.00 & 60.00 & +22.50 \\
\addlinespace
TA & 50.00 & 50.00 & 50.00 &  \\
FDA (TA, Gauss) & 45.00 & 50.00 & 47.50 & $-$2.50 \\
FDA (TA, Weight) & 45.00 & 50.00 & 47.50 & $-$2.50 \\
\addlinespace
TSV & 75.00 & 50.00 & 62.50 &  \\
TSV (paper) & 74.00 & 51.00 & 62.50 &  \\
\bottomrule
\end{tabular}
"""
    )


def test_a_seed_that_is_scored_in_part_has_no_mean_yet():
    """While a comparison scores its second seed, the page goes on; what is whole keeps its numbers."""
    kept = {"method": "tsv", "n": 5, "start": None, "init": None, "checkpoint": "a"}
    rows = [kept | {"task": task, "seed": seed, "value": 0.5} for task in ("A", "B") for seed in (0, 1)]
    fda = {"method": "fda", "start": "tsv", "init": "weight", "n": 5}
    done = [("A", 0), ("B", 0), ("A", 1)]
    rows += [fda | {"task": t, "seed": s, "value": 0.5 + 0.1 * s, "checkpoint": str(s)} for t, s in done]
    text = csv_of(SimpleNamespace(name="x", percent=True), rows, ["A", "B"], {})
    tsv, partly = csv.DictReader(io.StringIO(text))
    assert tsv["avg"] == "50" and tsv["avg_sd"] == ""
    assert (partly["A"], partly["B"], partly["avg"], partly["avg_sd"], partly["delta_sd"]) == ("55", "", "", "", "")


def test_latex_of_several_runs_has_their_names_and_no_costs():
    def line(run, name, group, *texts):
        return Line(run, name, "model", group, [Cell(text, "") for text in texts])

    lines = [
        line("a", "Pretrained", "end", "60.00", "", "", "–"),
        line("a", "FDA (Pretrained, Weight)", "fda", "54.00 ± 0.10", "-1.00", "-2 to 1", "9 s"),
        line("b_1", "Pretrained", "end", "60.00", "", "", "–"),
        line("b_1", "Average", "merge", "–", "", "", "1 s"),
        line("b_1", "TIES", "merge", "1.00", "", "", "1 s"),
    ]
    assert (
        latex_of(["DTD", "Δ", "95 % of Δ", "Time"], lines, run=True)
        == r"""% \usepackage{booktabs}
\begin{tabular}{llcc}
\toprule
Run & Method & DTD & $\Delta$ \\
\midrule
a & Pretrained & 60.00 &  \\
\midrule
a & FDA (Pretrained, Weight) & 54.00 $\pm$ 0.10 & $-$1.00 \\
\midrule
b\_1 & Pretrained & 60.00 &  \\
\midrule
b\_1 & Average & -- &  \\
b\_1 & TIES & 1.00 &  \\
\bottomrule
\end{tabular}
"""
    )


# ---- while a run goes on ---------------------------------------------------------------------------------------------


def test_after_each_unit_there_is_a_page_that_looks_for_the_next(pico_config, monkeypatch):
    monkeypatch.setattr(live, "EVERY", 0)
    monkeypatch.setattr(live, "SHARE", 0)
    seen, write = [], live.write_page

    def watching(file, runs, state, refresh):
        write(file, runs, state, refresh)
        text = file.read_text()
        seen.append((state.kind, 'http-equiv="refresh"' in text, len(runs[0].matching.get("weight", ()))))

    monkeypatch.setattr(live, "write_page", watching)
    run_reported(change(pico_config, "run", score=False), construct)
    *going, last = seen
    assert [kind for kind, *_ in going] == ["going"] * 5 and all(refreshed for _, refreshed, _ in going)
    assert [count for *_, count in going][-1] == 4  # all units, when the stage has ended
    assert last == ("finished", False, 4)
    assert (pico_config.run.dir / "task_vectors.json").is_file()


def test_pages_take_a_small_share_of_the_time(pico_config, monkeypatch):
    """A clock of ours: a page takes 0.2 s, a unit 1 s."""
    now, written = [0.0], []
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    page = live.LivePage(pico_config, domain, live.Stages())
    page.measured = True

    def write(state, refresh=0):
        written.append(now[0])
        now[0] += 0.2

    monkeypatch.setattr(page, "write", write)
    for _ in range(100):
        now[0] += 1
        page.update()
    assert len(written) == 5 and min(b - a for a, b in pairwise(written)) > 20


@pytest.mark.parametrize("error", [RuntimeError("no room"), InputError("cannot write")])
def test_a_page_that_fails_is_said_and_spoils_nothing(pico_config, monkeypatch, capsys, error):
    def failing(*_):
        raise error

    monkeypatch.setattr(live, "write_page", failing)
    quiet = change(pico_config, "run", score=False, name=type(error).__name__)
    run_reported(change(quiet, "start", method="ta"), merge_alone)
    said = capsys.readouterr().err
    assert said.count(f"report.html could not be written: {error}; the results are not touched by that") == 1
    assert (quiet.run.dir / "merged/ta/provenance.json").is_file() and not (quiet.run.dir / "report.html").exists()


def test_without_what_draws_it_a_run_goes_on_and_says_how_to_get_it(pico_config, monkeypatch, capsys):
    monkeypatch.setattr("common.report.page.find_spec", lambda module: None if module == "vl_convert" else module)
    quiet = change(change(pico_config, "run", score=False), "start", method="ta")
    run_reported(quiet, merge_alone)
    assert "no report.html is written: pip install vl-convert-python (the extra `report`)" in capsys.readouterr().err
    assert (quiet.run.dir / "merged/ta/provenance.json").is_file() and not (quiet.run.dir / "report.html").exists()
    with pytest.raises(InputError, match="pip install vl-convert-python"):
        write_page(quiet.run.dir / "report.html", [read_run(quiet.run.dir)])


def test_an_interrupted_run_says_so_a_refused_one_leaves_nothing(pico_config, monkeypatch):
    quiet = change(pico_config, "run", score=False)
    with pytest.raises(InputError, match="there are no anchors"):
        run_reported(quiet, adapt)
    assert not quiet.run.dir.exists()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    construct(quiet, domain)
    monkeypatch.setattr("common.pipeline.fit_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_reported(quiet, adapt)
    text = (quiet.run.dir / "report.html").read_text()
    assert "Not finished: interrupted in adapt fda-pretrained-weight, 0 of 2 units." in text
    assert 'http-equiv="refresh"' not in text


def test_no_page_where_none_is_wanted(pico_config):
    run_reported(change(change(pico_config, "run", score=False, report="no"), "start", method="ta"), merge_alone)
    assert not list(pico_config.run.dir.rglob("report.html"))


def test_a_page_is_made_from_what_folders_hold(seeds, no_figures, tmp_path):
    from compare import compare

    compare(seeds, domain)
    folder = seeds.run.dir
    done = command("scripts/compare.py", "--runs", folder)
    assert done.returncode == 0 and done.stdout.strip() == str(folder / "report.html")
    text = (folder / "report.html").read_text()
    assert "Of seed 0, the first." in text and "seed 1: adapt fda-ta-weight" in text and re.search(r"\d ± \d", text)
    refused = command("scripts/compare.py", "--runs", folder, tmp_path / "none", "--out", tmp_path / "both.html")
    assert refused.returncode == 2 and "is the folder of no run: there is no run.json in it" in refused.stderr
    assert not (tmp_path / "both.html").exists()


def test_what_was_scored_is_shown_though_a_search_on_the_cut_came_after(pico_config):
    """Only an interrupted search is the last of a run; its trials are no stage that scores the tests."""
    score_run(pico_config, domain)
    folder = pico_config.run.dir
    notes = json.loads((folder / "run.json").read_text())
    trial = json.loads(json.dumps(notes["score"])) | {"time": "2999-01-01T00:00:00+00:00"}
    trial["config"]["eval"]["split"] = "validation_cut"
    (folder / "run.json").write_text(json.dumps(notes | {"adapt fda-ta-weight-search-0": trial}))
    found = read_run(folder)
    assert found.config["eval"]["split"] == "test" and {row["split"] for row in found.rows} == {"test"}
    for row in (rows := json.loads((folder / "results.json").read_text()))["rows"]:
        row["split"] = "validation_cut"
    (folder / "results.json").write_text(json.dumps(rows))
    assert read_run(folder).config["eval"]["split"] == "validation_cut"
    (folder / "results.json").unlink()
    assert read_run(folder).rows == []
