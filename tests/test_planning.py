"""The plan on paper: what it says of two models beyond any machine here is what closed forms say."""

import json
import re

import pytest
import torch

from common.command import parse
from common.config import ROOT
from common.planning.cost import GIB, Ledger, Work, cost_of_step
from common.planning.dry_run import needs
from common.planning.on_paper import BANDWIDTH, LAUNCH, PEAK, SHARE, hours_of, work_of_fit
from NLG import domain

TASKS = 8
PRODUCTS = 23  # of a step in float32 on a gated MLP, see below
PER_PRODUCT = 2  # operations for each weight of a matrix and each anchor


def config_of(name):
    return parse("", ["--config", str(ROOT / "configs" / "nlg" / f"{name}.yaml")])


@pytest.fixture(scope="module", params=["llama2_70b", "mixture_35b"])
def planned(request):
    config = config_of(request.param)
    rows = (re.match(r"  (.{18}) (.*)", line) for line in needs(config, domain)[1:])
    return config, json.loads(config.model.arch), {row[1].strip(): row[2] for row in rows if row}


def blocks_of(sizes):
    """(number of blocks, weights of one)."""
    if "num_experts" in sizes:
        number = sizes["num_hidden_layers"] * (sizes["num_experts"] + 1)
        return number, 3 * sizes["hidden_size"] * sizes["moe_intermediate_size"]
    return sizes["num_hidden_layers"], 3 * sizes["hidden_size"] * sizes["intermediate_size"]


def test_a_llama_has_as_many_weights_as_its_sizes_say():
    """Embedding and head; queries and outputs, keys and values, an MLP and two norms a layer; a last norm."""
    layer = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    total = 2 * 32000 * 8192 + 80 * layer + 8192
    assert total == 68_976_648_192
    skeleton = domain.skeleton(config_of("llama2_70b").model)
    assert sum(p.numel() for p in skeleton.parameters()) == total


def test_a_mixture_has_as_many_weights_as_its_sizes_say():
    """Of 40 layers every fourth has full attention, with a gate beside its queries; the others have linear attention.

    There: projections of queries, keys and values, of their gate z, and of b and a; a convolution of four steps over
    the first three; a decay and its bias for each head of values; a norm; the way out.
    """
    width, keys, values = 2048, 16 * 128, 32 * 128
    full = width * 2 * 16 * 256 + 2 * width * 2 * 256 + 16 * 256 * width + 2 * 256
    linear = width * (2 * keys + values) + width * values + 2 * width * 32 + 4 * (2 * keys + values)
    linear += 2 * 32 + 128 + values * width
    mixture = 257 * 3 * width * 512 + 256 * width + width  # experts, the router, the gate of the shared one
    total = 2 * 248320 * width + 10 * full + 30 * linear + 40 * (mixture + 2 * width) + width
    skeleton = domain.skeleton(config_of("mixture_35b").model)
    assert sum(p.numel() for p in skeleton.parameters()) == total
    assert 34e9 < total < 36e9


def test_units_bytes_and_operations_are_those_of_the_closed_form(planned):
    config, sizes, rows = planned
    number, weights = blocks_of(sizes)
    units, anchors = number * TASKS, config.anchors.number * sizes["hidden_size"] * 4
    assert rows["construct"].startswith(f"{units} units of 200 steps, ")
    assert rows["construct, disk"] == f"{units * anchors / GIB:.2f} GiB"
    read, written = 9 * number * weights * 2 / GIB, units * anchors / GIB
    assert rows["moved"].startswith(f"construct reads {read:,.1f} GiB, writes {written:,.1f}; merge reads ")
    total = sum(p.numel() for p in domain.skeleton(config.model).parameters())
    assert rows["stored"].startswith(f"checkpoints {9 * total * 2 / GIB:,.1f} GiB, ")
    # adaptation in float32: 50 epochs, 7 products (3 forwards; of θ 3, of what lies within 1) of every anchor
    operations = number * 50 * TASKS * config.anchors.number * 7 * PER_PRODUCT * weights / 3
    hours = operations / (SHARE * PEAK["float32"]) / 3600
    said = float(re.search(r"arithmetic ([\d.e+]+),", rows["H100, adapt"])[1])
    assert said == pytest.approx(hours, rel=0.01)


def test_a_step_is_so_many_products(planned):
    """In float32, of a gated MLP y = W₃ h, h = s(W₁x) · W₂x, with γ for what comes back: γ_y, γ_h = W₃ᵀγ_y, γ₁, γ₂.

    As matching_gradient goes about it. induced_gradient: y of θ₀ and of θₜ, 3 + 3; the gradients γ_y hᵀ, γ₁ xᵀ, γ₂ xᵀ,
    3, and γ_h, 1. Of ⟨g, v⟩ by x: through each of the three gradients to its γ and to h or x, 2 + 2 + 2; through γ_h to
    γ_y alone, 1, as W₃ is held fixed; then γ_y hangs on both outputs, which lead to x by 3 + 3. With anchors.chunk
    summed_gradient goes through all chunks first, induced_gradient once more: 3 + 3 + 3 + 1.
    """
    assert PRODUCTS == (3 + 3) + (3 + 1) + (2 + 2 + 2 + 1 + 3 + 3)
    config, sizes, _ = planned
    _, weights = blocks_of(sizes)
    family = domain.family(config.model)
    module = family.modules(domain.skeleton(config.model))[0].module
    shape = (config.anchors.number, 1, sizes["hidden_size"])
    work, _ = cost_of_step(family.pure(module), module, shape, config, "float32")
    products = PRODUCTS + (3 + 3 + 3 + 1 if config.anchors.chunk else 0)
    assert work.operations == products * PER_PRODUCT * weights / 3 * shape[0]
    fit = work_of_fit(family.pure(module), module, (100, 1, shape[2]), config)
    assert fit.operations == 7 * PER_PRODUCT * weights / 3 * 100


def test_the_ledger_counts_what_kernels_move():
    """A product reads two matrices and writes one; a view is no kernel."""
    a, b = torch.empty(4, 8, device="meta"), torch.empty(8, 2, device="meta")
    with Ledger() as ledger:
        _ = (a @ b).T
    assert ledger.work == Work(2 * 4 * 8 * 2, 4 * (4 * 8 + 8 * 2 + 4 * 2), 1)


def test_hours_are_those_of_the_slowest_part():
    work = Work(SHARE * PEAK["bf16"], SHARE * BANDWIDTH, 1 / LAUNCH) * 3600
    assert hours_of(work, "bf16") == pytest.approx({"arithmetic": 1, "memory": 1, "launches": 1})
    assert hours_of(work * 2 + work, "bf16")["memory"] == pytest.approx(3)
