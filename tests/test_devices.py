"""What runs on a GPU, without one: every tensor lies where those lie that it meets, and results are the CPU's."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.io.checkpoints import Checkpoint
from common.merging.registry import METHODS, hyperparameters
from common.merging.starts import merge, survey
from common.pipeline import adapt, construct, merge_alone
from elsewhere import DEVICE, elsewhere
from helpers import change
from NLG import domain as nlg
from NLU import domain as nlu
from Vision import domain as vision

TWO = {"slerp", "layer_swap"}  # take two models
BLIND = re.compile(
    r"(key|k_proj|in_proj_)\.?bias"
)  # softmax does not see the bias of the keys: its gradient is rounding
CONFIGS = {"vision": "pico_config", "nlu": "nlu_config", "nlg": "nlg_config"}


def seen(name):
    """Whether a tensor is decided by what a block computes."""
    return not BLIND.search(name)


def test_tensors_that_lie_apart_are_refused(monkeypatch):
    """As by CUDA: single numbers and indices may lie here, and what lies there is no array."""
    x = torch.arange(6.0).reshape(2, 3)
    with elsewhere(monkeypatch):
        there = x.to(DEVICE)
        assert there.device == DEVICE and torch.zeros(2, device=DEVICE).device == DEVICE
        assert torch.equal((there @ there.mT).cpu(), x @ x.mT) and (there * torch.tensor(2.0)).device == DEVICE
        assert torch.equal(there[torch.tensor([1])].cpu(), x[1:])
        for apart in (lambda: there + x, lambda: x @ there.mT, lambda: torch.stack([x, there])):
            with pytest.raises(RuntimeError, match="lie here, others elsewhere"):
                apart()
        with pytest.raises(TypeError, match="no array"):
            np.asarray(there)


@pytest.mark.parametrize("start", ["pretrained", "ta", "tsv"])
@pytest.mark.parametrize("domain", [vision, nlu, nlg], ids=lambda domain: domain.NAME)
def test_both_boxes_and_the_scores_on_another_device(domain, start, request, monkeypatch):
    config = change(request.getfixturevalue(CONFIGS[domain.NAME]), "run", score=domain is not nlg)
    config = change(config, "start", method=start)
    construct(config, domain)
    here = Checkpoint(adapt(config, domain))
    config = change(config, "run", name="elsewhere", device=str(DEVICE))
    with elsewhere(monkeypatch):
        construct(config, domain)
        there = Checkpoint(adapt(config, domain))
    for name in filter(seen, here.shapes):
        torch.testing.assert_close(there.read([name]), here.read([name]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.data])
def test_every_method_without_data_merges_on_another_device(method, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0.weight": (40, 24), "layers.0.bias": (24,), "patches": (8, 3, 4, 4), "layers.1.weight": (12, 30)}
    models = [
        {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(3 if method in TWO else 4)
    ]
    hyper = {"steps": 3} if "steps" in hyperparameters(method) else {}

    def merged(base, *deltas):
        found = survey(method, lambda: [(base, deltas)], hyper) if METHODS[method].survey else None
        return merge(method, base, deltas, hyper, found)

    here = merged(*models)
    with elsewhere(monkeypatch):
        there = merged(*({name: x.to(DEVICE) for name, x in model.items()} for model in models))
        assert {x.device for x in there.values()} == {DEVICE}
        torch.testing.assert_close({name: x.cpu() for name, x in there.items()}, here, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.data])
def test_every_method_with_data_merges_on_another_device(method, nlu_config, monkeypatch):
    few = {"examples": 6, "steps": 2, "epochs": 1, "rounds": 1}
    hyper = {method: {name: value for name, value in few.items() if name in hyperparameters(method)}}
    config = replace(nlu_config, start=replace(nlu_config.start, method=method, hyper=hyper))
    config = change(config, "run", score=False)
    here = Checkpoint(merge_alone(config, nlu))
    with elsewhere(monkeypatch):
        there = Checkpoint(merge_alone(change(config, "run", name="elsewhere", device=str(DEVICE)), nlu))
    for name in filter(seen, here.shapes):
        torch.testing.assert_close(there.read([name]), here.read([name]), rtol=1e-3, atol=1e-4)
