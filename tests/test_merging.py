"""Merging: the identities that methods promise, and the door. Formulas: test_merging_formulas.py."""

import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from common import start
from common.config import ROOT
from common.core.annotations import is_of
from common.core.errors import InputError
from common.core.task_vectors import LazyParams, subtract
from common.io.checkpoints import Checkpoint
from common.merging.registry import METHODS, STEPS, Method, every_row, hyperparameters, method_table
from common.merging.starts import check_hyper, check_hyper_of, merge, survey
from common.merging.tensorwise import each_tensor, thirds_of, total
from common.pipeline import merge_alone
from common.planning.dry_run import describe
from common.planning.merging import memory_of_merge, tensors_held
from helpers import assert_close, change, files_of
from pico_nlg import pico_architecture, pico_tokenizer, save
from pico_task_vectors import MATRICES, SHAPES, task_vectors
from Vision import domain

WITHOUT_DATA = {name: method for name, method in METHODS.items() if not method.data}

DEFAULTS = {
    "average": {"metrics": None, "power": 1.0},
    "slerp": {"t": 0.5, "linear_above": 0.9995, "of_task_vectors": False},
    "layer_swap": {"outer": 0, "bottom": 5, "top": 2, "transition": 1, "unnumbered": "mean"},
    "ta": {"scale": 0.3},
    "rws": {"clean": 0, "scale": None, "keep": None},
    "ties": {"density": 0.2, "scale": 1.0, "granularity": "model"},
    "dare_ta": {"drop": 0.9, "scale": 0.3, "seed": 0},
    "dare_ties": {"drop": 0.9, "density": 0.2, "scale": 1.0, "seed": 0},
    "breadcrumbs": {"keep": 0.15, "outliers": 0.006, "scale": 0.2},
    "pcb": {"ratio": 0.05, "clip": 1e-4, "scale": 1.2, "granularity": "model"},
    "sce": {"select": 0.1, "masked": False},
    "varm": {},
    "consensus_ta": {"agree": 2, "threshold": 0.4, "scale": 0.3},
    "tsv": {"rank_fraction": None, "scale": 1.0, "others": None},
    "dc_merge": {"keep": 1e-3, "rank": None, "smooth": "no", "scale": 1.0, "others": None},
    "star": {"share": 0.4, "scale": 1.0, "others": None},
    "cart": {"rank_fraction": 0.16, "scale": 2.3, "others": None},
    "iso_c": {"scale": 1.0, "others": None},
    "iso_cts": {"common_fraction": 0.8, "scale": 1.0, "others": None},
    "wudi": {"lr": 1e-5, "steps": 300, "scale": 1.0, "others": 0.0},
    "wudi_exact": {"rtol": None, "normalize": True, "density": 1.0, "scale": 1.0, "others": 0.0},
    "swudi": {"time": 1300.0, "share": 0.65, "scale": 1.0, "others": 0.0},
    "swudi_a": {"rank": "energy", "scale": 1.0, "others": 0.0},
    "optmerge": {"lr": 1e-5, "steps": 300, "adapters": False, "scale": 1.0, "others": None},
    "actmat": {"longest": 20000, "scale": 1.0, "others": None},
    "tact": {"density": 0.5, "longest": 20000, "scale": 1.0, "others": None},
    "ace": {"epsilon": 1e-2, "uneven": 0.3, "share": 0.3, "scale": 1.0, "others": None},
    "doge_ta": {
        "eta": 0.07,
        "subspace": 6,
        "density": 0.3,
        "steps": 400,
        "lr": 1e-4,
        "others": 0.0,
        "granularity": "model",
    },
    "opcm": {"alpha": 0.5, "granularity": "model"},
    "widen": {"ratio": 1.0, "calibration": 1.0},
}

# Whether queries, keys and values of a fused matrix are taken apart, by default as in the authors' code.
WHOLE = ["tsv", "dc_merge", "star", "cart", "iso_c", "iso_cts"]
WHOLE += ["wudi", "wudi_exact", "swudi", "swudi_a", "ace", "doge_ta"]
SPLIT = dict.fromkeys(WHOLE, False) | dict.fromkeys(["optmerge", "actmat", "tact"], True)
for split_method, apart in SPLIT.items():
    DEFAULTS[split_method]["split_qkv"] = apart

# With these hyperparameters one task is merged into its expert, but for what is no matrix in WUDI.
# SLERP and layer swapping take two; PCB, Iso, DOGE and ACE change even a single task vector.
KEEPS_ONE_TASK = {
    "average": {},
    "ta": {"scale": 1.0},
    "ties": {"density": 1.0},
    "dare_ta": {"drop": 0.0, "scale": 1.0},
    "dare_ties": {"drop": 0.0, "density": 1.0},
    "breadcrumbs": {"keep": 1.0, "outliers": 0.0, "scale": 1.0},
    "consensus_ta": {"agree": 1, "scale": 1.0},
    "tsv": {},
    "wudi": {},
    "wudi_exact": {},
    "swudi": {},
    "swudi_a": {},
    "optmerge": {},
    "actmat": {},
    "tact": {"density": 1.0},
    "opcm": {},
    "widen": {},
    "rws": {},
    "sce": {},
    "varm": {},
    "dc_merge": {"keep": 1.0},
    "star": {"share": 1.0},
    "cart": {},
}
ROUNDED = {"tsv", "wudi_exact", "swudi", "swudi_a", "actmat", "tact", "dc_merge", "star", "opcm"}

# With these, three copies of an expert (two of TWO) are merged into it. WIDEN adds up columns that matter to several.
KEEPS_IDENTICAL = {
    "average": {},
    "slerp": {"t": 0.3},
    "ta": {"scale": 1 / 3},
    "ties": {"density": 1.0},
    "dare_ta": {"drop": 0.0, "scale": 1 / 3},
    "dare_ties": {"drop": 0.0, "density": 1.0},
    "breadcrumbs": {"keep": 1.0, "outliers": 0.0, "scale": 1 / 3},
    "consensus_ta": {"scale": 1 / 3},
    "tsv": {"rank_fraction": 1.0},
    "wudi_exact": {},
    "actmat": {},
    "tact": {"density": 1.0},
    "opcm": {"granularity": "tensor"},
    "layer_swap": {},
    "rws": {},
    "sce": {},
    "varm": {},
    "star": {"share": 1.0},
    "cart": {},
}

TWO = {"slerp", "layer_swap"}  # take two tasks
# OPCM is sequential; DARE's masks, and the expert that is patched or outside, belong to places in the list
ORDERED = {"opcm", "dare_ta", "dare_ties", "rws", "layer_swap"}


def some_tasks(method, tasks, **settings):
    return task_vectors(2 if method in TWO else tasks, **settings)


# --- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", KEEPS_ONE_TASK)
def test_one_task_gives_its_task_vector(method):
    base, deltas = task_vectors(1)
    merged = merge(method, base, deltas, KEEPS_ONE_TASK[method])
    for name in MATRICES if "wudi" in method else SHAPES:
        assert_close(merged[name], deltas[0][name], rtol=0, atol=1e-7 if method in ROUNDED else 0)


@pytest.mark.parametrize("method", KEEPS_IDENTICAL)
def test_identical_experts_give_that_expert(method):
    base, (tau,) = task_vectors(1)
    merged = merge(method, base, [tau] * (2 if method in TWO else 3), KEEPS_IDENTICAL[method])
    for name in MATRICES if method == "wudi_exact" else SHAPES:
        assert_close(merged[name], tau[name], rtol=0, atol=1e-7)


def test_identical_experts_are_where_wudi_goes():
    """On orthonormal columns, where Gᵢ = I/4 and Adam meets a plain bowl; it starts at three times the expert."""
    base, (tau,) = task_vectors(1, {"w": (6, 4)}, size=1.0, dtype=torch.float64)
    expert = {"w": torch.linalg.qr(tau["w"]).Q}
    assert_close(merge("wudi", base, [expert] * 3, {"lr": 1e-2, "steps": 2000})["w"], expert["w"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", sorted(WITHOUT_DATA.keys() - ORDERED))
def test_the_order_of_the_tasks_does_not_matter(method):
    base, deltas = some_tasks(method, 4, dtype=torch.float64)
    merged, turned = merge(method, base, deltas, {}), merge(method, base, deltas[1:] + deltas[:1], {})
    for name in SHAPES:
        assert_close(merged[name], turned[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_zero_task_vectors_give_zeros_without_a_decomposition(method, monkeypatch):
    for decomposition in ("svd", "pinv", "eigh"):
        monkeypatch.setattr(torch.linalg, decomposition, lambda *_, **__: pytest.fail("of zeros"))
    base, deltas = some_tasks(method, 3, size=0.0)
    for tensor in merge(method, base, deltas, {}).values():
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize(
    ("method", "hyper"),
    [
        ("ta", {}),
        ("ties", {}),
        ("dare_ta", {}),
        ("breadcrumbs", {}),
        ("consensus_ta", {}),
        ("sce", {"select": 1.0}),
        ("varm", {}),
        ("actmat", {}),
        ("tact", {}),
        ("tsv", {"rank_fraction": 1 / 3}),
        ("iso_c", {}),
        ("wudi", {}),
        ("wudi_exact", {}),
        ("doge_ta", {"steps": 20}),
    ],
)
def test_a_task_of_zeros_changes_nothing(method, hyper):
    base, deltas = task_vectors(2)
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    merged, with_zero = merge(method, base, deltas, hyper), merge(method, base, [*deltas, zero], hyper)
    for name in MATRICES:
        assert_close(merged[name], with_zero[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_awkward_task_vectors_give_finite_numbers_of_their_type(method, dtype):
    """Rank 1, equal, opposite, zero, sparse; one row, one column, one weight; a base of zeros."""
    base, (tau, other) = task_vectors(2, {"w": (6, 5), "row": (1, 5), "column": (6, 1), "one": (1, 1)}, dtype=dtype)
    low = {name: x[:, :1] @ x[:1] for name, x in tau.items()}
    zero = {name: torch.zeros_like(x) for name, x in tau.items()}
    sparse = {name: 0.1 * (x == x.max()).to(dtype) for name, x in tau.items()}
    opposite = {name: -x for name, x in tau.items()}
    hyper = {"steps": 20} if "steps" in hyperparameters(method) else {}
    pairs = [low, low], [tau, opposite], [tau, zero], [sparse, low], [zero, sparse]
    for deltas in pairs if method in TWO else (*pairs, [low, opposite, other, sparse]):
        for theta in (base, zero):
            for name, tensor in merge(method, theta, deltas, hyper).items():
                assert tensor.isfinite().all() and tensor.shape == theta[name].shape and tensor.dtype == dtype


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_any_part_of_a_model_merges_alone_and_leaves_its_input_untouched(method):
    base, deltas = some_tasks(method, 3)
    copies = [{name: tensor.clone() for name, tensor in delta.items()} for delta in (base, *deltas)]
    whole, surveyed = merge(method, base, deltas, {}), survey(method, lambda: [(base, deltas)], {})
    assert whole.keys() == base.keys()
    for name in SHAPES:
        alone = merge(method, {name: base[name]}, [{name: delta[name]} for delta in deltas], {}, surveyed)
        assert alone.keys() == {name} and torch.equal(alone[name], whole[name])
        assert all(torch.equal(x[name], copy[name]) for x, copy in zip((base, *deltas), copies, strict=True))
        assert all(whole[name].data_ptr() != delta[name].data_ptr() for delta in deltas)


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_half_precision_comes_out_as_float32(method):
    base, deltas = some_tasks(method, 3, dtype=torch.bfloat16)
    merged = merge(method, base, deltas, {})
    wide = merge(method, base, [{name: tensor.float() for name, tensor in delta.items()} for delta in deltas], {})
    for name in SHAPES:
        assert merged[name].dtype == torch.float32 and torch.equal(merged[name], wide[name])


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_trainable_parameters_merge_without_a_graph(method):
    base, deltas = task_vectors(2)
    deltas = [{name: torch.nn.Parameter(tensor) for name, tensor in delta.items()} for delta in deltas]
    assert not any(tensor.requires_grad for tensor in merge(method, base, deltas, {}).values())


@pytest.mark.parametrize("method", SPLIT)
def test_a_fused_projection_is_taken_apart_if_asked(method):
    """As three matrices are that bear names of their own, and no other matrix; else it is one matrix."""
    base, deltas = task_vectors(3, {"attn.in_proj_weight": (21, 7), "mlp.c_fc.weight": (21, 7)})
    thirds = []
    for delta in (base, *deltas):
        thirds.append({f"{name}.{k}": part for name, x in delta.items() for k, part in enumerate(x.chunk(3))})
    hyper = {"steps": 3} if "steps" in hyperparameters(method) else {}
    hyper |= {"granularity": "tensor"} if "granularity" in hyperparameters(method) else {}
    split, whole = (merge(method, base, deltas, hyper | {"split_qkv": apart}) for apart in (True, False))
    alone = merge(method, thirds[0], thirds[1:], hyper)
    fused = "attn.in_proj_weight"
    assert_close(split[fused], torch.cat([alone[f"{fused}.{k}"] for k in range(3)]), atol=1e-9)
    assert torch.equal(split["mlp.c_fc.weight"], whole["mlp.c_fc.weight"])
    assert not torch.allclose(split[fused], whole[fused], rtol=1e-3, atol=1e-6)


# --- memory ----------------------------------------------------------------------------------------------------------


def lazily(deltas, alive):
    """Task vectors made anew at each access; `alive` has a weak reference to every tensor that was made."""

    def of(delta):
        def make(name):
            alive.append(weakref.ref(tensor := delta[name].clone()))
            return tensor

        return LazyParams(delta, make)

    return [of(delta) for delta in deltas]


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_task_vectors_may_be_made_when_they_are_asked_for(method):
    base, deltas = some_tasks(method, 4)
    whole, made = merge(method, base, deltas, {}), []
    for name, tensor in merge(method, base, lazily(deltas, made), {}).items():
        assert torch.equal(tensor, whole[name])
    assert made and not any(ref() is not None for ref in made)


@pytest.mark.parametrize("method", [method for method, row in METHODS.items() if row.by_weight])
def test_rows_of_a_method_by_weight_are_those_of_the_whole(method):
    """Bit by bit, though the last numbers of a tensor take another path through a kernel than those before them."""
    whole = merge(method, *(tasks := some_tasks(method, 3)), {})
    surveyed = survey(method, lambda: [tasks], {})
    for rows in (slice(0, 1), slice(1, 4), slice(4, None)):
        thetas = (tasks[0], *tasks[1])
        base, *deltas = ({name: tensor[rows] for name, tensor in theta.items() if tensor.ndim} for theta in thetas)
        for name, tensor in merge(method, base, deltas, {}, surveyed).items():
            assert torch.equal(tensor, whole[name][rows])


@pytest.mark.parametrize("method", ["ties", "dare_ta", "dare_ties", "slerp", "average"])
def test_pieces_change_no_byte(method, monkeypatch):
    base, deltas = some_tasks(method, 2)
    whole = merge(method, base, deltas, {})
    monkeypatch.setattr("common.merging.tensorwise.UNDIVIDED", 1)
    monkeypatch.setattr("common.merging.tensorwise.CACHED", 7)
    for name, tensor in merge(method, base, deltas, {}).items():
        assert torch.equal(tensor, whole[name])


@pytest.mark.parametrize("method", sorted(WITHOUT_DATA.keys() - {*TWO, "doge_ta", "iso_cts", "tsv", "dc_merge"}))
def test_more_tasks_take_no_more_memory(method):
    """DOGE-TA holds all tasks; TSV, Iso-CTS and DC-Merge hold their leading components."""
    few, many = (tensors_held(method, {}, tasks, (96, 48)) for tasks in (3, 9))
    assert max(many) < max(few) + 0.3


def test_what_a_method_holds_is_counted(monkeypatch):
    class HoldsAll(Method):
        @property
        def function(self):
            return lambda base, deltas: each_tensor(lambda taus: total(list(taus)), base, deltas)

    monkeypatch.setitem(METHODS, "holds_all", HoldsAll("", "", ""))
    assert tensors_held("average", {}, 5, (96, 48)).merging == pytest.approx(3, abs=0.01)  # θ₀, the sum and one τ, or θ
    assert tensors_held("holds_all", {}, 5, (96, 48)).merging == pytest.approx(7, abs=0.01)  # θ₀, the sum and five τ
    assert tensors_held("iso_c", {}, 5, (48, 48)).merging > 7  # what a decomposition takes is among it
    for longest, shape in ((None, (30000, 48)), (96, (480, 96))):  # what is too long for a method is averaged
        hyper = {} if longest is None else {"longest": longest}
        assert tensors_held("actmat", hyper, 5, shape).merging == pytest.approx(3, abs=0.01)
        assert tensors_held("actmat", hyper, 5, (96, 48)).merging > 7


def test_the_dry_run_says_what_a_merge_holds(pico_config):
    def rows(method):
        plan = describe(replace(pico_config, start=replace(pico_config.start, method=method)), domain).text
        return re.findall(r"merge, memory.* on a CPU alone; (.*)", plan)

    (line,) = rows("average")
    assert re.fullmatch(r"average holds 3\.0 tensors like visual\.\S+ at once", line)
    (line,) = rows("doge_ta")
    assert float(re.fullmatch(r"doge_ta holds (\d+\.\d) tensors like visual.transformer\S+ at once", line)[1]) > 8
    assert rows("pretrained") == []


def test_a_tensor_without_weights_is_no_memory(pico_config):
    def said(shapes):
        config = change(pico_config, "start", method="average")
        return memory_of_merge(config, shapes, ("blocks.",), 0, lambda name: [slice(0, shapes[name][0])])

    assert said({"blocks.0.w": (8, 4), "blocks.0.empty": (0, 4)}) == said({"blocks.0.w": (8, 4)}) != {}


def test_the_dry_run_foresees_rows_where_they_are_merged_apart(pico_config, monkeypatch):
    """TIES looks through whole tensors before it merges some rows of each."""

    def held(method):
        plan = describe(replace(pico_config, start=replace(pico_config.start, method=method)), domain).text
        return re.search(r"merge, memory.* on a CPU alone; \w+ holds (.*) at once", plan)[1]

    monkeypatch.setattr("common.experiment.ROWS", 64)
    assert re.fullmatch(r"3\.0 times \d+ rows of visual\.\S+", held("average"))
    assert re.fullmatch(r"4\.0 tensors like visual\.\S+", held("ties"))
    assert re.fullmatch(r"\d+\.\d tensors like visual\.\S+", held("tsv"))


# --- whole checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_every_method_merges_a_checkpoint(method, pico_config):
    """Finite, complete, off the base; outside the blocks at the base where the method's paper says so."""
    hyper = {"steps": 3} if "steps" in hyperparameters(method) else {}
    start = replace(pico_config.start, method=method, hyper={method: hyper})
    config = replace(pico_config, start=start, run=replace(pico_config.run, score=False))
    merged, base = Checkpoint(merge_alone(config, domain)), Checkpoint(config.model.path("base"))
    assert merged.shapes == base.shapes
    moved = {name for name in base.names("visual.") if not torch.equal(*(c.read([name])[name] for c in (merged, base)))}
    assert "visual.transformer.resblocks.0.mlp.c_fc.weight" in moved
    assert ("visual.conv1.weight" in moved) == (METHODS[method].scope == "all")


@pytest.mark.parametrize("method", ["ta", "average", "ties", "ta+svc"])
def test_merged_by_rows_a_checkpoint_has_the_same_bytes(method, pico_config, monkeypatch):
    made, calls, merged = [], [], start.merged_tensor
    monkeypatch.setattr(start, "merged_tensor", lambda *given: calls.append(given) or merged(*given))
    counts = []
    for rows in (2**40, 50):
        monkeypatch.setattr("common.experiment.ROWS", rows)
        config = change(change(pico_config, "start", method=method, hyper={}), "run", name=str(rows), score=False)
        made.append(files_of(merge_alone(config, domain), "*.safetensors"))
        counts.append(len(calls) - sum(counts))
    assert made[0] == made[1] and (counts[1] > 2 * counts[0]) == (method != "ta+svc")


@pytest.mark.parametrize("method", ["ties", "pcb", "doge_ta", "opcm", "pact+ties"])
def test_what_counts_over_the_whole_model_does_so_in_a_checkpoint(method, pico_config):
    """Read tensor by tensor in several passes, a checkpoint is merged as the whole of it in memory is."""
    part = {"doge_ta": {"doge_ta": {"steps": 2}}}.get(method, {})
    config = replace(pico_config, start=replace(pico_config.start, method=method, hyper=part))
    merged = Checkpoint(merge_alone(replace(config, run=replace(config.run, score=False)), domain))
    base = Checkpoint(config.model.path("base"))
    experts = [Checkpoint(config.model.path("expert", task)) for task in config.tasks]
    names = base.names("visual.transformer.resblocks." if method == "doge_ta" else "visual.")
    theta = base.read(names)
    deltas = [subtract(expert.read(names), theta) for expert in experts]
    whole = merge(method, theta, deltas, part.get(method, {}))
    ours = merged.read(names)
    for name in names:
        torch.testing.assert_close(ours[name], theta[name] + whole[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "rows", "apart"),
    [
        ("visual.attn.in_proj_weight", 24, True),
        ("blocks.0.attn.qkv.weight", 24, True),
        ("attn.Wqkv.weight", 24, True),
        ("attn.Wqkv.weight", 12, False),  # keys and values of fewer heads than queries
        ("linear_attn.in_proj_qkv.weight", 24, False),  # values may be wider than queries and keys
        ("attention.wqkv.weight", 24, False),  # rows of queries, keys and values group by group
        ("mlp.weight", 24, False),
    ],
)
def test_only_equal_parts_of_a_fused_projection_are_taken_apart(name, rows, apart):
    expected = [slice(0, 8), slice(8, 16), slice(16, 24)] if apart else []
    assert thirds_of(name, torch.zeros(rows, 8)) == expected


MEASURED = """
import atexit, runpy, sys
sys.argv = sys.argv[1:]
atexit.register(lambda: print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STREAMED_TASKS = ["GSM8K", "MATH", "HumanEval", "MBPP"]


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """A Llama of 1 GB in float32 (MERGE_MB=250 for another size) and four experts; the largest tensor is a fifth."""
    root, size = tmp_path_factory.mktemp("streamed"), int(os.environ.get("MERGE_MB", "1000"))
    width = 64 * round((size / 1000) ** 0.5 * 24)
    config = pico_architecture(
        "llama", hidden_size=width, intermediate_size=8 * width // 3 // 64 * 64, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=8, head_dim=width // 8, vocab_size=21 * width,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for folder in ("base", *STREAMED_TASKS):
        save(model, pico_tokenizer(), root / folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
    yield root
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*WITHOUT_DATA, "ta+svc", "pact+ta"])
def test_a_checkpoint_streams_through_every_method(method, streamed, tmp_path):
    """At most 2.5 GB for a base and four experts of 1 GB, or what the dry run says. Steps are cut to two."""
    config = {
        "domain": "nlg",
        "model": {"root": str(streamed), "base": "base", "expert": "{task}"},
        "tasks": STREAMED_TASKS[:2] if method in TWO else STREAMED_TASKS,
        "start": {
            "method": method,
            "hyper": {part: {"steps": 2} if "steps" in hyperparameters(part) else {} for part in method.split("+")},
        },
        "run": {"root": str(tmp_path), "score": False, "device": "cpu"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-c", MEASURED, "scripts/merge.py", "--config", str(tmp_path / "config.yaml")]
    settings = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True, "check": True}
    plan = subprocess.run([*command, "--dry-run"], **settings).stdout
    libraries = int(plan.split()[-1])  # what a process occupies that has imported them
    foreseen = libraries + 2**30 * float(re.search(r"merge, memory.*; ([\d.]+) GiB on a CPU alone", plan)[1])
    began = time.monotonic()
    peak = int(subprocess.run(command, **settings).stdout.split()[-1])
    shutil.rmtree(tmp_path)
    took = time.monotonic() - began
    print(f"\n{method:14} {peak / 1e6:6.0f} MB at most, {foreseen / 1e6:6.0f} MB foreseen, {took:5.0f} s")
    assert peak < max(2.5e9, foreseen)
    assert abs(peak - foreseen) < 0.2 * (foreseen - libraries) + 0.1e9


# --- the door --------------------------------------------------------------------------------------------------------


def test_every_method_takes_its_hyperparameters_by_keyword_with_a_default():
    assert {
        method: {name: p.default for name, p in hyperparameters(method).items()} for method in WITHOUT_DATA
    } == DEFAULTS
    for method, hyper in DEFAULTS.items():
        check_hyper(method, hyper, tasks=2)


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_every_method_names_its_source(method):
    text = sys.modules[METHODS[method].function.__module__].__doc__
    assert "Source: " in text and re.search(r"arXiv \d{4}\.\d{5}", text)
    assert "Default" in text or "No hyperparameters" in text


@pytest.mark.parametrize(
    ("method", "hyper", "sentence"),
    [
        ("tis", {}, "unknown merge method 'tis': choose one of average, slerp, layer_swap, ta, "),
        ("tsv", {"rank": 3}, "tsv: unknown hyperparameter 'rank', accepted: rank_fraction, scale, others"),
        ("average", {"scale": 1.0}, "average: unknown hyperparameter 'scale', accepted: metrics, power"),
        ("ta", {"scale": "0.3"}, "ta: scale must be a number or a list of numbers, it is '0.3'"),
        ("ta", {"scale": [0.3, None]}, r"ta: scale must be a number or a list of numbers, it is \[0.3, None\]"),
        ("wudi", {"steps": 1.5}, "wudi: steps must be a whole number, it is 1.5"),
        ("wudi", {"steps": True}, "wudi: steps must be a whole number, it is True"),
        ("tsv", {"others": "mean"}, "tsv: others must be a number or null, it is 'mean'"),
        ("dc_merge", {"smooth": "line"}, "dc_merge: smooth must be 'no' or 'mean' or 'ramp', it is 'line'"),
        ("average", {"metrics": 0.5}, "average: metrics must be .*, it is 0.5"),
        ("slerp", {"of_task_vectors": 1}, "slerp: of_task_vectors must be true or false, it is 1"),
    ],
)
def test_names_and_types_are_refused_before_anything_is_loaded(method, hyper, sentence):
    with pytest.raises(InputError, match=sentence):
        check_hyper(method, hyper)


@pytest.mark.parametrize(
    ("method", "hyper", "sentence"),
    [
        ("ta", {"scale": [0.3, 0.3]}, "ta: scale lists 2 numbers, one for each of the 3 tasks is needed"),
        ("tsv", {"rank_fraction": 0.0}, r"tsv: rank_fraction must lie in \(0, 1\], it is 0.0"),
        ("tsv", {"rank_fraction": 8}, r"tsv: rank_fraction must lie in \(0, 1\], it is 8"),
        ("wudi", {"lr": 0}, "wudi: lr must be above 0 and steps at least 0, they are 0 and 300"),
        ("wudi", {"steps": -1}, "wudi: lr must be above 0 and steps at least 0, they are 1e-05 and -1"),
        ("wudi_exact", {"rtol": 1.0}, r"wudi_exact: rtol must lie in \[0, 1\), it is 1.0"),
        ("swudi", {"share": 0.0}, r"swudi: share must lie in \(0, 1\], it is 0.0"),
        ("swudi", {"time": -1.0}, "swudi: time must be at least 0, it is -1.0"),
        (
            "swudi_a",
            {"rank": "best"},
            "swudi_a: rank is one of energy, .*, not 'best'",
        ),
        ("slerp", {}, "slerp: it merges two models, there are 3 tasks"),
        ("layer_swap", {}, "layer_swap: it merges two models, there are 3 tasks"),
        ("average", {"metrics": [0.5, 0.5]}, r"average: metrics has a number above 0 for each of the 3 tasks, not \[0"),
        ("average", {"metrics": [1, 1, 0]}, "average: metrics has a number above 0"),
        ("average", {"power": -1}, "average: power -1 is of metrics, and there are none; leave it out, or give"),
        ("rws", {"clean": 3}, "rws: clean is the place of a task, 0 to 2, not 3"),
        ("rws", {"keep": -1}, "rws: keep must be at least 0, it is -1"),
        ("sce", {"select": 0}, r"sce: select must lie in \(0, 1\], it is 0"),
        ("dc_merge", {"keep": 0.0}, r"dc_merge: keep must lie in \(0, 1\], it is 0.0"),
        ("dc_merge", {"rank": 0}, "dc_merge: rank must be at least 1, it is 0"),
        ("star", {"share": 2}, r"star: share must lie in \(0, 1\], it is 2"),
        ("cart", {"rank_fraction": 0}, r"cart: rank_fraction must lie in \(0, 1\], it is 0"),
        ("optmerge", {"steps": -1}, "optmerge: lr must be above 0 and steps at least 0, they are 1e-05 and -1"),
        ("tact", {"density": 0}, r"tact: density must lie in \(0, 1\], it is 0"),
        ("ace", {"epsilon": 0}, "ace: epsilon above 0 and uneven of at least 0 are needed, they are 0 and 0.3"),
        ("wudi_exact", {"density": 0}, r"wudi_exact: density must lie in \(0, 1\], it is 0"),
        ("ties", {"density": 0}, r"ties: density must lie in \(0, 1\], it is 0"),
        ("dare_ta", {"drop": 1}, r"dare: drop must lie in \[0, 1\), it is 1"),
        ("dare_ties", {"density": 2.0}, r"ties: density must lie in \(0, 1\], it is 2.0"),
        ("breadcrumbs", {"outliers": 1.0}, r"breadcrumbs: outliers must lie in \[0, 1\), it is 1.0"),
        ("pcb", {"ratio": 0.0}, r"pcb: ratio must lie in \(0, 1\], it is 0.0"),
        ("consensus_ta", {"agree": 4}, "consensus_ta: agree must lie between 0 and the 3 tasks, it is 4"),
        ("iso_cts", {"common_fraction": 1.1}, r"iso_cts: common_fraction must lie in \[0, 1\], it is 1.1"),
        ("doge_ta", {"subspace": 0}, "doge_ta: subspace ≥ 1, steps ≥ 0, lr > 0 are needed; they are 0, 400, 0.0001"),
        ("opcm", {"alpha": -1}, r"opcm: alpha must lie in \(0, 1\], it is -1"),
    ],
)
def test_values_are_refused_once_the_number_of_tasks_is_known(method, hyper, sentence):
    with pytest.raises(InputError, match=sentence):
        check_hyper(method, hyper, tasks=3)


@pytest.mark.parametrize("part", every_row())
def test_no_hyperparameter_of_any_method_is_infinite_or_no_number(part):
    """Each that takes a number, and each that takes a list of them, by itself; the huge integer is none of floats."""
    for name, parameter in hyperparameters(part).items():
        for number, said in {math.nan: "is nan; it", math.inf: "is inf; it", 10**400: "is larger than any"}.items():
            for value, place in ((number, ""), ([0.5, number], "[1]")):
                if is_of(value, parameter.annotation):
                    with pytest.raises(InputError, match=re.escape(f"{part}: {name}{place} {said}")):
                        check_hyper_of(part, {name: value}, tasks=2)


def test_merge_refuses_no_task_other_tensors_and_values_not_finite():
    base, deltas = task_vectors(2, {"w": (2, 3)})
    with pytest.raises(InputError, match="average: at least one task"):
        merge("average", base, [], {})
    with pytest.raises(InputError, match="w: missing"):
        merge("average", base, [deltas[0], {}], {})
    with pytest.raises(InputError, match=r"w: \(3,\) against \(2, 3\)"):
        merge("average", base, [deltas[0], {"w": torch.zeros(3)}], {})
    deltas[1]["w"][0, 0] = torch.nan
    with pytest.raises(InputError, match="w: the task vector of task 2 of 2 holds NaN or infinite"):
        merge("average", base, deltas, {})


# --- rows of METHODS, and CONTRIBUTING.md -----------------------------------------------------------------------------


def test_labels_are_unique_ideas_have_six_words_and_files_exist():
    assert len({method.label for method in METHODS.values()}) == len(METHODS)
    for method in METHODS.values():
        assert 3 <= len(method.idea.split()) <= 6, method.idea
        assert method.file == Path(inspect.getfile(method.function)).relative_to(ROOT).as_posix()


def test_the_table_of_methods_has_a_row_for_each():
    head, *rows = method_table()
    assert len(rows) == len(METHODS) + len(STEPS) and {len(row) for row in rows} == {len(head)} == {4}
    assert ("TIES (`ties`)", METHODS["ties"].idea, "no", "[ties.py](ties.py)") in rows
    assert ("SVC (`…+svc`)", STEPS["svc"].idea, "no", "[svc.py](svc.py)") in rows
    assert ("Fisher (`fisher`)", METHODS["fisher"].idea, "train inputs", "[fisher.py](fisher.py)") in rows


ADDED = """
import json, torch
from common.core.errors import InputError
from common.evaluation.tables import table
from common.merging.starts import check_hyper, merge

base = {"w": torch.zeros(2, 2)}
deltas = [{"w": torch.tensor([[1.0, -4.0], [0.5, 2.0]])}, {"w": torch.tensor([[-3.0, 4.0], [0.25, -2.5]])}]
row = {"label": "", "init": None, "start": None, "task": "A", "value": 0.5}
scored = table([row | {"method": name} for name in ("widen", "magmax", "pretrained")], ["A"])
try:
    check_hyper("magmax", {"lam": 0.3})
except InputError as error:
    print(json.dumps([merge("magmax", base, deltas, {"scale": 2.0})["w"].tolist(), scored, str(error)]))
"""


def test_a_method_is_added_as_contributing_says(tmp_path):
    """In a copy of common/: its first code block as a new file, its second as one more line of METHODS."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    module, line = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len([part for part in module.splitlines() if part]) <= 25 and line.count("\n") == 1
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "common/merging/magmax.py").write_text(module)
    registry = tmp_path / "common/merging/registry.py"
    before = registry.read_text()
    registry.write_text(re.sub(r'(?m)^    "slerp": ', lambda found: line + found[0], before))
    assert registry.read_text().replace(line, "") == before != registry.read_text()
    done = subprocess.run([sys.executable, "-c", ADDED], cwd=tmp_path, capture_output=True, text=True, check=True)
    delta, scored, refusal = json.loads(done.stdout)
    assert delta == [[-6.0, -8.0], [1.0, -5.0]]
    assert re.findall(r"(?m)^\| (\w+)", scored) == ["Method", "Pretrained", "MagMax", "WIDEN"]
    assert refusal == "magmax: unknown hyperparameter 'lam', accepted: scale"
