"""results.json: rows of models that are gone stand beside what they can be compared with, and no process loses rows."""

import json
import shutil
import threading
from collections import Counter

import pytest

from common.core.errors import InputError
from common.evaluation.kept import keep_rows, known_rows, why_apart
from common.evaluation.rows import row_name
from common.evaluation.scoring import score_run
from common.io.locks import locked
from common.pipeline import adapt, construct, merge_alone
from common.report.reading import read_run
from helpers import change, command
from pico_grid import by_split, counting, rows_of
from Vision import domain

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def two_merges(pico_config):
    """A run that merged by TA and TSV; its rows are of all examples."""
    for method in ("ta", "tsv"):
        merge_alone(change(change(pico_config, "start", method=method), "run", score=False), domain)
    score_run(pico_config, domain)
    return pico_config


def kept_beside(row):
    """The row of another model of the same test set."""
    return [{**row, "method": "average"}]


def names_of(config):
    return {row_name(row) for row in rows_of(config.run.dir)}


def test_a_removed_model_keeps_its_row_beside_others_of_the_same_examples(two_merges):
    shutil.rmtree(two_merges.run.dir / "merged/tsv")
    score_run(two_merges, domain)
    assert names_of(two_merges) == {"Pretrained", "Individual", "TA", "TSV"}


def test_a_row_of_a_folder_s_examples_is_not_one_of_the_hub_s(two_merges, tmp_path):
    """Where the folder of a test set is not there, the hub is read, and what was scored before is scored anew."""
    scored = Counter()
    score_run(two_merges, counting(scored, by_split))
    assert not scored
    elsewhere = change(two_merges, "eval", data=str(tmp_path / "nowhere"))
    score_run(elsewhere, counting(scored, by_split))
    assert set(scored.values()) == {1} and len(scored) == 2 * len(names_of(two_merges))
    assert not any("test_set" in row for row in rows_of(two_merges.run.dir))


def test_a_removed_model_scored_on_other_examples_is_in_no_table(two_merges, capsys):
    folder = two_merges.run.dir
    kept = [row for row in rows_of(folder) if row_name(row) == "TSV"]
    shutil.rmtree(folder / "merged/tsv")
    capsys.readouterr()
    score_run(fewer := change(two_merges, "eval", limit=5), domain)
    said = "of models that are not there any more and compare with no other: TSV (its n was 20, now it is 5)"
    assert said in capsys.readouterr().out
    assert names_of(two_merges) == {"Pretrained", "Individual", "TA"} and "TSV" not in (folder / "table.md").read_text()
    assert {row_name(row) for row in read_run(folder).rows} == names_of(two_merges)
    assert json.loads((folder / "results.json").read_text())["apart"] == kept
    # So it is where a row says of something else than the model that it was scored with, a tokenizer, say.
    reason = why_apart({**kept[0], "scorer": "another"}, [], kept_beside(kept[0]), "")
    assert reason.startswith("it was scored with another head")
    # It is there again, in its place, where the others are scored as it was; and again no more where they are not.
    score_run(two_merges, domain)
    assert [row for row in rows_of(folder) if row_name(row) == "TSV"] == kept
    assert "apart" not in json.loads((folder / "results.json").read_text())
    # A model that is there is scored anew in place of its row.
    merge_alone(change(fewer, "start", method="tsv"), domain)
    assert {row["n"] for row in rows_of(folder)} == {5} and "TSV" in names_of(two_merges)


def test_no_difference_is_taken_from_a_start_made_anew(pico_config, capsys):
    config = change(pico_config, "start", method="ta")
    construct(config, domain)
    adapt(config, domain)
    for folder in ("ta", "ta-pretrained-rest", "fda-ta-weight"):
        shutil.rmtree(config.run.dir / "merged" / folder)
    score_run(config, domain)
    assert "FDA (TA, Weight)" in names_of(config)  # with the row of its own start
    merge_alone(change(config, "start", hyper={"ta": {"scale": 0.9}}), domain)
    assert names_of(config) == {"Pretrained", "Individual", "TA", "TA pretrained rest"}
    assert "FDA (TA, Weight) was adapted from another TA" in capsys.readouterr().out


def test_rows_of_removed_models_of_other_experts_are_in_no_table(two_merges, capsys):
    shutil.rmtree(two_merges.run.dir / "merged")
    other = change(two_merges, "model", experts={"SVHN": two_merges.model.path("expert", "MNIST").as_posix()})
    score_run(other, domain)
    assert names_of(two_merges) == {"Pretrained", "Individual"}
    assert "TSV (it was made from another base, other experts or for other tasks)" in capsys.readouterr().out


def test_rows_that_another_process_wrote_meanwhile_stay(pico_config):
    """Another one scores while this one is between two of its rows."""
    config = change(pico_config, "start", method="ta")
    merge_alone(change(config, "run", score=False), domain)
    file, row = config.run.dir / "results.json", {"method": "tsv", "start": None, "init": None, "label": ""}

    def score(config, task, checkpoints, device):
        for name, scored in by_split(config, task, checkpoints, device):
            meanwhile = [row | {"task": task, "split": "test", "value": 0.5, "n": 7, "metric": ""}]
            keep_rows(file, ["MNIST", "SVHN"], meanwhile, [], "")
            yield name, scored

    score_run(config, counting(Counter(), score))
    assert sum(row["method"] == "tsv" for row in known_rows(file)) == 2


def test_many_writers_lose_no_row(tmp_path):
    code = "import sys; from pathlib import Path; from common.evaluation.kept import keep_rows\n"
    code += "row = {'method': 'ta', 'start': None, 'init': None, 'value': 1, 'split': 'test', 'label': sys.argv[2]}\n"
    code += "[keep_rows(Path(sys.argv[1]), ['a'], [row | {'task': str(i)}], [], '') for i in range(40)]"
    file = tmp_path / "results.json"
    writers = [threading.Thread(target=command, args=("-c", code, file, str(n))) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(known_rows(file)) == 120 and [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_lock_is_entered_again_and_refused_to_others(tmp_path):
    code = "import sys; from pathlib import Path; from common.io.locks import locked\n"
    code += "with locked(Path(sys.argv[1]), 'another one'):\n    pass"
    with locked(tmp_path / "a"), locked(tmp_path / "a"):
        assert "InputError: another one" in command("-c", code, tmp_path / "a").stderr
    assert command("-c", code, tmp_path / "a").returncode == 0 and not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"), locked(tmp_path / "file" / "a"):
        pass
