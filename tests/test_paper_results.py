"""The paper's numbers as data: they add up, they count, and the task table agrees with them."""

from pathlib import Path

import pytest
import yaml

from common.evaluation.rows import row_name

ROOT = Path(__file__).resolve().parent.parent
PAPER = yaml.safe_load((ROOT / "configs/paper_results.yaml").read_text(encoding="utf-8"))
TASKS = yaml.safe_load((ROOT / "Vision/tasks.yaml").read_text(encoding="utf-8"))
VISION = {name: task for name, task in TASKS.items() if "hub" in task}  # the others are the toy's
VITS = ("ViT-B-16", "ViT-B-32", "ViT-L-14")
COUNTED = {name: task["test_size"] for name, task in VISION.items() if "test_size" in task} | {
    "SST-2": 872,
    "MNLI": 9815,
    "QNLI": 5463,
    "RTE": 277,
    "HumanEval": 164,
}
MERGED_FROM_OTHER_PAPERS = {"RegMean", "Fisher", "AdaMerging", "Representation Surgery", "ProDistill"}


def last_digit(table):
    return {"RoBERTa-base": 1e-4, "RoBERTa-large": 1e-4, "Llama-2-13B": 1e-3}.get(table, 1e-2)


ALL_ROWS = [(table, row) for table, data in PAPER.items() for row in data["rows"]]


@pytest.mark.parametrize(("table", "row"), ALL_ROWS)
def test_average_is_the_mean(table, row):
    """To one unit of the last digit: half from rounding the values, half from rounding the average.

    Rows listed as exceptions have one decimal fewer.
    """
    data = PAPER[table]
    *values, average = data["rows"][row]
    assert len(values) == len(data["tasks"])
    unit = last_digit(table) * (10 if row in data.get("exceptions", {}) else 1)
    assert sum(values) / len(values) == pytest.approx(average, abs=unit * (1 + 1e-6))


@pytest.mark.parametrize(("table", "row"), [(t, r) for t, r in ALL_ROWS if r not in PAPER[t].get("exceptions", {})])
def test_accuracies_are_counts(table, row):
    """An accuracy over N examples is k/N, rounded."""
    scale = 100 if PAPER[table]["unit"] == "percent" else 1
    for task, value in zip(PAPER[table]["tasks"], PAPER[table]["rows"][row], strict=False):
        if n := COUNTED.get(task):
            nearest = round(value / scale * n) / n * scale
            assert value == pytest.approx(nearest, abs=last_digit(table) * (0.5 + 1e-6)), task


@pytest.mark.parametrize("table", PAPER)
def test_exceptions_are_needed(table):
    """Without its exception each listed row would fail one of the two tests above."""
    for row in PAPER[table].get("exceptions", {}):
        *values, average = PAPER[table]["rows"][row]
        assert all(round(value, 1) == value for value in values)
        coarse = abs(sum(values) / len(values) - average) > last_digit(table)
        miscounted = [t for t, v in zip(PAPER[table]["tasks"], values, strict=True) if not fits(v / 100, COUNTED[t])]
        assert coarse or miscounted


def fits(fraction, n):
    return abs(round(fraction * n) / n - fraction) <= 0.5e-4


def test_corrections_are_where_the_print_is_wrong():
    """Printed values in place of the corrected ones: the mean misses the average, or a cell is no k/N."""
    found = [(table, c) for table, data in PAPER.items() for c in data.get("corrections", [])]
    assert [(table, c["row"]) for table, c in found] == [
        ("RoBERTa-large", "Individual"),
        ("RoBERTa-large", "TA"),
        ("ViT-B-16", "Pretrained"),
        ("ViT-B-32", "FDA (TSV, Gauss)"),
    ]
    for table, correction in found:
        columns = [*PAPER[table]["tasks"], "Avg"]
        corrected = dict(zip(columns, PAPER[table]["rows"][correction["row"]], strict=True))
        printed = corrected | correction["printed"]
        assert all(corrected[column] != value for column, value in correction["printed"].items())
        *values, average = printed.values()
        mean_misses = abs(sum(values) / len(values) - average) > 2 * last_digit(table)
        assert mean_misses or not all(fits(printed[task], COUNTED[task]) for task in ("SST-2", "QNLI", "RTE"))
        assert correction["reason"]


def test_roberta_larges_individual_row_was_printed_in_alphabetical_order():
    data = PAPER["RoBERTa-large"]
    ours = dict(zip(data["tasks"], data["rows"]["Individual"], strict=False))
    printed = ours | data["corrections"][0]["printed"]
    alphabetical = sorted(data["tasks"], key=lambda task: task.replace("-", "").lower())
    assert [printed[task] for task in data["tasks"]] == [ours[task] for task in alphabetical]


def test_headline_gains_of_the_page():
    """Δ of the FDA rows as the paper prints it, RoBERTa-large."""
    average = {row: values[-1] for row, values in PAPER["RoBERTa-large"]["rows"].items()}
    starts = ("Pretrained", "TA", "TSV", "WUDI")
    gains = [average[f"FDA ({s}, {i})"] - average[s] for s in starts for i in ("Gauss", "Weight")]
    expected = [0.2878, 0.3073, 0.1302, 0.1265, 0.0528, 0.0554, 0.0537, 0.0517]
    assert gains == pytest.approx(expected, abs=1e-9)


def test_row_names_are_those_of_the_report():
    ours = {row_name({"method": m}) for m in ("pretrained", "individual", "ta", "tsv", "wudi")} | {
        row_name({"method": "fda", "start": s, "init": i})
        for s in ("pretrained", "ta", "tsv", "wudi")
        for i in ("gauss", "weight")
    }
    assert {row for _, row in ALL_ROWS} == ours | MERGED_FROM_OTHER_PAPERS


def test_vision_tasks_are_the_columns_of_the_tables():
    for table in VITS:
        assert list(VISION) == PAPER[table]["tasks"]


def test_vision_classes_and_templates():
    counts = {name: (len(task["classes"]), len(task["templates"])) for name, task in VISION.items()}
    assert counts == {
        "SUN397": (397, 2),
        "Cars": (196, 8),
        "RESISC45": (45, 18),
        "EuroSAT": (10, 3),
        "SVHN": (10, 1),
        "GTSRB": (43, 3),
        "MNIST": (10, 1),
        "DTD": (47, 8),
    }
    for name, task in VISION.items():
        assert all(isinstance(c, str) for c in task["classes"]) and len(set(task["classes"])) == len(task["classes"]), (
            name
        )
        assert all(t.count("{c}") == 1 and t.format(c="x") for t in task["templates"]), name
    for name in ("SUN397", "RESISC45", "DTD"):  # labels follow the folder names
        assert VISION[name]["classes"] == sorted(VISION[name]["classes"])
    for name, misspelt in (("SUN397", "kindergarden classroom"), ("SUN397", "theater indoor procenium")):
        assert misspelt in VISION[name]["classes"]
    assert "horizonal" in VISION["GTSRB"]["classes"][17] and "bicyle" in VISION["GTSRB"]["classes"][29]
