"""Both boxes on language models: starts, chunks of anchors, resuming to the same bytes, and the plan of the paper."""

import pkgutil
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.command import parse
from common.config import ROOT
from common.core import notices
from common.core.blocks import BlockFamily
from common.core.errors import InputError
from common.core.task_vectors import subtract
from common.evaluation.scoring import score_run
from common.fda.matching import MatchingProblem, matching_gradient
from common.io.checkpoints import Checkpoint
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import describe
from helpers import change, files_of, read
from NLG import domain
from pico_nlg import (
    EMBEDDING,
    HEAD,
    NORM,
    PICO_TASKS,
    pico_model,
)


def test_every_start_gives_a_checkpoint(nlg_config):
    construct(nlg_config, domain)
    for start in ("pretrained", "average", "ta", "tsv", "wudi"):
        folder = adapt(change(nlg_config, "start", method=start), domain)
        assert AutoModelForCausalLM.from_pretrained(folder)(torch.arange(9)[None]).logits.isfinite().all()


def test_task_arithmetic_by_hand(nlg_config):
    """θ₀ + ½(τ₁ + τ₂) for every tensor, rows that the base lacks filled with the mean of its others."""
    folder = merge_alone(nlg_config, domain)
    base = AutoModelForCausalLM.from_pretrained(nlg_config.model.path("base")).state_dict()
    experts = [
        AutoModelForCausalLM.from_pretrained(nlg_config.model.path("expert", t)).state_dict() for t in PICO_TASKS
    ]
    for name in (EMBEDDING, HEAD):
        base[name] = torch.cat([base[name], base[name].mean(0, keepdim=True)])
    for name, theta_0 in base.items():
        expected = theta_0 + 0.5 * sum(expert[name] - theta_0 for expert in experts)
        torch.testing.assert_close(read(folder, name), expected, msg=name)


def test_models_that_are_one_are_named_and_the_merge_goes_on(nlg_config, tmp_path, monkeypatch, capsys):
    """The same path is seen as the models are opened, a copy as their bytes are hashed."""
    base, math = (str(nlg_config.model.path(*which)) for which in (("base",), ("expert", "math")))
    copy = str(shutil.copytree(base, tmp_path / "copy"))

    def said(run, **experts):
        monkeypatch.setattr(notices, "_said", set())
        merge_alone(change(change(nlg_config, "model", experts=experts), "run", name=run), domain)
        return [line for line in capsys.readouterr().err.splitlines() if "are one model" in line]

    (twice,) = said("twice", code=math)
    assert "the expert of math and the expert of code are one model, so that one task vector counts twice" in twice
    (nothing,) = said("nothing", code=copy)
    assert nothing.startswith("warning: the base and the expert of code are one model, so that its task vector is zero")
    assert said("each") == []


def test_only_the_mlps_are_adapted_and_the_rest_is_the_starts(nlg_config):
    construct(nlg_config, domain)
    start, adapted = (Checkpoint(f(nlg_config, domain)) for f in (merge_alone, adapt))
    changed = {n for n in start.names() if not torch.equal(start.read([n])[n], adapted.read([n])[n])}
    assert changed == {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (0, 1) for m in ("gate", "up", "down")}
    base = Checkpoint(adapt(change(nlg_config, "adapt", rest="pretrained", label="base"), domain))
    torch.testing.assert_close(base.read([NORM])[NORM], read(nlg_config.model.path("base"), NORM))


def test_every_weight_is_read_once_in_a_stage(nlg_config, monkeypatch):
    reads = Counter()
    plain = Checkpoint.read

    def counting(self, names):
        names = list(names)
        reads.update((self.path, name) for name in names)
        return plain(self, names)

    monkeypatch.setattr(Checkpoint, "read", counting)
    mlps, tensors = 2 * 3, 2 * 9 + 3
    for stage, expected in [(construct, 3 * mlps), (merge_alone, 3 * tensors)]:
        stage(nlg_config, domain)
        assert set(reads.values()) == {1} and len(reads) == expected
        reads.clear()
    adapt(nlg_config, domain)  # base, experts and start for the blocks, the start for the rest, the adapted blocks
    assert set(reads.values()) == {1} and len(reads) == 4 * mlps + (tensors - mlps) + mlps


def test_a_start_made_elsewhere_is_taken(nlg_config, tmp_path):
    construct(nlg_config, domain)
    expected = files_of(adapt(nlg_config, domain))
    shutil.copytree(nlg_config.run.dir / "merged" / "ta", tmp_path / "elsewhere")
    shutil.rmtree(nlg_config.run.dir / "merged")
    given = change(nlg_config, "start", checkpoint=str(tmp_path / "elsewhere"))
    found = files_of(adapt(given, domain))
    assert not (nlg_config.run.dir / "merged" / "ta").exists()
    assert {n: b for n, b in found.items() if n.endswith("safetensors")} == {
        n: b for n, b in expected.items() if n.endswith("safetensors")
    }
    with pytest.raises(InputError, match="start.checkpoint needs start.method to name it"):
        adapt(change(given, "start", method="pretrained"), domain)
    score_run(change(given, "start", method="dare"), domain)  # of any name
    assert "DARE" in (nlg_config.run.dir / "table.md").read_text()
    with pytest.raises(InputError, match=r"there is no checkpoint at .*nowhere"):
        adapt(change(nlg_config, "start", checkpoint="nowhere"), domain)


def test_a_coefficient_for_each_task_or_for_their_sum(nlg_config):
    construct(nlg_config, domain)
    one, two = (
        Checkpoint(adapt(change(nlg_config, "adapt", per_task=per_task, label=str(per_task)), domain)).read_under("")
        for per_task in (False, True)
    )
    assert any(not torch.equal(one[n], two[n]) for n in one)
    still = change(change(nlg_config, "adapt", lr=1e-12, label="still"), "start", method="ta")
    ta = Checkpoint(merge_alone(nlg_config, domain)).read_under("")
    for per_task in (False, True):  # both begin at task arithmetic
        folder = adapt(change(still, "adapt", per_task=per_task, label=f"still {per_task}"), domain)
        for name, theta in Checkpoint(folder).read_under("").items():
            torch.testing.assert_close(theta, ta[name])


def test_released_anchors_of_two_axes_are_used_in_place(nlg_config, tmp_path):
    for task in PICO_TASKS:
        (tmp_path / "released" / task).mkdir(parents=True)
        for layer in (1, 2):
            x_AD = np.random.default_rng(layer).normal(size=(12, 16)).astype(np.float32)
            np.save(tmp_path / "released" / task / f"dual_anchors_layer_{layer}.npy", x_AD)
    adapt(change(nlg_config, "anchors", source=str(tmp_path / "released")), domain)
    np.save(tmp_path / "released" / "code" / "dual_anchors_layer_2.npy", np.ones((12, 1, 16), np.float32))
    with pytest.raises(InputError, match=r"layer_2.npy holds anchors of shape \(12, 1, 16\); 2 axes with width 16"):
        again = change(nlg_config, "anchors", source=str(tmp_path / "released"))
        adapt(change(again, "adapt", label="again"), domain)


@pytest.mark.parametrize("distance", ["cos", "mse"])
@pytest.mark.parametrize("chunk", [1, 4, 5, 9, 10])
def test_the_gradient_in_chunks_is_the_whole_one(distance, chunk):
    torch.manual_seed(0)
    module = pico_model("llama").model.layers[0].mlp.double()
    block = BlockFamily(blocks="model.layers").pure(module)
    theta_0 = dict(module.named_parameters())
    theta_t = {n: p + 0.1 * torch.randn_like(p) for n, p in theta_0.items()}
    x_ATD = torch.randn(9, 1, 16, dtype=torch.float64)
    setting = MatchingProblem(block, theta_0, theta_t, subtract(theta_t, theta_0)), x_ATD
    expected = matching_gradient(*setting, distance=distance)
    found = matching_gradient(*setting, distance=distance, chunk=chunk)
    assert expected[1].abs().max() > 1e-6
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


def test_anchors_made_in_chunks_are_equal_to_rounding_and_need_no_new_run(nlg_config):
    construct(nlg_config, domain)
    before = files_of(nlg_config.run.dir / "anchors")
    construct(change(nlg_config, "anchors", chunk=5), domain)  # kept: the chunk is no part of what they are
    assert files_of(nlg_config.run.dir / "anchors") == before
    construct(change(change(nlg_config, "anchors", chunk=5), "run", name="chunks"), domain)
    for name in before:
        one, two = (read(nlg_config.run.dir.with_name(run) / "anchors" / name, "anchors") for run in ("pico", "chunks"))
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def dying(monkeypatch, where, survived):
    """Let a function go through so many times and then be interrupted."""
    plain, calls = pkgutil.resolve_name(where), iter(range(99))

    def function(*args, **kwargs):
        if next(calls) == survived:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(where, function)


def test_interrupted_anywhere_it_goes_on_and_ends_with_the_same_bytes(nlg_config, monkeypatch):
    monkeypatch.setattr("common.io.shards.stage_shards.__defaults__", (4000,))  # several shards
    alone, stopped = (change(nlg_config, "run", name=name) for name in ("alone", "stopped"))
    for stage in (construct, merge_alone, adapt):
        stage(alone, domain)
    moments = {
        construct: [("common.pipeline.save_anchors", 1), ("common.pipeline.save_anchors", 2)],
        merge_alone: [
            ("common.io.shards.write_stored", 2),
            ("common.io.shards.os.replace", 1),
            ("common.io.shards.write_text", 0),
            ("common.assembly.write_text", 0),
        ],
        adapt: [
            ("common.pipeline.write_tensors", 1),
            ("common.io.shards.write_stored", 1),
            ("NLG.export.link_weights", 0),
            ("common.assembly.shutil.rmtree", 0),
        ],
    }
    for stage, blows in moments.items():
        for where, survived in blows:
            with monkeypatch.context() as patch:
                dying(patch, where, survived)
                with pytest.raises(KeyboardInterrupt):
                    stage(stopped, domain)
            whole = list((stopped.run.dir / "merged").glob("*/provenance.json"))
            assert all(len(Checkpoint(file.parent).shapes) == 21 for file in whole)
        stage(stopped, domain)
    assert len(list((alone.run.dir / "merged" / "ta").glob("*.safetensors"))) > 2
    for folder in ("anchors", "merged"):
        assert files_of(alone.run.dir / folder) == files_of(stopped.run.dir / folder)


def test_a_second_run_touches_nothing(nlg_config):
    times = []
    for _ in range(2):
        construct(nlg_config, domain)
        adapt(nlg_config, domain)
        times.append({f: f.stat().st_mtime_ns for f in sorted(nlg_config.run.dir.rglob("*.safetensors"))})
    assert times[0] == times[1] and len(times[0]) == 4 + 2 * 2


def test_other_output_than_before_is_refused_by_field(nlg_config):
    merge_alone(nlg_config, domain)
    for field, value in {"dtype": "float16", "vocabulary": "base", "tokenizers": ()}.items():
        with pytest.raises(InputError, match=rf"provenance.json was made with inputs\.model\.{field} = "):
            merge_alone(change(nlg_config, "model", **{field: value}), domain)


def paper_plan(*arguments):
    file = str(ROOT / "configs/nlg/llama2_13b.yaml")
    return describe(parse("", ["--config", file, "--model.root", "/nowhere", *arguments]), domain).text


def test_the_paper_config_is_planned_without_any_file():
    text = paper_plan()
    for line in (
        "MISSING    base: there is no checkpoint at /nowhere/Llama-2-13b-hf",
        "40 x model.layers.N.mlp, 3 tensors, 810 MiB; anchored part mlp; D 5120",
        "8192 x 1 x 5120, 160.0 MiB",
        "80 units of 200 steps",
        "12.50 GiB",  # of anchors
        "24.24 GiB a model in torch.float16",  # 13.0 G weights
        "40 units of 50 epochs, 16384 anchors each",
    ):
        assert line in text


def test_chunks_take_less_memory_and_more_work_in_the_plan():
    def numbers(*arguments):
        text = paper_plan(*arguments)
        memory = float(text.split("construct, memory  about ")[1].split()[0])
        return memory, float(text.split("steps, ")[1].split()[0])

    (whole, fewer), (chunked, more) = numbers(), numbers("--anchors.chunk", "512")
    assert chunked < 0.6 * whole and fewer < more < 2 * fewer
