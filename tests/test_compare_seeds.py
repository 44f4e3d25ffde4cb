"""The grid: seeds are runs of their own and means in one table, and what is equal is scored once."""

import json
import os
from collections import Counter
from statistics import fmean, stdev

import pytest

from common.core.errors import InputError
from common.evaluation.rows import row_name
from common.evaluation.scoring import score_run
from compare import compare, link_tree, plan
from helpers import change, files_of
from pico_grid import by_split, counting, rows_of
from Vision import domain

pytestmark = pytest.mark.usefixtures("no_figures")


def test_seeds_are_whole_runs_and_their_means_one_table(seeds, capsys):
    scored = Counter()
    compare(seeds, counting(scored))
    folder = seeds.run.dir
    one, two = (rows_of(folder / f"seed_{s}") for s in (0, 1))
    together = rows_of(folder)
    apart = [row | {"seed": seed} for seed, rows in enumerate((one, two)) for row in rows]
    assert sorted(map(json.dumps, together)) == sorted(json.dumps(dict(sorted(row.items()))) for row in apart)
    # What both seeds share is scored once, whatever drew at random twice.
    shared = {"Pretrained": 1, "Individual": 1, "TA": 1, "TA pretrained rest": 1}
    twice = {"DARE (TA)": 2, "DARE (TA) pretrained rest": 2, "FDA (TA, Weight)": 2, "FDA (DARE (TA), Weight)": 2}
    assert scored == {(task, name): n for task in seeds.tasks for name, n in (shared | twice).items()}
    made = json.loads((folder / "seed_1/merged/dare_ta/provenance.json").read_text())
    assert made["start"]["hyper"]["seed"] == 1
    # What draws nothing is made once, too, and takes no more room; its cost is that of the one time.
    notes = [json.loads((folder / f"seed_{s}/run.json").read_text()) for s in (0, 1)]
    assert [[m for m in ("merge ta", "merge dare_ta") if m in of] for of in notes] == [
        ["merge ta", "merge dare_ta"],
        ["merge dare_ta"],
    ]
    for made in ("ta", "ta-pretrained-rest"):
        weights = [next((folder / f"seed_{s}/merged/{made}").glob("*.safetensors")) for s in (0, 1)]
        assert weights[0].samefile(weights[1])
    costs = {row["seed"]: row["seconds"] for row in together if row_name(row) == "TA"}
    assert costs[0] == costs[1] == notes[0]["merge ta"]["seconds"]
    # The table: means, Δ of every seed against its own start, what it took.
    averages = {}
    for row in together:
        averages.setdefault(row_name(row), {}).setdefault(row["seed"], []).append(100 * row["value"])
    averages = {name: {s: fmean(v) for s, v in of.items()} for name, of in averages.items()}
    gains = [averages["FDA (DARE (TA), Weight)"][s] - averages["DARE (TA)"][s] for s in (0, 1)]
    table = (folder / "table.md").read_text()
    lines = {cells[1].strip(): [c.strip() for c in cells] for cells in (li.split("|") for li in table.splitlines()[:8])}
    assert lines["Method"][-5:] == ["Δ", "Δ (same rest)", "Time", "Memory", ""]
    assert lines["FDA (DARE (TA), Weight)"][5] == f"{fmean(gains):+.2f} ± {stdev(gains):.2f}"
    assert lines["TA"][4] == f"{averages['TA'][0]:.2f}" and "±" in lines["DARE (TA)"][4]
    assert lines["Pretrained"][-3:-1] == ["–", "–"] and lines["TA"][-2].endswith(" GiB")
    assert table.split("\n\n")[0] in capsys.readouterr().out and "Means over the seeds 0, 1." in table
    # Again: nothing is done, nothing changes.
    before = files_of(folder)
    compare(seeds, counting(scored))
    assert files_of(folder) == before and max(scored.values()) == 2


def test_files_that_cannot_be_linked_are_copied(tmp_path, monkeypatch):
    (tmp_path / "ta/heads").mkdir(parents=True)
    (tmp_path / "ta/weights").write_text("1")
    (tmp_path / "ta/heads/weights").symlink_to("../weights")
    monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError("not here")))
    link_tree(tmp_path / "ta", tmp_path / "merged/ta")
    assert files_of(tmp_path / "ta") == files_of(tmp_path / "merged/ta")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["merged", "ta"]
    assert (tmp_path / "merged/ta/heads/weights").is_symlink()
    assert not (tmp_path / "ta/weights").samefile(tmp_path / "merged/ta/weights")


def test_what_was_made_otherwise_is_refused_before_any_work(seeds):
    """In the last of the runs, as in the first."""
    seeds = change(change(seeds, "compare", starts=["ta"]), "run", score=False)
    of_last = change(seeds, "compare", seeds=[1])
    compare(of_last, counting(Counter()))
    before = files_of(seeds.run.dir)
    for section, values in (
        ("adapt", {"epochs": 3}),
        ("anchors", {"steps": 3}),
        ("start", {"hyper": {"ta": {"scale": 0.7}}}),
    ):
        with pytest.raises(InputError, match=r"seed_1/.* was made with .*; choose another run.name"):
            compare(change(seeds, section, **values), counting(Counter()))
        assert files_of(seeds.run.dir) == before


def test_a_grid_of_some_blocks_is_refused_before_any_work(pico_config):
    """A model of some blocks is none that can be scored; all of its anchors were made first."""
    some = change(pico_config, "run", blocks=[0])
    with pytest.raises(InputError, match="run.blocks leaves blocks to other machines"):
        compare(some, domain)
    assert plan(some, domain).refusals and not some.run.dir.exists()


def test_an_interrupted_grid_ends_with_the_rows_of_one_left_alone(seeds, monkeypatch):
    seeds = change(seeds, "compare", starts=["ta"])
    quick = counting(Counter(), by_split)
    compare(change(seeds, "run", name="alone"), quick)
    for where in ("common.pipeline.assemble", "compare.score_run"):
        with monkeypatch.context() as patch:
            patch.setattr(where, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                compare(seeds, quick)
    compare(seeds, quick)
    alone, stopped = (
        [
            {k: v for k, v in row.items() if k not in ("seconds", "cpu_seconds", "peak_gib", "config")}
            for row in rows_of(folder)
        ]
        for folder in (seeds.run.dir.parent / "alone", seeds.run.dir)
    )
    assert alone == stopped
    notes = json.loads((seeds.run.dir / "seed_0/run.json").read_text())
    assert {name: note["ended"] for name, note in notes.items()} == dict.fromkeys(notes, "finished")


def test_a_run_without_seeds_after_some_has_its_own_rows_alone(seeds):
    """Under one name: the means of the seeds go from the run's table once it has models of its own, not before."""
    grid = change(seeds, "compare", starts=["ta"])
    scored = Counter()
    domain_of_ours = counting(scored, by_split)
    compare(grid, domain_of_ours)
    of_seeds = rows_of(grid.run.dir)
    score_run(grid, domain_of_ours)  # as evaluate.py does; there is nothing merged in the folder itself
    assert rows_of(grid.run.dir) == of_seeds and {row["seed"] for row in of_seeds} == {0, 1}
    alone = change(change(grid, "compare", seeds=[]), "adapt", epochs=3)
    known = dict(scored)
    compare(alone, domain_of_ours)
    rows = rows_of(grid.run.dir)
    assert not any("seed" in row for row in rows)
    assert {row_name(row) for row in rows} == {row_name(row) for row in of_seeds}
    assert {row["epochs"] for row in rows if row["method"] == "fda"} == {3}
    new = scored - Counter(known)
    assert {name for _, name in new} == {"FDA (TA, Weight)"}, "of the others the scores are known"


def test_without_seeds_the_run_is_where_it_was(pico_config):
    compare(change(pico_config, "compare", starts=["ta"], inits=["gauss"]), counting(Counter(), by_split))
    names = {row_name(row) for row in rows_of(pico_config.run.dir)}
    assert names == {"Pretrained", "Individual", "TA", "TA pretrained rest", "FDA (TA, Gauss)"}
    assert all("seed" not in row for row in rows_of(pico_config.run.dir))
    assert not list(pico_config.run.dir.glob("seed_*"))
    costs = {row_name(row): row.get("seconds") for row in rows_of(pico_config.run.dir)}
    notes = json.loads((pico_config.run.dir / "run.json").read_text())
    fda = notes["construct gauss"]["seconds"] + notes["adapt fda-ta-gauss"]["seconds"]
    assert costs == {
        "Pretrained": None,
        "Individual": None,
        "TA": notes["merge ta"]["seconds"],
        "TA pretrained rest": None,
        "FDA (TA, Gauss)": pytest.approx(fda),
    }


def test_a_checkpoint_made_elsewhere_is_one_start_among_others(pico_config, pico_inputs):
    given = change(pico_config, "start", method="mine", checkpoint=str(pico_inputs / "clip" / "base"))
    given = change(given, "compare", starts=["mine", "ta"], inits=["weight"])
    compare(given, counting(Counter(), by_split))
    rows = {row_name(row): row for row in rows_of(given.run.dir)}
    assert {"MINE", "TA", "FDA (MINE, Weight)", "FDA (TA, Weight)"} <= rows.keys()
    assert "seconds" not in rows["MINE"] and "seconds" in rows["TA"]
    assert rows["MINE"]["checkpoint"] == rows["Pretrained"]["checkpoint"]
    assert rows["MINE"]["value"] == rows["Pretrained"]["value"] == pytest.approx(0.5)
