"""The report prints what results.json says: an exact small table, gains, figures that are figures."""

import json
import os
import runpy
import struct

import pytest

from common.config import ROOT
from common.core.errors import InputError
from common.evaluation.figures import plot_accuracy, plot_matching, write_report
from common.evaluation.rows import read_results, row_name, upsert, write_results
from common.evaluation.tables import by_start, footnotes, of_fewer_seeds, table

TASKS = ["Cars", "DTD"]
PUBLISHED = {
    "title": "ViT-B/32",
    "source": "paper table 5",
    "unit": "percent",
    "tasks": ["Cars", "DTD"],
    "rows": {"TA": [54.98, 50.37, 52.68], "FDA (TA, Weight)": [71.83, 69.10, 70.47]},
}


def scored(method, cars, dtd, start=None, init=None):
    common = {"method": method, "start": start, "init": init, "metric": "accuracy", "config": "c0ffee", "commit": "abc"}
    sizes = {"Cars": 8041, "DTD": 1880}
    return [common | {"task": t, "value": v, "n": sizes[t]} for t, v in zip(TASKS, (cars, dtd), strict=True) if v]


ROWS = [
    *scored("fda", 0.72, 0.7, "ta", "weight"),
    *scored("fda", 0.5, 0.4, "ta", "gauss"),
    *scored("ties", 0.1, 0.2),
    *scored("ta", 0.55, 0.51),
    *scored("individual", 0.78, None),
    *scored("pretrained", 0.6, 0.44),
]


def test_row_names():
    names = list(dict.fromkeys(map(row_name, ROWS)))
    assert names == ["FDA (TA, Weight)", "FDA (TA, Gauss)", "TIES", "TA", "Individual", "Pretrained"]
    assert row_name({"method": "fda", "start": "pretrained", "init": "gauss"}) == "FDA (Pretrained, Gauss)"


def test_in_short_a_line_is_a_start():
    lines = by_start(ROWS, TASKS).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    assert cells == [
        ["Start", "Avg", "Time", "FDA (Gauss)", "Δ", "Time", "FDA (Weight)", "Δ", "Time"],
        ["Pretrained", "52.00", "–", "–", "–", "–", "–", "–", "–"],
        ["TA", "53.00", "–", "45.00", "-8.00", "–", "71.00", "+18.00", "–"],
        ["TIES", "15.00", "–", "–", "–", "–", "–", "–", "–"],
    ]


def test_anchors_in_closed_form_are_no_fda():
    row = {"method": "fda", "start": "ta", "init": "weight", "label": "closed"}
    assert row_name(row | {"epochs": 0}) == "RegMean of anchors (TA, Weight) closed"
    assert row_name(row | {"epochs": 20}) == "FDA (TA, Weight) closed"


def test_the_data_that_merges_used_are_told():
    used = {"data": {"split": "train", "examples": {"Cars": 256, "DTD": 100}}}
    rows = [row | used for row in scored("regmean", 0.5, 0.5)] + ROWS
    assert "RegMean 100 of DTD (train), RegMean 256 of Cars (train)" in footnotes(rows, None)
    assert "Inputs of the tasks" not in footnotes(ROWS, None)


def test_rows_of_fewer_seeds_are_named_once_below_the_table(tmp_path):
    """Two seeds; TIES and FDA from Gauss were made with the first alone."""
    both = [r for r in ROWS if r["method"] != "ties" and r["init"] != "gauss"]
    rows = [row | {"seed": 0, "split": "test"} for row in ROWS] + [row | {"seed": 1, "split": "test"} for row in both]
    line = "Means over fewer seeds than 0, 1: TIES, FDA (TA, Gauss) (of 0)."
    assert of_fewer_seeds(rows) == line and of_fewer_seeds(rows, ["TA"]) == ""
    assert of_fewer_seeds(rows, ["TA", "TIES"]) == "Means over fewer seeds than 0, 1: TIES (of 0)."
    assert of_fewer_seeds(ROWS) == of_fewer_seeds([row | {"seed": 2} for row in ROWS]) == ""
    write_report(tmp_path, rows, TASKS, {})
    text = (tmp_path / "table.md").read_text()
    assert text.startswith(f"{table(rows, TASKS)}\n{line}\n\n") and text.count("fewer seeds") == 1
    write_results(tmp_path / "kept.json", rows, TASKS)
    file = f"Vision/{os.path.relpath(tmp_path / 'kept.json', ROOT / 'Vision')}"
    tools = runpy.run_path(str(ROOT / "scripts/make_tables.py"))
    assert tools["scores"](file).startswith(f"{table(rows, TASKS)}\n{line}\n\n")
    assert tools["scores"](file, "TIES").endswith("|\n\nMeans over fewer seeds than 0, 1: TIES (of 0).\n")
    assert "fewer" not in tools["scores"](file, "TA") and tools["gains"](file).endswith(f"\nkept: {line}\n")


def test_table_in_percent():
    assert table(ROWS, TASKS) == (
        "| Method           |  Cars |   DTD |   Avg |      Δ |\n"
        "| :--------------- | ----: | ----: | ----: | -----: |\n"
        "| Pretrained       | 60.00 | 44.00 | 52.00 |        |\n"
        "| Individual       | 78.00 |     – |     – |        |\n"
        "| TA               | 55.00 | 51.00 | 53.00 |        |\n"
        "| TIES             | 10.00 | 20.00 | 15.00 |        |\n"
        "| FDA (TA, Gauss)  | 50.00 | 40.00 | 45.00 |  -8.00 |\n"
        "| FDA (TA, Weight) | 72.00 | 70.00 | 71.00 | +18.00 |\n"
    )


def test_table_in_fractions_beside_the_paper():
    assert table(ROWS[:2] + ROWS[6:8], TASKS, percent=False, published=PUBLISHED) == (
        "| Method           |   Cars |    DTD |    Avg |       Δ |\n"
        "| :--------------- | -----: | -----: | -----: | ------: |\n"
        "| TA               | 0.5500 | 0.5100 | 0.5300 |         |\n"
        "| (paper)          | 0.5498 | 0.5037 | 0.5268 |         |\n"
        "| FDA (TA, Weight) | 0.7200 | 0.7000 | 0.7100 | +0.1800 |\n"
        "| (paper)          | 0.7183 | 0.6910 | 0.7047 | +0.1779 |\n"
    )


def test_no_gain_without_the_start_nor_published_mean_over_other_tasks():
    lines = table(ROWS[:2], ["Cars"], published=PUBLISHED).splitlines()
    assert lines[2:] == ["| FDA (TA, Weight) | 72.00 | 72.00 |   – |", "| (paper)          | 71.83 |     – |   – |"]


def test_gain_over_the_pretrained_model():
    rows = scored("pretrained", 0.6, 0.44) + scored("fda", 0.7, 0.5, "pretrained", "gauss")
    assert table(rows, TASKS).splitlines()[-1].endswith("| 60.00 | +8.00 |")


def of_seeds(method, averages, start=None, init=None, same=False):
    """The rows of each seed, the same checkpoint or one of each seed's own; the two tasks 0.1 around the average."""
    for seed, average in enumerate(averages):
        for row in scored(method, average - 0.1, average + 0.1, start, init):
            yield row | {"seed": seed, "checkpoint": row["task"] if same else f"{row['task']} {seed}"}


SEEDS = [
    *of_seeds("ta", [0.5, 0.5], same=True),
    *of_seeds("dare_ta", [0.4, 0.6]),
    *of_seeds("fda", [0.5, 0.7], "dare_ta", "weight"),
    *of_seeds("fda", [0.6, 0.8], "ta", "weight"),
]


def test_seeds_give_means_and_deviations_and_gains_are_taken_seed_by_seed():
    """DARE goes from 40 to 60 between the seeds: √2 · 10. FDA from it gains 10 with each, FDA from TA 10 and 30."""
    assert table(SEEDS, TASKS) == (
        "| Method                  |  Cars |   DTD |           Avg |              Δ |\n"
        "| :---------------------- | ----: | ----: | ------------: | -------------: |\n"
        "| TA                      | 40.00 | 60.00 |         50.00 |                |\n"
        "| DARE (TA)               | 40.00 | 60.00 | 50.00 ± 14.14 |                |\n"
        "| FDA (TA, Weight)        | 60.00 | 80.00 | 70.00 ± 14.14 | +20.00 ± 14.14 |\n"
        "| FDA (DARE (TA), Weight) | 50.00 | 70.00 | 60.00 ± 14.14 |  +10.00 ± 0.00 |\n"
    )


def test_one_seed_has_no_deviation_and_a_task_one_seed_lacks_has_no_mean():
    one = [row for row in SEEDS if row["seed"] == 0]
    assert "±" not in table(one, TASKS)
    assert table(SEEDS[:-1], TASKS).splitlines()[4] == (
        "| FDA (TA, Weight)        | 60.00 |     – |             – |             – |"
    )


def test_what_rows_took_is_printed_as_means_over_seeds(tmp_path):
    took = {"hardware": "CPU, 2 threads, Linux"}
    rows = [row | took | {"seconds": 100 * (1 + row["seed"]), "peak_gib": 1.25} for row in of_seeds("ta", [0.5, 0.5])]
    rows += [row | took | {"seconds": 3 * 3600.0, "peak_gib": 20} for row in of_seeds("fda", [0.5], "ta", "weight")]
    lines = table([*rows, *scored("pretrained", 0.6, 0.4)], TASKS, published=PUBLISHED).splitlines()
    assert [line.split("|")[-3:-1] for line in lines] == [
        ["    Time ", "    Memory "],
        [" ------: ", " --------: "],
        ["       – ", "         – "],
        [" 2.5 min ", "  1.25 GiB "],
        ["         ", "           "],
        ["   3.0 h ", " 20.00 GiB "],
        ["         ", "           "],
    ]
    write_report(tmp_path, rows, TASKS, {})
    assert "Measured on CPU, 2 threads, Linux." in (tmp_path / "table.md").read_text()


def test_upsert_replaces_the_same_cell_only():
    new = ROWS[0] | {"value": 0.9}
    rows = upsert(ROWS, new)
    assert len(rows) == len(ROWS) and new in rows and ROWS[0] not in rows
    for field in ({"init": "gauss", "start": "tsv"}, {"seed": 1}):
        assert len(upsert(ROWS, ROWS[0] | field)) == len(ROWS) + 1


def test_results_round_trip_and_do_not_depend_on_order(tmp_path):
    write_results(tmp_path / "a.json", ROWS, TASKS)
    write_results(tmp_path / "b.json", ROWS[::-1], TASKS)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    rows, tasks = read_results(tmp_path / "a.json")
    assert tasks == TASKS and len(rows) == len(ROWS) and all(row in rows for row in ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}'])
def test_damaged_results_are_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=r"results\.json is no results file"):
        read_results(tmp_path / "results.json")


def test_absent_results_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no results at .*results\.json"):
        read_results(tmp_path / "results.json")


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_matching_figure_grows_with_the_blocks(tmp_path):
    for blocks in (1, 12):
        traces = {(task, block): [1.0, 0.5, 0.3] for task in TASKS for block in range(blocks)}
        plot_matching(traces, tmp_path / f"{blocks}.png", init="weight")
    (w1, h1), (w12, h12) = png_size(tmp_path / "1.png"), png_size(tmp_path / "12.png")
    assert 300 < w1 < w12 < 1500 and 200 < h1 < h12 < 1000


@pytest.mark.parametrize("rows", [ROWS, scored("pretrained", 0.6, 0.44), scored("fda", 0.6, None, "wudi", "gauss")])
def test_accuracy_figure(tmp_path, rows):
    plot_accuracy(rows, TASKS, tmp_path / "accuracy.png")
    width, height = png_size(tmp_path / "accuracy.png")
    assert 400 < width < 1500 and 150 < height < 1000


def test_report_writes_what_there_is(tmp_path):
    traces = {"gauss": {("Cars", 0): [1.0, 0.4]}}
    paths = write_report(tmp_path, ROWS, TASKS, traces, published=PUBLISHED)
    assert [path.name for path in paths] == ["table.md", "accuracy.png", "matching_gauss.png"]
    assert all(path.is_file() for path in paths)
    text = paths[0].read_text(encoding="utf-8")
    assert text.startswith(table(ROWS, TASKS, published=PUBLISHED))
    for fact in ("accuracy on 8041 of Cars", "accuracy on 1880 of DTD", "c0ffee", "abc", "paper table 5"):
        assert fact in text
    assert write_report(tmp_path, [], TASKS, {}) == []


def test_results_file_is_plain_json(tmp_path):
    write_results(tmp_path / "results.json", ROWS, TASKS)
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"tasks", "rows"}
