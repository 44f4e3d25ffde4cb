"""Models of one table are of the same inputs and starts; what is not is refused, by the dry run as by the run."""

import json
import shutil
from dataclasses import replace

import pytest
import yaml

from common.config import as_dict
from common.core.errors import InputError
from common.evaluation.scoring import score_run
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import ADAPT, EVALUATE, MERGE, describe
from helpers import change, command, rewrite
from pico_grid import rows_of
from Vision import domain

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def own(pico_config, pico_inputs, tmp_path):
    """FDA adapted from TA, and scored, on a copy of the checkpoints that a test may damage; and their folder."""
    shutil.copytree(pico_inputs / "clip", tmp_path / "clip")
    config = change(pico_config, "model", root=str(tmp_path / "clip"))
    config = change(config, "start", method="ta")
    construct(config, domain)
    adapt(config, domain)
    return config, tmp_path / "clip"


def refused(config, *stages):
    """The sentence with which scoring, each stage and the dry runs refuse."""
    found = {describe(config, domain, EVALUATE, anchored=False).refusals[0]}
    for stage in (score_run, *stages):
        with pytest.raises(InputError) as raised:
            stage(config, domain)
        found.add(str(raised.value))
    [sentence] = found
    return sentence


def moved(tensors):
    tensors["visual.proj"] += 0.01


@pytest.mark.parametrize("rest", ["pretrained", "start"])
def test_a_start_made_anew_does_not_stand_beside_what_was_adapted_before(own, rest):
    config, _ = own
    merged = config.run.dir / "merged"
    config = change(config, "adapt", label=rest, rest=rest)
    adapt(config, domain)
    if rest == "start":
        shutil.rmtree(merged / "fda-ta-weight")
        shutil.rmtree(merged / "ta-pretrained-rest")
    shutil.rmtree(merged / "ta")
    other = change(config, "start", hyper={"ta": {"scale": 0.9}})
    before = rows_of(config.run.dir)
    with pytest.raises(InputError, match="was adapted from another start than"):
        merge_alone(other, domain)  # it is there when the sentence is said
    sentence = refused(other, merge_alone)
    folder = "fda-ta-weight" if rest == "pretrained" else "fda-ta-weight-start"
    assert sentence.startswith(f"{merged / folder} was adapted from another start than {merged / 'ta'} is now (it was ")
    assert "remove the folder to have it made anew" in sentence
    if rest == "pretrained":
        assert " (nor do fda-ta-weight-pretrained, ta-pretrained-rest beside it)" in sentence
    assert rows_of(config.run.dir) == before


def test_a_start_made_elsewhere_is_one_model_under_one_name(own, pico_inputs):
    config, root = own
    first, second = (str(root / task / "finetuned.safetensors") for task in config.tasks)
    given = change(config, "start", method="mine", checkpoint=first)
    adapt(given, domain)
    score_run(given, domain)
    other = change(change(given, "start", checkpoint=second), "adapt", label="again")
    sentence = refused(other, adapt)
    assert f"fda-mine-weight was adapted from another start than {second} is now" in sentence
    assert describe(other, domain, ADAPT).refusals[-1] == sentence
    # A merge of that name is another model, too.
    sentence = refused(change(given, "start", method="ta"))
    assert f"{config.run.dir}/merged/ta is another model than start.checkpoint, {first}" in sentence
    same = change(given, "start", method="ta", checkpoint=str(config.run.dir / "merged/ta"))
    score_run(same, domain)


@pytest.mark.parametrize("which", ["base", "SVHN"])
def test_merges_of_other_checkpoints_are_refused(own, which):
    config, root = own
    file = "open_clip_model.safetensors" if which == "base" else "finetuned.safetensors"
    rewrite(root / which / file, moved)
    sentence = refused(config, adapt, lambda c, d: merge_alone(change(c, "start", method="tsv"), d))
    what = "base" if which == "base" else "expert of SVHN"
    assert f"fda-ta-weight was made from another {what} than {root / which}" in sentence
    assert not (config.run.dir / "merged/tsv").exists()  # nothing is merged for nothing
    assert describe(config, domain, MERGE).refusals == [sentence]


def test_merges_of_more_tasks_are_refused(own, tmp_path):
    config, _ = own
    sentence = refused(replace(config, tasks=["SVHN"]))
    assert "fda-ta-weight was made for the tasks MNIST, SVHN, and tasks is now SVHN" in sentence
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in as_dict(config).items() if k != "dry_run"}))
    done = command("scripts/evaluate.py", "--config", file, "--dry-run", "--tasks", json.dumps(["SVHN"]))
    assert (done.returncode, done.stderr) == (2, f"error: {sentence}\n")


def test_a_model_of_an_earlier_version_is_called_that(own):
    """It identified its inputs by samples, so that they are neither these nor others."""
    config, _ = own
    file = config.run.dir / "merged/fda-ta-weight/provenance.json"
    made = json.loads(file.read_text())
    made["inputs"]["base"] = "0123456789abcdef"
    file.write_text(json.dumps(made))
    assert f"{file.parent} is of an earlier version, which looked at samples of its inputs" in refused(config)


def test_settings_may_differ_between_the_models_of_a_run(own):
    """Labels, fields of adapt, hyperparameters of any method, the order of the tasks."""
    config, _ = own
    adapt(change(config, "adapt", label="long", epochs=3, rest="start"), domain)
    merge_alone(change(config, "start", method="tsv", hyper={"ta": {"scale": 0.1}, "tsv": {"scale": 0.5}}), domain)
    adapt(change(config, "start", method="pretrained"), domain)
    score_run(replace(config, tasks=config.tasks[::-1]), domain)
    assert describe(config, domain, EVALUATE, anchored=False).refusals == []
