"""adapt.blend, between the start and the adapted model, and its choice on the validation cut."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import common.pipeline as pipeline
from common.core.errors import InputError
from common.domain import Scored
from common.io.checkpoints import Checkpoint
from common.pipeline import adapt, construct
from common.run.plain_log import told
from common.run.stages import command_stages
from compare import compare, plan
from helpers import change
from pico_grid import Counter, counting
from Vision import domain

pytestmark = pytest.mark.usefixtures("no_figures")
BLENDS = [0.2, 0.6, 1.0]


def tensors(folder):
    checkpoint = Checkpoint(folder)
    return checkpoint.read(checkpoint.names())


def between(start, adapted, blend):
    return {name: start[name] + blend * (adapted[name] - start[name]) for name in start}


@pytest.mark.parametrize("rest", ["pretrained", "start"])
def test_a_blend_lies_between_the_start_and_the_adapted_model(pico_config, rest):
    config = change(change(pico_config, "start", method="ta"), "adapt", rest=rest)
    config = change(config, "run", score=False)
    construct(config, domain)
    whole = tensors(adapt(config, domain))
    start = tensors(config.run.dir / "merged/ta")
    assert any((whole[name] != start[name]).any() for name in start)
    for blend in (0.0, 0.3):
        found = tensors(adapt(change(config, "adapt", blend=blend, label=f"blend {blend}"), domain))
        assert found.keys() == whole.keys()
        for name, expected in between(start, whole, blend).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7, msg=name)
    with pytest.raises(InputError, match=r"adapt.blend = 1.*, now it is 0.5"):
        adapt(change(config, "adapt", blend=0.5), domain)


def blend_of(config, path):
    """How far a model is from TA to FDA, told by a tensor that is the base's in FDA."""
    name = "visual.conv1.weight"
    base, start = (Checkpoint(p).read([name])[name] for p in (config.model.path("base"), config.run.dir / "merged/ta"))
    return 1 - ((Checkpoint(path).read([name])[name] - base).norm() / (start - base).norm()).item()


def best_at(peak, scored):
    """Vision with scores that are best at a blend, on the cut and nowhere else."""

    def score(config, task, checkpoints, device):
        held_out = config.eval.split == "validation_cut"
        far = {name: abs(blend_of(config, path) - peak) if held_out else 0.5 for name, path in checkpoints.items()}
        return iter([(name, Scored(1 - distance, 7, "")) for name, distance in far.items()])

    return counting(scored, score)


@pytest.mark.parametrize(("peak", "chosen"), [(0.55, 0.6), (0.0, 0.0), (1.3, 1.0)])
def test_the_blend_is_chosen_on_the_cut_at_the_price_of_one_adaptation(pico_config, peak, chosen, monkeypatch):
    fits, fit_block = [], pipeline.fit_block
    monkeypatch.setattr(pipeline, "fit_block", lambda *a, **k: fits.append(1) or fit_block(*a, **k))
    config = change(pico_config, "compare", starts=["ta"], inits=["weight"], search={"fda": {"blend": BLENDS}})
    scored = Counter()
    compare(config, best_at(peak, scored))
    folder, depth = config.run.dir, len(fits)
    found = json.loads((folder / "search.json").read_text())
    assert found["choices"] == {"fda-ta-weight": {"blend": chosen}}
    assert [c["fields"]["blend"] for c in found["candidates"]] == [0.0, *BLENDS]
    assert {p.name for p in (folder / "merged").iterdir()} == {"ta", "ta-pretrained-rest", "fda-ta-weight"}
    assert blend_of(config, folder / "merged/fda-ta-weight") == pytest.approx(chosen, abs=1e-5)
    assert not (folder / "merged/fda-ta-weight/blocks").exists()
    # The model is that of the command with the chosen blend, to the bit; and one adaptation made all of it.
    alone = change(change(config, "run", name="alone"), "adapt", blend=chosen, label="")
    alone = change(change(alone, "start", method="ta"), "run", score=False)
    construct(alone, domain)
    alone_is = adapt(alone, domain)
    assert len(fits) == 2 * depth
    files = [f"{path}/open_clip_model.safetensors" for path in (alone_is, folder / "merged/fda-ta-weight")]
    assert Path(files[0]).read_bytes() == Path(files[1]).read_bytes()
    # A second time nothing is made or scored.
    seen = dict(scored)
    compare(config, best_at(peak, scored))
    assert dict(scored) == seen and len(fits) == 2 * depth


def test_a_choice_is_written_down_once_its_model_is_made(pico_config):
    """The adaptation can be refused: a model of that name is there, of other settings."""
    config = change(pico_config, "compare", starts=["ta"], inits=["weight"], search={"fda": {"blend": BLENDS}})
    alone = change(change(pico_config, "start", method="ta"), "run", score=False)
    construct(alone, domain)
    adapt(change(alone, "adapt", epochs=3), domain)
    with pytest.raises(InputError, match=r"fda-ta-weight.* was made with adapt.* now it is"):
        compare(config, best_at(0.55, Counter()))
    found = json.loads((config.run.dir / "search.json").read_text())
    assert len(found["candidates"]) == 4 and found["choices"] == {}


def test_other_fields_of_the_adaptation_are_chosen_with_it(pico_config, tmp_path):
    lists = {"lr": [1e-3, 1e-2], "blend": [0.5, 1.0]}
    config = change(pico_config, "compare", starts=["pretrained", "ta"], inits=["weight"], search={"fda": lists})

    def lottery(config, task, checkpoints, device):
        drawn = {name: int(Checkpoint(path).fingerprint()[-6:], 16) / 16**6 for name, path in checkpoints.items()}
        return iter([(name, Scored(value, 7, "")) for name, value in drawn.items()])

    with command_stages() as stages, told(stages, str(tmp_path / "log")):
        compare(config, counting(Counter(), lottery))
    told_of = (tmp_path / "log").read_text()
    for model in ("fda-pretrained-weight", "fda-ta-weight"):  # each candidate is told once it is scored
        said = re.findall(rf"of 7, search {model}, (\d) of 5 units, ((?:lr [\d.]+, )?blend [\d.]+)", told_of)
        tried = ["blend 0.0", *(f"lr {lr}, blend {blend}" for lr in lists["lr"] for blend in lists["blend"])]
        assert said == [(str(number), candidate) for number, candidate in enumerate(tried, 1)]
    found = json.loads((config.run.dir / "search.json").read_text())
    assert set(found["choices"]) == {"fda-pretrained-weight", "fda-ta-weight"}
    assert len(found["candidates"]) == 2 * (1 + 4)
    for name, chosen in found["choices"].items():
        tried = [c for c in found["candidates"] if name == f"fda-{c['start']}-{c['init']}"]
        assert max(tried, key=lambda c: c["avg"])["fields"] == chosen
        made = json.loads((config.run.dir / "merged" / name / "provenance.json").read_text())
        assert chosen.items() <= made["adapt"].items() and len({c["avg"] for c in tried}) == 5
    assert "search fda         4 candidates of each model, and its start" in plan(config, domain).text


def test_a_blend_that_all_candidates_have_is_part_of_what_was_scored(pico_config):
    """One that is no field of the search decides their scores all the same."""
    config = change(pico_config, "compare", starts=["ta"], inits=["weight"], search={"fda": {"epochs": [2, 3]}})
    scored, seen = Counter(), []
    for blend in (1, 0.5, 0.5):
        blended = change(config, "adapt", blend=blend)
        shutil.rmtree(config.run.dir / "merged", ignore_errors=True)
        compare(blended, best_at(0.5, scored))
        candidates = json.loads((config.run.dir / "search.json").read_text())["candidates"]
        seen.append([round(candidate["avg"], 5) for candidate in candidates])
    assert seen[0] == [0.5, 0.5, 0.5], "the start, and two all the way from it, as far from the best"
    assert seen[1] == seen[2] == [0.5, 0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"blnd": [1.0]}, "compare.search.fda: adapt has no field 'blnd' to choose; fields: rest, "),
        ({"blend": ["x"]}, "compare.search.fda.blend must be a number, it is 'x'"),
        ({"blend": [1.5]}, r"adapt.by_start.\w+.blend is 1.5; it goes from 0, the start, to 1"),
        ({"distance": ["cosine"]}, "compare.search.fda.distance must be 'cos' or 'mse' or 'l1', it is 'cosine'"),
        ({"epochs": [0]}, r"adapt.by_start.\w+.epochs is 0; it must be above zero"),
        ({"label": ["x"]}, "adapt has no field 'label' to choose"),
        ({}, "compare.search.fda lists no value to try"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_anything_is_opened(pico_config, lists, message):
    config = change(change(pico_config, "compare", search={"fda": lists}), "model", root="/nowhere")
    with pytest.raises(InputError, match=message):
        compare(config, domain)
    assert not config.run.dir.exists()


def test_a_search_needs_all_blocks_and_an_initialisation(pico_config):
    config = change(pico_config, "compare", starts=["ta"], inits=["weight"], search={"fda": {"blend": BLENDS}})
    with pytest.raises(InputError, match=r"run.blocks leaves blocks to other machines"):
        compare(replace(config, run=replace(config.run, blocks=[0])), domain)
    with pytest.raises(InputError, match=r"compare.inits names none to make"):
        compare(change(config, "compare", inits=[]), domain)
