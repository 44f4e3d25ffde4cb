"""The grid: seeds are runs of their own and means in one table, what is equal is scored once, a search sees no test."""

import json
from collections import Counter
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
from compare import compare, plan
from helpers import change, files_of
from pico_nlg import pico_config as pico_nlg_config

from common.config import Config
from common.core.errors import InputError
from common.evaluation.tables import row_name
from common.io.checkpoints import Checkpoint
from NLG import domain as nlg
from Vision import domain

SCALES = {"ta": {"scale": [0.1, 0.2, 0.5]}}


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def counting(scored: Counter, score=domain.score):
    """Vision with a `score` that counts what it is asked for."""

    def counted(config, task, checkpoints, device):
        scored.update((task, name) for name in checkpoints)
        return score(config, task, checkpoints, device)

    return SimpleNamespace(**vars(domain) | {"score": counted})


def by_split(config, task, checkpoints, device):
    """A score with its peak at scale 0.2 on held-out examples and at 0.5 on the test set."""
    name = "visual.conv1.weight"
    base = Checkpoint(config.model.path("base")).read([name])[name]
    delta = sum(Checkpoint(config.model.path("expert", t)).read([name])[name] - base for t in config.tasks)
    peak = {"validation_cut": 0.2, "test": 0.5}[config.eval.split]
    moved = {n: Checkpoint(path).read([name])[name] - base for n, path in checkpoints.items()}
    return {n: (1 - abs((m.norm() / delta.norm()).item() - peak), 7) for n, m in moved.items()}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Figures take most of the time; other tests look at them."""
    for name in ("plot_accuracy", "plot_matching"):
        monkeypatch.setattr(f"common.evaluation.figures.{name}", lambda *_, **__: None)


@pytest.fixture
def seeds(pico_config) -> Config:
    return change(pico_config, "compare", starts=["ta", "dare_ta"], inits=["weight"], seeds=[0, 1])


def test_seeds_are_whole_runs_and_their_means_one_table(seeds, capsys):
    scored = Counter()
    compare(seeds, counting(scored))
    folder = seeds.run.dir
    one, two = (rows_of(folder / f"seed_{s}") for s in (0, 1))
    together = rows_of(folder)
    apart = [row | {"seed": seed} for seed, rows in enumerate((one, two)) for row in rows]
    assert sorted(map(json.dumps, together)) == sorted(json.dumps(dict(sorted(row.items()))) for row in apart)
    # What both seeds share is scored once, whatever drew at random twice.
    shared = {"Pretrained": 1, "Individual": 1, "TA": 1}
    twice = {"DARE (TA)": 2, "FDA (TA, Weight)": 2, "FDA (DARE (TA), Weight)": 2}
    assert scored == {(task, name): n for task in seeds.tasks for name, n in (shared | twice).items()}
    made = json.loads((folder / "seed_1/merged/dare_ta/provenance.json").read_text())
    assert made["start"]["hyper"]["seed"] == 1
    # The table: means, Δ of every seed against its own start, what it took.
    averages = {}
    for row in together:
        averages.setdefault(row_name(row), {}).setdefault(row["seed"], []).append(100 * row["value"])
    averages = {name: {s: fmean(v) for s, v in of.items()} for name, of in averages.items()}
    gains = [averages["FDA (DARE (TA), Weight)"][s] - averages["DARE (TA)"][s] for s in (0, 1)]
    table = (folder / "table.md").read_text()
    lines = {cells[1].strip(): [c.strip() for c in cells] for cells in (li.split("|") for li in table.splitlines()[:8])}
    assert lines["Method"][-4:] == ["Δ", "Time", "Memory", ""]
    assert lines["FDA (DARE (TA), Weight)"][5] == f"{fmean(gains):+.2f} ± {stdev(gains):.2f}"
    assert lines["TA"][4] == f"{averages['TA'][0]:.2f}" and "±" in lines["DARE (TA)"][4]
    assert lines["Pretrained"][-3:-1] == ["–", "–"] and lines["TA"][-2].endswith(" GiB")
    assert table.split("\n\n")[0] in capsys.readouterr().out and "Means over the seeds 0, 1." in table
    # Again: nothing is done, nothing changes.
    before = files_of(folder)
    compare(seeds, counting(scored))
    assert files_of(folder) == before and max(scored.values()) == 2


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
        [{k: v for k, v in row.items() if k not in ("seconds", "peak_gib", "config")} for row in rows_of(folder)]
        for folder in (seeds.run.dir.parent / "alone", seeds.run.dir)
    )
    assert alone == stopped
    notes = json.loads((seeds.run.dir / "seed_0/run.json").read_text())
    assert {name: note["ended"] for name, note in notes.items()} == dict.fromkeys(notes, "finished")


def test_without_seeds_the_run_is_where_it_was(pico_config):
    compare(change(pico_config, "compare", starts=["ta"], inits=["gauss"]), counting(Counter(), by_split))
    names = {row_name(row) for row in rows_of(pico_config.run.dir)}
    assert names == {"Pretrained", "Individual", "TA", "FDA (TA, Gauss)"}
    assert all("seed" not in row for row in rows_of(pico_config.run.dir))
    assert not list(pico_config.run.dir.glob("seed_*"))
    costs = {row_name(row): row.get("seconds") for row in rows_of(pico_config.run.dir)}
    notes = json.loads((pico_config.run.dir / "run.json").read_text())
    fda = notes["construct gauss"]["seconds"] + notes["adapt fda-ta-gauss"]["seconds"]
    assert costs == {
        "Pretrained": None,
        "Individual": None,
        "TA": notes["merge ta"]["seconds"],
        "FDA (TA, Gauss)": pytest.approx(fda),
    }


def test_a_search_chooses_on_the_validation_cut_not_on_the_test_set(pico_config, capsys):
    config = change(pico_config, "compare", starts=["ta"], inits=["weight"], search=SCALES)
    scored = Counter()
    compare(config, counting(scored, by_split))
    folder = config.run.dir
    assert scored["MNIST", "ta"] == 3  # and once more for the table, under the name TA
    found = json.loads((folder / "search.json").read_text())
    assert found["choices"] == {"ta": {"scale": 0.2}} and found["split"] == "validation_cut"
    assert [c["hyper"]["scale"] for c in found["candidates"]] == [0.1, 0.2, 0.5]
    assert [c["avg"] for c in found["candidates"]] == pytest.approx([0.9, 1.0, 0.7], abs=1e-4)
    assert all(c["split"] == "validation_cut" and c["scores"]["SVHN"]["n"] == 7 for c in found["candidates"])
    assert "search ta: {'scale': 0.2} is best of 3 on validation_cut" in capsys.readouterr().out
    assert not (folder / "search").exists()
    # The row of the table is that choice, scored on the test set; so is the start of FDA.
    (value,) = {row["value"] for row in rows_of(folder) if row["method"] == "ta"}
    assert value == pytest.approx(0.7, abs=1e-4)
    merged = json.loads((folder / "merged/ta/provenance.json").read_text())
    assert merged["start"]["hyper"]["scale"] == 0.2
    # Again, with one more candidate: only that one is made.
    longer = change(config, "compare", search={"ta": {"scale": [*SCALES["ta"]["scale"], 0.3]}})
    compare(longer, counting(scored, by_split))
    assert scored["MNIST", "ta"] == 4


def test_several_lists_are_a_grid_and_a_search_is_made_once_for_all_seeds(seeds):
    lists = {"dare_ta": {"scale": [0.5, 1.0], "drop": [0.0, 0.5]}}
    scored = Counter()
    compare(change(seeds, "compare", starts=["dare_ta"], search=lists), counting(scored, by_split))
    assert scored["SVHN", "dare_ta"] == 4
    chosen = json.loads((seeds.run.dir / "search.json").read_text())["choices"]["dare_ta"]
    for seed in (0, 1):
        made = json.loads((seeds.run.dir / f"seed_{seed}/merged/dare_ta/provenance.json").read_text())
        assert made["start"]["hyper"] == chosen | {"seed": seed}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"search": {"taa": {"scale": [1.0]}}}, "unknown merge method 'taa'"),
        ({"search": {"ta": {"scael": [1.0]}}}, "ta: unknown hyperparameter 'scael', accepted: scale"),
        ({"search": {"ta": {"scale": ["x"]}}}, "ta: scale must be .*, it is 'x'"),
        ({"search": {"ta": {"scale": []}}}, "compare.search.ta.scale lists no value to try"),
        ({"search": {"ta": {}}}, "compare.search.ta lists no value to try"),
        ({"search": {"ties": {"scale": [1.0]}}}, "compare.search names ties, which no start of compare.starts"),
        ({"seeds": [1, 1]}, "compare.seeds names a seed twice: 1, 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_opened(pico_config, fields, message):
    config = change(change(pico_config, "compare", **fields), "model", root="/nowhere")
    with pytest.raises(InputError, match=message):
        compare(config, domain)
    assert not config.run.dir.exists()


def test_language_models_have_nothing_to_cut_from(tmp_path):
    """The pico inputs do not exist: the refusal comes before anything is read."""
    config = pico_nlg_config(tmp_path / "nowhere", tmp_path)
    message = "eval.split is validation_cut, but arithmetic has no training set to cut from"
    for refused in (
        change(config, "eval", split="validation_cut"),
        change(config, "compare", starts=["ta"], search=SCALES),
    ):
        with pytest.raises(InputError, match=message):
            compare(refused, nlg)


def test_the_dry_run_names_search_seeds_and_models(seeds):
    text = plan(change(seeds, "compare", search=SCALES), domain)
    assert "search ta          3 candidates, merged and scored on validation_cut" in text
    for seed in (0, 1):
        models = f"2 models in {seeds.run.dir}/seed_{seed}: ta x weight, dare_ta x weight"
        assert f"seed {seed}             {models}" in text


def test_a_checkpoint_made_elsewhere_is_one_start_among_others(pico_config, pico_inputs):
    given = change(pico_config, "start", method="mine", checkpoint=str(pico_inputs / "clip" / "base"))
    given = change(given, "compare", starts=["mine", "ta"], inits=["weight"])
    compare(given, counting(Counter(), by_split))
    rows = {row_name(row): row for row in rows_of(given.run.dir)}
    assert {"MINE", "TA", "FDA (MINE, Weight)", "FDA (TA, Weight)"} <= rows.keys()
    assert "seconds" not in rows["MINE"] and "seconds" in rows["TA"]
    assert rows["MINE"]["checkpoint"] == rows["Pretrained"]["checkpoint"]
    assert rows["MINE"]["value"] == rows["Pretrained"]["value"] == pytest.approx(0.5)
