"""The search: it sees no test set, is made once for all seeds, and what cannot work is refused."""

import json
from collections import Counter

import pytest
import yaml

from common.config import as_dict
from common.core.errors import InputError
from common.evaluation.tuning import searching
from compare import compare, plan
from helpers import change, command
from NLG import domain as nlg
from pico_grid import by_split, counting, rows_of
from pico_nlg import pico_config as pico_nlg_config
from Vision import domain

pytestmark = pytest.mark.usefixtures("no_figures")
SCALES = {"ta": {"scale": [0.1, 0.2, 0.5]}}


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
    (value,) = {row["value"] for row in rows_of(folder) if row["method"] == "ta" and not row["label"]}
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
    """The pico inputs do not exist but for the folders of data: the refusal comes before anything is read."""
    config = pico_nlg_config(tmp_path / "nowhere", tmp_path)
    for test in config.tests:
        (tmp_path / "nowhere" / "data" / test).mkdir(parents=True)
    message = "eval.split is validation_cut, but arithmetic has no training set to cut from"
    for refused in (
        change(config, "eval", split="validation_cut"),
        change(config, "compare", starts=["ta"], search=SCALES),
    ):
        with pytest.raises(InputError, match=message):
            compare(refused, nlg)


def test_one_process_at_a_time_searches_in_a_run(pico_config, tmp_path):
    """Two would remove each other's candidates; the second is refused before any work."""
    config = change(pico_config, "compare", starts=["ta"], inits=[], search=SCALES)
    file, folder = tmp_path / "config.yaml", config.run.dir
    file.write_text(yaml.safe_dump({k: v for k, v in as_dict(config).items() if k != "dry_run"}))
    with searching(config):
        (folder / "search").mkdir()
        done = command("scripts/compare.py", "--config", file)
        assert done.returncode == 2 and done.stderr.splitlines()[-1] == (
            f"error: another process is at work with compare.search in {folder}; wait until it has finished, or "
            "choose another run.name"
        )
        assert [entry.name for entry in sorted(folder.iterdir())] == [".search.lock", "search"]


def test_the_dry_run_names_search_seeds_and_models(seeds):
    text = plan(change(seeds, "compare", search=SCALES), domain).text
    assert "search ta          3 candidates, merged and scored on validation_cut" in text
    for seed in (0, 1):
        models = f"2 models in {seeds.run.dir}/seed_{seed}: ta x weight, dare_ta x weight"
        assert f"seed {seed}             {models}" in text
