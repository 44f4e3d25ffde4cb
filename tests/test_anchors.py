"""Initial anchors, seeds, and anchor files of ours and of the release."""

import numpy as np
import pytest
import torch

from common.core.errors import InputError
from common.core.seeding import seeded
from common.fda.anchors import initial_anchors
from common.io.anchor_files import load_anchors, load_published, save_anchors


def rows_of(x_ATD):
    return {tuple(row) for row in x_ATD.reshape(-1, x_ATD.shape[-1]).tolist()}


def test_weight_initialisation_draws_rows_without_replacement():
    theta_t = {"w": torch.arange(40.0).reshape(10, 4), "bias": torch.zeros(4), "other_width": torch.zeros(9, 7)}
    x = initial_anchors("weight", (2, 5, 4), theta_t=theta_t, scale=1.0, generator=seeded(0, "u"))
    assert rows_of(x) == rows_of(theta_t["w"])


def test_too_few_rows_are_filled_up_with_means_of_pairs_and_shuffled():
    theta_t = {"w": torch.eye(4)}
    x = initial_anchors("weight", (5, 4, 4), theta_t=theta_t, scale=1.0, generator=seeded(0, "u")).reshape(20, 4)
    assert all(row in rows_of(x) for row in rows_of(torch.eye(4)))
    assert torch.allclose(x.sum(1), torch.ones(20)), "every row is one of the four, or the mean of two of them"
    assert rows_of(x[:4]) != rows_of(torch.eye(4))


def test_gauss_has_the_scale():
    x = initial_anchors("gauss", (64, 50, 32), theta_t={}, scale=0.01, generator=seeded(0, "u"))
    assert x.std().item() == pytest.approx(0.01, rel=0.01)


def test_unknown_scheme_and_impossible_width_are_named():
    with pytest.raises(InputError, match="'rows'.*weight, gauss"):
        initial_anchors("rows", (1, 1, 4), theta_t={}, scale=1, generator=seeded(0))
    with pytest.raises(InputError, match="has 4 inputs"):
        initial_anchors("weight", (1, 1, 4), theta_t={"w": torch.zeros(3, 5)}, scale=1, generator=seeded(0))


def test_seeds_differ_by_unit_and_repeat():
    def draw(*unit):
        return torch.randn(3, generator=seeded(*unit)).tolist()

    assert draw(0, "MNIST", 1) == draw(0, "MNIST", 1)
    assert len({tuple(draw(*u)) for u in [(0, "MNIST", 1), (1, "MNIST", 1), (0, "DTD", 1), (0, "MNIST", 2)]}) == 4


def test_anchor_files_keep_tensor_and_provenance(tmp_path):
    x = torch.randn(2, 3, 4)
    save_anchors(tmp_path / "a", x, {"anchors": {"steps": 2}, "trace": [1.0]})
    assert torch.equal(load_anchors(tmp_path / "a", {"anchors": {"steps": 2}}), x)
    with pytest.raises(InputError, match=r"anchors\.steps = 2, now it is 3"):
        load_anchors(tmp_path / "a", {"anchors": {"steps": 3}})


def test_released_files_are_turned_batch_first(tmp_path):
    x_TAD = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    np.save(tmp_path / "dual_anchors_layer_1.npy", x_TAD)
    x = load_published(tmp_path / "dual_anchors_layer_1.npy", "TAD", 4)
    assert x.shape == (2, 3, 4) and torch.equal(x[1, 2], torch.from_numpy(x_TAD[2, 1]))
    with pytest.raises(InputError, match="width 5"):
        load_published(tmp_path / "dual_anchors_layer_1.npy", "TAD", 5)
    with pytest.raises(InputError, match="there is no anchor file"):
        load_published(tmp_path / "dual_anchors_layer_2.npy", "TAD", 4)
