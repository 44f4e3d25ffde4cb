"""The dry run: it opens and compares what the run would, lists all that is wrong, and ends with the run's status."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from common.config import as_dict
from common.core.errors import InputError
from common.io.checkpoints import Checkpoint, write_tensors
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import ADAPT, CONSTRUCT, MERGE, describe
from compare import compare
from compare import plan as plan_of_compare
from helpers import change, command, rewrite
from NLG import domain as nlg
from pico_vision import PICO_TASKS
from Vision import domain

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def own(pico_config, pico_inputs, tmp_path):
    """The pico experiment on a copy of its checkpoints that a test may damage, merged by ta; and their folder."""
    shutil.copytree(pico_inputs / "clip", tmp_path / "clip")
    config = change(pico_config, "model", root=str(tmp_path / "clip"))
    return change(change(config, "start", method="ta"), "run", score=False), tmp_path / "clip"


def refused_alike(config, stage, checks):
    """The sentences of the dry run, of which the first must be the run's own."""
    refusals = describe(config, domain, checks).refusals
    with pytest.raises(InputError) as raised:
        stage(config, domain)
    assert refusals[0] == str(raised.value)
    return refusals


def test_experts_that_do_not_fit_are_all_refused(own):
    config, root = own
    first, second = (root / task / "finetuned.safetensors" for task in PICO_TASKS)
    rewrite(first, lambda tensors: tensors.pop("visual.proj"))
    rewrite(second, lambda tensors: tensors.update({"visual.proj": tensors["visual.proj"][:, :4].contiguous()}))
    refusals = refused_alike(config, merge_alone, MERGE)
    assert len(refusals) == 2 and all("visual.proj" in sentence for sentence in refusals)
    text = describe(config, domain, MERGE).text
    assert all(f"REFUSED    expert {task}: " in text for task in PICO_TASKS) and "found      base: " in text


def test_what_is_missing_hides_nothing_else(own):
    config, root = own
    shutil.rmtree(root / "SVHN")
    rewrite(root / "MNIST" / "finetuned.safetensors", lambda tensors: tensors.pop("visual.proj"))
    missing, misfit = sorted(describe(config, domain).refusals, key=lambda s: "visual.proj" in s)
    assert str(root / "SVHN" / "finetuned.safetensors") in missing and "visual.proj" in misfit
    shutil.rmtree(root / "base")
    text = describe(config, domain).text
    assert f"MISSING    base: there is no checkpoint at {root / 'base'}" in text and "MISSING    expert SVHN" in text


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("start", {"hyper": {"ta": {"scale": 0.7}}}, "start.hyper.scale = 0.3, now it is 0.7"),
        ("adapt", {"epochs": 3}, "adapt.epochs = 2, now it is 3"),
        ("anchors", {"steps": 6}, "anchors.steps = 5, now it is 6"),
    ],
)
def test_results_of_other_settings_are_refused_as_by_the_run(own, section, values, said):
    config, _ = own
    construct(config, domain)
    adapt(config, domain)
    for checks in (CONSTRUCT, ADAPT):
        assert describe(config, domain, checks).refusals == []
    other = change(config, section, **values)
    stage, checks = (construct, CONSTRUCT) if section == "anchors" else (adapt, ADAPT)
    assert said in refused_alike(other, stage, checks)[0]


def test_an_adaptation_without_anchors_is_refused_and_a_merge_is_not(own):
    config, _ = own
    assert describe(config, domain, MERGE).refusals == describe(config, domain, CONSTRUCT).refusals == []
    [sentence] = refused_alike(config, adapt, ADAPT)
    assert sentence.startswith("there are no anchors at ") and "construct_fda.py" in sentence
    assert not config.run.dir.joinpath("merged").exists()  # the start is not merged for nothing
    one = change(config, "run", blocks=[0])
    construct(one, domain)
    assert "block_01" in refused_alike(one, adapt, ADAPT)[0]  # an adapted block is told apart by all anchors


def test_a_start_that_does_not_fit_is_refused(own, tmp_path):
    config, root = own
    given = tmp_path / "given.safetensors"
    shutil.copy(root / "MNIST" / "finetuned.safetensors", given)
    construct(config, domain)
    assert describe(change(config, "start", checkpoint=str(given)), domain, ADAPT).refusals == []
    rewrite(given, lambda tensors: tensors.pop("visual.proj"))
    refused_alike(change(config, "start", checkpoint=str(given)), adapt, ADAPT)


def test_nothing_is_written_and_the_status_is_that_of_the_run(own, tmp_path):
    config, root = own
    shutil.rmtree(root / "SVHN")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in as_dict(config).items() if k != "dry_run"}))
    before = sorted(tmp_path.rglob("*"))
    done = command("scripts/merge.py", "--config", file, "--dry-run")
    assert done.returncode == 2 and "found      expert MNIST" in done.stdout and "Needs" in done.stdout
    assert done.stderr == f"error: there is no checkpoint at {root / 'SVHN' / 'finetuned.safetensors'}\n"
    done = command("scripts/merge.py", "--config", file, "--dry-run", "--tasks", json.dumps(["MNIST"]))
    assert (done.returncode, done.stderr) == (0, "") and sorted(tmp_path.rglob("*")) == before


def test_a_task_without_data_is_refused_before_any_work(own, tmp_path, monkeypatch):
    """It is in no folder, and its row of tasks.yaml names no data set of the hub."""
    config, _ = own
    row = replace(domain.TASKS["SVHN"], hub="")
    monkeypatch.setattr(domain, "TASKS", {**domain.TASKS, "SVHN": row})
    config = change(change(config, "eval", data=str(tmp_path / "none")), "run", score=True)
    for stage, checks in ((construct, CONSTRUCT), (merge_alone, MERGE), (adapt, ADAPT)):
        sentence, *_ = refused_alike(config, stage, checks)
        assert sentence.startswith(f"no data for SVHN: there is no folder {tmp_path / 'none' / 'SVHN'}, which would do")
        text = describe(config, domain, checks).text
        assert "MISSING    data SVHN" in text and "from hub   data MNIST" in text
    with pytest.raises(InputError, match="no data for SVHN"):
        compare(config, domain)
    assert not config.run.dir.exists()
    unscored = change(config, "run", score=False)
    assert describe(unscored, domain, MERGE).refusals == []
    assert "no data for SVHN" in plan_of_compare(unscored, domain).refusals[0], "a grid is scored all the same"


def test_a_task_of_ones_own_is_merged_and_not_scored(own, capsys):
    config, root = own
    shutil.move(root / "SVHN", root / "house_numbers")
    config = change(replace(config, tasks=["MNIST", "house_numbers"]), "run", score=True)
    plan = describe(config, domain, MERGE)
    assert plan.refusals == [] and "not scored house_numbers" in plan.text
    construct(config, domain)
    adapt(config, domain)
    said = capsys.readouterr().out
    assert said.count("not scored, as eval.tests names no test set for it: house_numbers\n") == 1
    rows = json.loads((config.run.dir / "results.json").read_text())
    assert rows["tasks"] == ["MNIST"] and {row["task"] for row in rows["rows"]} == {"MNIST"}


def test_a_misspelt_task_is_refused_with_its_path_and_what_may_be_meant(own):
    config, root = own
    for stage in (construct, merge_alone):
        with pytest.raises(InputError) as raised:
            stage(replace(config, tasks=["MNIST", "SVNH"]), domain)
        assert f"{root / 'SVNH' / 'finetuned.safetensors'}; is the task 'SVNH' misspelt?" in str(raised.value)
        assert str(raised.value).endswith("close to it: SVHN")


def test_data_of_a_task_without_a_test_set_cannot_be_used(own):
    config, root = own
    shutil.move(root / "SVHN", root / "house_numbers")
    config = change(replace(config, tasks=["MNIST", "house_numbers"]), "start", method="fisher")
    with pytest.raises(InputError, match="fisher needs data of every task, and there is no test set for house_numbers"):
        merge_alone(config, domain)


def test_an_adapter_outside_the_anchored_blocks_is_told_before_any_work(own_nlg):
    """Anchored are the MLPs; the adapter is one of an attention."""
    root, config = own_nlg
    width = Checkpoint(root / "base").shapes[f"{QUERY}.weight"]
    task = config.tasks[0]
    shutil.rmtree(config.model.path("expert", task))
    factors = {"lora_A": torch.ones(2, width[1]), "lora_B": torch.ones(width[0], 2)}
    tensors = {f"base_model.model.{QUERY}.{name}.weight": t for name, t in factors.items()}
    write_tensors(config.model.path("expert", task) / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (config.model.path("expert", task) / "adapter_config.json").write_text(json.dumps(settings))
    [sentence] = describe(config, nlg, CONSTRUCT).refusals
    assert "changes none of model.layers.0.mlp. to " in sentence and "scripts/merge.py" in sentence
    with pytest.raises(InputError) as raised:
        construct(config, nlg)
    assert str(raised.value) == sentence and not config.run.dir.exists()
    assert describe(config, nlg, MERGE).refusals == []


def test_the_plan_says_how_far_each_expert_is_from_the_base(own):
    config, root = own
    prefix = "visual.transformer.resblocks.0."
    base = Checkpoint(root / "base").read_under(prefix)
    size = sum(float(p.double().square().sum()) for p in base.values())
    said = []
    for task, scale in zip(PICO_TASKS, (0.01, 2.0), strict=True):
        file = root / task / "finetuned.safetensors"
        rewrite(file, lambda t, s=scale: t.update({prefix + n: p * (1 + s) for n, p in base.items()}))
        expert = Checkpoint(file).read_under(prefix)
        distance = sum(float((expert[n].double() - p.double()).square().sum()) for n, p in base.items())
        said.append(f"{task} {100 * (distance / size) ** 0.5:.1f} %")
    line = next(line for line in describe(config, domain).text.splitlines() if "‖τ‖/‖θ₀‖" in line)
    assert line.endswith(f"in block 0: {', '.join(said)}; beyond 5 %, where FDA can lose to task arithmetic: SVHN")


def test_a_weight_that_is_not_finite_is_told_by_the_plan_too(own):
    config, root = own
    name = "visual.transformer.resblocks.0.ln_1.weight"
    rewrite(root / "MNIST" / "finetuned.safetensors", lambda t: t.update({name: t[name] * torch.nan}))
    assert describe(config, domain).refusals == [
        f"{root}/MNIST/finetuned.safetensors: the tensor {name} holds NaN or Inf"
    ]


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("adapt", {"epochs": 3}, "adapt.epochs = 2, now it is 3"),
        ("anchors", {"steps": 6}, "anchors.steps = 5, now it is 6"),
        ("start", {"hyper": {"ta": {"scale": 0.7}}}, "start.hyper.scale = 0.3, now it is 0.7"),
    ],
)
def test_a_grid_of_other_settings_is_refused_as_by_the_run(own, section, values, said):
    """Before the search, too, as far as it does not choose them."""
    config, _ = own
    construct(config, domain)
    adapt(config, domain)
    grid = change(config, "compare", starts=["ta", "tsv"], inits=["weight"])
    assert plan_of_compare(grid, domain).refusals == []
    other = change(grid, section, **values)
    for search in ({}, {"tsv": {"scale": [0.5, 1.0]}}):
        other = change(other, "compare", search=search)
        [sentence] = plan_of_compare(other, domain).refusals
        with pytest.raises(InputError) as raised:
            compare(other, domain)
        assert said in sentence == str(raised.value)
    assert not (config.run.dir / "search.json").exists() and not (config.run.dir / "merged/tsv").exists()
    chosen = change(other, "compare", starts=["ta"], search={"ta": {"scale": [0.3, 0.7]}})
    assert (plan_of_compare(chosen, domain).refusals == []) == (section == "start")


def test_a_grid_refuses_models_of_another_start_before_any_work(own):
    config, _ = own
    construct(config, domain)
    adapt(config, domain)
    shutil.rmtree(config.run.dir / "merged/ta")
    other = change(config, "start", hyper={"ta": {"scale": 0.9}})
    merge_alone(other, domain)
    grid = change(other, "compare", starts=["ta", "tsv"], inits=["gauss"])
    with pytest.raises(InputError, match="was adapted from another start") as raised:
        compare(grid, domain)
    assert not (config.run.dir / "merged/tsv").exists() and not (config.run.dir / "anchors/gauss").exists()
    assert plan_of_compare(grid, domain).refusals == [str(raised.value)]
