"""model.fuse_qkv: q, k and v that are kept apart weigh in the matching loss as one tensor."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from common.core.errors import InputError
from common.core.fused import fuse, fused_block, fused_tensors, taken_apart
from common.fda.matching import matching_loss
from common.io.checkpoints import read_header
from common.opening import open_experiment
from common.pipeline import adapt, construct, matching_problems
from helpers import change, read
from NLG import domain as nlg
from NLU import domain as nlu
from pico_hf_vision import pico_hf_config
from pico_layouts import write_both
from Vision import domain


@pytest.fixture
def both(tmp_path, pico_inputs):
    """Configs of one experiment: models in transformers' layout, with q, k and v fused; and in open_clip's."""
    write_both(tmp_path)
    hf = change(pico_hf_config(tmp_path / "hf", pico_inputs / "data"), "model", fuse_qkv=True)
    hf = change(change(hf, "run", score=False), "anchors", steps=20)
    model = replace(hf.model, root=str(tmp_path / "open_clip"), fuse_qkv=False)
    return hf, replace(change(hf, "run", root=str(tmp_path / "runs-of-open-clip")), model=model)


def test_anchors_are_those_of_the_layout_that_has_one_tensor(both):
    """Of transformers' CLIP with fuse_qkv and of the same weights in open_clip: the same beginning, losses, anchors."""
    found = []
    for config in both:
        construct(config, domain)
        files = sorted((config.run.dir / "anchors").rglob("*.safetensors"))
        found.append([(file.name, read(file, "anchors"), read_header(file)) for file in files])
    assert len(found[0]) == len(found[1]) == 4
    for (name, ours, header), (other, theirs, head) in zip(*found, strict=True):
        assert name == other and len(header["losses"]) == 12
        assert header["trace"][-1] < header["trace"][0]
        assert header["trace"] == pytest.approx(head["trace"], abs=1e-4)
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("skip", [True, False])
def test_a_loss_is_that_of_plain_autograd_over_the_rows_of_all_three(both, skip):
    config = change(both[0], "anchors", skip_null_gradients=skip)
    experiment = open_experiment(config, domain)
    theta_0, theta_t = (experiment.read_block(c, 0) for c in (experiment.base, experiment.experts["MNIST"]))
    (problem,) = matching_problems(experiment, 0, theta_0, {"MNIST": theta_t})
    x_ATD, block = torch.randn(3, 5, 16), experiment.functions[0]
    leaves = {name: p.clone().requires_grad_() for name, p in theta_0.items()}
    y, target = block(leaves, x_ATD), block(theta_t, x_ATD).detach()
    loss = (1 - F.cosine_similarity(y.flatten(1), target.flatten(1), dim=1)).sum()
    g = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    losses = dict(zip(problem.tau, matching_loss(problem, x_ATD).tolist(), strict=True))
    assert len(losses) == 12
    names = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    tau = torch.cat([theta_t[name] - theta_0[name] for name in names])
    cosine = F.cosine_similarity(torch.cat([g[name] for name in names]).flatten(), tau.flatten(), dim=0).item()
    assert losses["self_attn.in_proj_weight"] == pytest.approx(1 + cosine, abs=1e-5)
    assert bool(problem.tau["self_attn.in_proj_bias"][16:32].any()) is not skip


def test_what_is_fused_is_taken_apart_again_and_computes_the_same():
    theta = {f"attention.self.{m}.{t}": torch.randn(*s) for m, r in (("query", 4), ("key", 2), ("value", 2))
             for t, s in (("weight", (r, 3)), ("bias", (r,)))} | {"attention.self.norm": torch.randn(3)}  # fmt: skip
    del theta["attention.self.key.bias"]
    fused = fused_tensors(theta | {"key.weight": torch.zeros(1)})
    whole = fuse(theta, fused)
    assert {name: tuple(t.shape) for name, t in whole.items()} == {
        "attention.self.in_proj_bias": (6,), "attention.self.in_proj_weight": (8, 3), "attention.self.norm": (3,),
    }  # fmt: skip
    torch.testing.assert_close(taken_apart(whole, fused), theta, rtol=0, atol=0)
    block = fused_block(lambda params, x: x + sum(t.sum() for t in params.values()), fused)
    torch.testing.assert_close(block(whole, torch.zeros(1)), sum(t.sum() for t in theta.values())[None])


def test_anchors_say_whether_they_were_made_fused(both):
    config, _ = both
    construct(config, domain)
    file = next((config.run.dir / "anchors").rglob("*.safetensors"))
    assert read_header(file)["model"]["fuse_qkv"] is True
    adapt(config, domain)
    apart = change(config, "model", fuse_qkv=False)
    with pytest.raises(InputError, match="was made with weights.base = "):
        construct(apart, domain)
    for label in ("", "apart"):  # of a model that is there, and of one that is not
        with pytest.raises(InputError, match="was made with model.fuse_qkv = True, now it is None"):
            adapt(change(apart, "adapt", label=label), domain)


def test_tasks_together_are_those_one_by_one(both):
    config, _ = both
    construct(config, domain)
    together = change(change(config, "run", name="together"), "anchors", together="eager")
    construct(together, domain)
    for file in (config.run.dir / "anchors").rglob("*.safetensors"):
        other = together.run.dir / file.relative_to(config.run.dir)
        torch.testing.assert_close(read(file, "anchors"), read(other, "anchors"), atol=1e-4, rtol=1e-4)


def test_encoders_of_text_have_it_too_and_others_are_refused(nlu_config, nlg_config, pico_config):
    construct(change(nlu_config, "model", fuse_qkv=True), nlu)
    file = next((nlu_config.run.dir / "anchors").rglob("*.safetensors"))
    assert len(read_header(file)["losses"]) == 12  # of 16 tensors
    with pytest.raises(InputError, match="model.fuse_qkv: visual.transformer.resblocks.0 has no q, k and v in tensors"):
        construct(change(pico_config, "model", fuse_qkv=True), domain)
    with pytest.raises(InputError, match=r"model.fuse_qkv: model.layers.0.mlp has no q, k and v in"):
        construct(change(nlg_config, "model", fuse_qkv=True), nlg)
