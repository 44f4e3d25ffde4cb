"""Anchors along their optimisation: kept when asked for, without a trace in the anchors themselves."""

import pytest
import torch

from common.core.errors import InputError
from common.io.anchor_files import load_snapshots
from common.io.checkpoints import read_header
from common.opening import open_experiment
from common.pipeline import construct, initial_anchors_of
from helpers import change, files_of
from pico_vision import PICO_TASKS
from Vision import domain

pytestmark = pytest.mark.usefixtures("no_figures")


def asked(config, *steps):
    return change(config, "anchors", snapshots=list(steps))


@pytest.mark.parametrize("together", ["no", "eager"])
def test_snapshots_are_what_fewer_steps_end_at(pico_config, tmp_path, together):
    """x before step 3 of five is x after three steps; the anchors are bit by bit those made without snapshots."""
    config = change(pico_config, "anchors", together=together)
    construct(asked(config, 0, 3, 5), domain)
    with_them = files_of(config.run.dir, "block_*.safetensors")
    plain = change(config, "run", name="plain")
    construct(plain, domain)
    assert with_them == files_of(plain.run.dir, "block_*.safetensors") and len(with_them) == 4
    assert not files_of(plain.run.dir, "snapshots_*")
    ended = asked(change(change(config, "run", name="ended"), "anchors", steps=3), 3)
    construct(ended, domain)
    for task in PICO_TASKS:
        file = config.run.dir / f"anchors/weight/{task}/snapshots_01.safetensors"
        kept = load_snapshots(file, {"snapshots": [0, 3, 5]}, (4, 5, 16))
        assert list(kept) == [0, 3, 5] and not torch.equal(kept[3], kept[5])
        last = ended.run.dir / f"anchors/weight/{task}/snapshots_01.safetensors"
        torch.testing.assert_close(kept[3], load_snapshots(last, {}, (4, 5, 16))[3], rtol=0, atol=0)
        experiment = open_experiment(config, domain)
        theta_t = experiment.read_block(experiment.experts[task], 1)
        torch.testing.assert_close(kept[0], initial_anchors_of(experiment, task, 1, theta_t), rtol=0, atol=0)


def test_snapshots_asked_for_later_leave_the_anchors_alone(pico_config):
    construct(pico_config, domain)
    before = {file: file.stat().st_mtime_ns for file in pico_config.run.dir.rglob("block_*.safetensors")}
    construct(asked(pico_config, 0, 5), domain)
    snapshots = sorted(pico_config.run.dir.rglob("snapshots_*.safetensors"))
    assert len(snapshots) == 4
    snapshots[0].unlink()
    kept = {file: file.stat().st_mtime_ns for file in snapshots[1:]}
    construct(asked(pico_config, 5, 0), domain)
    assert snapshots[0].is_file(), "the order of the steps is no other question"
    assert all(file.stat().st_mtime_ns == at for file, at in (before | kept).items())
    construct(pico_config, domain)
    with pytest.raises(InputError, match=r"snapshots_00.*was made with snapshots = \[0, 5\], now it is \[2\]"):
        construct(asked(pico_config, 2), domain)


def test_a_unit_that_ends_early_has_its_snapshots_until_then(pico_config):
    config = asked(change(pico_config, "anchors", steps=60, stop_loss=5.0), 0, 40)
    construct(config, domain)
    file = config.run.dir / "anchors/weight/MNIST/snapshots_00.safetensors"
    assert list(load_snapshots(file, {}, (4, 5, 16))) == [0]
    assert read_header(file)["snapshots"] == [0, 40]


@pytest.mark.parametrize("steps", [[6], [-1], [2, 2]])
def test_steps_that_are_not_there_are_refused(pico_config, steps):
    with pytest.raises(InputError, match="anchors.snapshots must name steps from 0 to anchors.steps, 5, none twice"):
        construct(asked(pico_config, *steps), domain)


def test_anchors_made_elsewhere_have_no_snapshots(pico_config, tmp_path):
    with pytest.raises(InputError, match="anchors.snapshots are kept while anchors are made"):
        open_experiment(asked(change(pico_config, "anchors", source=str(tmp_path)), 0), domain)
