"""A run whose config changes between its stages: refused by name, never an older result in the place of a new one."""

import json
from dataclasses import replace

import pytest
import yaml

from common.analysis.run import analyse
from common.core.errors import InputError
from common.opening import open_experiment
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import ADAPT, describe
from common.provenance import read_provenance
from common.report.vectors import measure
from helpers import change, files_of
from NLG import domain as nlg
from Vision import domain


@pytest.fixture
def config(pico_config):
    """From task arithmetic, not scored."""
    ta = change(pico_config, "start", method="ta", hyper={"ta": {"scale": 0.4}})
    return change(ta, "run", score=False)


@pytest.fixture
def done(config):
    """A run that has its adapted model."""
    construct(config, domain)
    adapt(config, domain)
    return config


OTHER_ANCHORS = {
    "number": 5, "tokens": 3, "scale": 0.5, "distance": "mse", "weights": "size", "optimizer": "muon", "lr": 0.02,
    "schedule": "linear", "steps": 6, "stop_loss": 0.9, "patience": 1, "together": "eager",
    "skip_null_gradients": False,
}  # fmt: skip


def test_a_model_of_other_anchors_than_the_config_s_is_refused(done):
    """That the anchors are no longer those of the config is told of a finished model as of one that is to be made."""
    before = files_of(done.run.dir, "*.safetensors")
    others = [change(done, "anchors", **{field: value}) for field, value in OTHER_ANCHORS.items()]
    for other in [*others, change(done, "run", precision="bf16")]:
        with pytest.raises(InputError, match=r"block_00.safetensors was made with (anchors|run)\.\w+ = .*, now it is"):
            adapt(other, domain)
    with pytest.raises(InputError, match=r"was made with anchors.steps = 5, now it is 6"):
        analyse("landscape", change(done, "anchors", steps=6), domain)
    assert files_of(done.run.dir, "*.safetensors") == before


def test_snapshots_and_pieces_do_not_hinder_an_adaptation(done):
    construct(change(done, "anchors", snapshots=[0, 4]), domain)
    for other in ({"snapshots": [0, 2]}, {"chunk": 2}, {"part": "layer"}):
        changed = change(done, "anchors", **other)
        assert not describe(changed, domain, ADAPT).refusals
        assert adapt(changed, domain)


def test_a_given_merge_by_ta_is_another_start_than_the_same_made_here(done):
    """The one has a coefficient for each weight of the merged task vector, the other for those of each task."""
    given = change(done, "start", checkpoint=str(done.run.dir / "merged" / "ta"))
    assert read_provenance(done.run.dir / "merged" / "fda-ta-weight")["adapt"]["per_task"] is True
    with pytest.raises(InputError, match=r"was made with adapt.per_task = True, now it is False"):
        adapt(given, domain)
    labelled = adapt(change(given, "adapt", label="given"), domain)
    assert read_provenance(labelled)["adapt"]["per_task"] is False
    with pytest.raises(InputError, match=r"was made with adapt.per_task = False, now it is True"):
        adapt(change(done, "adapt", label="given"), domain)


def test_a_merge_with_a_text_tower_of_its_own_is_not_one_without(config):
    with_text = change(config, "model", text="base")
    merge_alone(with_text, domain)
    with pytest.raises(InputError, match=r"was made with inputs.model.text = sha256:\w+, now it is None"):
        merge_alone(config, domain)
    merge_alone(with_text, domain)


def card(config, model):
    """The config in a model's card, and all of it."""
    text = (config.run.dir / "merged" / model / "README.md").read_text()
    return yaml.safe_load(text.split("```yaml")[1].split("```")[0]), text


def test_a_card_says_what_made_its_model_whatever_is_set_now(done):
    """Each model of a run keeps its own settings; one of other tasks keeps its card."""
    first, _ = card(done, "fda-ta-weight")
    assert first["adapt"]["epochs"] == 2 and first["anchors"]["steps"] == 5
    assert first["start"] == {"method": "ta", "hyper": {"ta": {"scale": 0.4}}}
    adapt(change(done, "adapt", label="long", epochs=5, by_start={"ta": {"lr": 0.02}}), domain)
    assert card(done, "fda-ta-weight")[0] == first
    assert card(done, "fda-ta-weight-long")[0]["adapt"] == first["adapt"] | {"label": "long", "epochs": 5, "lr": 0.02}
    other = change(change(done, "start", method="tsv", hyper={"ta": {"scale": 0.9}}), "anchors", steps=6)
    merge_alone(other, domain)
    assert card(done, "ta")[0]["start"] == first["start"] and "hyper" not in card(done, "tsv")[0]["start"]
    said, text = card(done, "fda-ta-weight")
    assert said == first | {"anchors": {"init": "weight"}}, "of the anchors nothing that is not known"
    merge_alone(replace(change(other, "start", method="average"), tasks=done.tasks[:1]), domain)
    assert card(done, "fda-ta-weight")[1] == text and card(done, "average")[0]["tasks"] == done.tasks[:1]


def test_task_vectors_of_other_blocks_are_measured_anew(nlg_config):
    """The page of a run shows those of the part of a layer that is anchored."""
    found = []
    for part in ("mlp", "layer", "layer"):
        experiment = open_experiment(change(nlg_config, "anchors", part=part), nlg)
        assert measure(experiment, True) == ""
        found.append(json.loads((nlg_config.run.dir / "task_vectors.json").read_text()))
    assert [of["blocks"][0] for of in found] == ["model.layers.0.mlp.", "model.layers.0.", "model.layers.0."]
    assert all(layer > mlp for layer, mlp in zip(found[1]["theta"], found[0]["theta"], strict=True))
    assert found[2] == found[1]
