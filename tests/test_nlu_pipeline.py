"""NLU from anchors to classifiers: order, released anchors, what is exported, the settings of the paper."""

import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from common.command import parse
from common.config import ROOT
from common.core.errors import InputError
from common.pipeline import adapt, construct, merge_alone
from common.validation import check_choices
from helpers import change, edit_config, files_of, read, rewrite
from NLU import domain
from pico_nlu import (
    PICO_TASKS,
    pico_architecture,
    write_large_encoders,
)

CPU = torch.device("cpu")
EMBEDDING = "embeddings.word_embeddings.weight"


def test_classifiers_are_written_as_asked_and_the_encoder_is_kept_once(nlu_config):
    start = change(change(nlu_config, "start", method="ta"), "run", score=False)
    assert not (merge_alone(start, domain) / "heads").exists()
    folder = merge_alone(change(change(start, "model", heads=("CoLA", "MNLI")), "run", name="heads"), domain)
    assert sorted(f.name for f in (folder / "heads").iterdir()) == ["CoLA", "MNLI"]
    assert sum(f.lstat().st_size for f in (folder / "heads").rglob("*.safetensors")) < 10_000
    shutil.move(folder, folder.with_name("moved"))
    AutoModelForSequenceClassification.from_pretrained(folder.with_name("moved") / "heads" / "MNLI")
    with pytest.raises(InputError, match="model.heads: unknown task 'cola'; choose from CoLA"):
        merge_alone(change(start, "model", heads=("cola",)), domain)


def test_a_head_that_the_type_of_the_base_cannot_hold_is_refused_first(nlu_inputs, nlu_config, tmp_path):
    shutil.copytree(nlu_inputs / "roberta", tmp_path / "roberta")
    rewrite(tmp_path / "roberta/base/model.safetensors", lambda t: {n: x.half() for n, x in t.items()})
    rewrite(tmp_path / "roberta/cola/model/model.safetensors", lambda t: t["classifier.out_proj.bias"].fill_(1e5))
    edit_config(tmp_path / "roberta/base", dtype="float16")
    config = change(change(nlu_config, "start", method="ta"), "model", root=str(tmp_path / "roberta"), heads=("CoLA",))
    with pytest.raises(
        InputError, match=r"classifier.out_proj.bias of the head of CoLA reaches 1e\+05, too much for torch.float"
    ):
        merge_alone(config, domain)
    assert not list(config.run.dir.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("opener", "head"),
    [
        (AutoModelForTokenClassification, "classifier"),
        (AutoModelForQuestionAnswering, "qa_outputs"),
        (AutoModelForMultipleChoice, "classifier"),
    ],
)
def test_heads_of_other_kinds_are_written_as_the_experts_are(nlu_config, tmp_path, opener, head):
    """An expert that tasks.yaml does not list: its class is what its config names."""
    torch.manual_seed(0)
    expert = opener.from_config(pico_architecture("roberta", num_labels=5 if "Token" in opener.__name__ else 2))
    expert.save_pretrained(tmp_path / "own")
    config = change(nlu_config, "model", experts={"own": str(tmp_path / "own")}, heads=("own", "CoLA"))
    config = change(replace(config, tasks=["CoLA", "own"]), "run", score=False)
    folder = merge_alone(change(config, "start", method="average"), domain)
    found, info = opener.from_pretrained(folder / "heads" / "own", output_loading_info=True)
    assert not info["missing_keys"] and found.config.architectures == [type(expert).__name__]
    for name, parameter in found.get_submodule(head).named_parameters():
        assert torch.equal(parameter, expert.get_submodule(head).get_parameter(name))
    assert torch.equal(found.base_model.embeddings.word_embeddings.weight, read(folder, EMBEDDING))
    AutoModelForSequenceClassification.from_pretrained(folder / "heads" / "CoLA")


def test_a_scored_task_has_a_sequence_classifier(own_nlu):
    edit_config(own_nlu.model.path("expert", "CoLA"), architectures=["RobertaForTokenClassification"])
    config = change(change(own_nlu, "model", heads=("CoLA",)), "start", method="average")
    with pytest.raises(
        InputError, match="names RobertaForTokenClassification; the task CoLA is answered by a sequence"
    ):
        merge_alone(config, domain)


def test_an_expert_with_more_tokens_is_no_copy_of_the_base(own_nlu):
    folder = own_nlu.model.path("expert", "CoLA")
    rewrite(folder / "model.safetensors", lambda tensors: {
        n: torch.cat([t, t[:2]]) if n.endswith("word_embeddings.weight") else t for n, t in tensors.items()
    })  # fmt: skip
    with pytest.raises(
        InputError, match=r"word_embeddings.weight: \(52, 16\) against \(50, 16\); an expert must be a fi"
    ):
        merge_alone(change(own_nlu, "start", method="average"), domain)


def test_anchors_do_not_depend_on_the_order_of_tasks_and_blocks(nlu_config):
    construct(nlu_config, domain)
    other = change(replace(nlu_config, tasks=PICO_TASKS[::-1]), "run", name="other")
    for block in (1, 0):
        construct(change(other, "run", blocks=[block]), domain)
    assert files_of(nlu_config.run.dir / "anchors") == files_of(other.run.dir / "anchors")


def write_released_anchors(folder: Path, layer: int, width: int = 16) -> Path:
    """A pickled dictionary in a .npy, as published for RoBERTa."""
    folder.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(layer).normal(size=(4, 5, width)).astype(np.float32)
    content = {"input": x, "gt": x, "attention_mask": np.zeros((4, 1, 5, 5), np.float32)}
    np.save(folder / f"dual_anchors_layer_{layer}.npy", np.array(content, dtype=object), allow_pickle=True)
    return folder / f"dual_anchors_layer_{layer}.npy"


@pytest.mark.parametrize("source", ["", "/{slug}"])
def test_released_anchors_are_used_in_place(nlu_config, tmp_path, source):
    """<task>/dual_anchors_layer_<n>.npy; the published folders have the tasks in lower case."""
    released = tmp_path / "released"
    for task in PICO_TASKS:
        for layer in (1, 2):
            write_released_anchors(released / (task.lower().replace("-", "") if source else task), layer)
    adapt(change(change(nlu_config, "anchors", source=f"{released}{source}"), "run", score=False), domain)


def test_released_anchors_that_would_run_something_are_refused_and_do_not(nlu_config, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for task in PICO_TASKS:
        file, _ = (write_released_anchors(tmp_path / "released" / task, layer) for layer in (1, 2))
    np.save(file, np.array({"input": Hostile()}, dtype=object), allow_pickle=True)
    source = change(nlu_config, "anchors", source=str(tmp_path / "released"))
    with pytest.raises(InputError, match=r"MNLI/dual_anchors_layer_1.npy names `posix.mkdir`.*nothing was executed"):
        adapt(change(source, "run", score=False), domain)
    assert pickle.dumps(Hostile()) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "nlu").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_config_loads_and_its_choices_exist(file):
    check_choices(parse("", ["--config", str(file)]), domain)
    assert file.stem in file.read_text().split("domain:")[0], "the header gives the command"


@pytest.mark.parametrize(("name", "scale", "epochs"), [("base", 0.3, (100, 100)), ("large", 0.2, (50, 15))])
def test_the_papers_settings(name, scale, epochs):
    config = parse("", ["--config", str(ROOT / f"configs/nlu/roberta_{name}.yaml")])
    anchors = config.anchors
    assert (anchors.number, anchors.tokens, anchors.steps, anchors.lr, anchors.distance) == (64, 5, 1200, 0.01, "cos")
    assert (config.start.hyper["ta"]["scale"], config.start.hyper["wudi"]["lr"]) == (scale, 2e-5)
    settings = {s: config.adapt.for_start(s) for s in ("pretrained", "ta", "tsv", "wudi")}
    assert {s: (a.lr, a.epochs, a.batch_size, a.distance) for s, a in settings.items()} == {
        "pretrained": (5e-5, epochs[0], 128, "mse"),
        **dict.fromkeys(("ta", "tsv", "wudi"), (1e-2, epochs[1], 128, "mse")),
    }
    assert config.tasks == list(domain.TASKS)[:8]
    expert = f"sst2/roberta-{name}_lr1e-05"
    assert config.model.named("expert", "SST-2") == f"hf://SphereLab/nlu_models_in_FDA/{expert}"
    on_disk = replace(config.model, root="checkpoints/glue")
    assert on_disk.path("expert", "SST-2") == Path("checkpoints/glue") / expert


MEASURED = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
def test_a_block_of_roberta_large_fits_in_memory(tmp_path):
    """GiB of the whole process on a CPU, all eight tasks: two steps of construction, two epochs from each start.

    A start is merged before, by itself: that takes the word embeddings of all experts at once.
    """
    write_large_encoders(tmp_path, list(domain.TASKS)[:8])
    config = f"""--config configs/nlu/roberta_large.yaml --model.root {tmp_path} --model.base base
        --model.expert {{slug}} --run.root {tmp_path / "runs"} --run.device cpu --run.score false --anchors.steps 2
        --adapt.epochs 2 --start.hyper.wudi.steps 1""".split()

    def peak(command: str, start: str) -> float:
        run = [sys.executable, "-c", MEASURED, command, *config, "--start.method", start]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
        gibibytes = int(done.stdout.split()[-1]) / 2**20
        print(f"{command} from {start}: {gibibytes:.2f} GiB")
        return gibibytes

    assert peak("NLU/construct_fda.py", "pretrained") < 2
    for start in ("pretrained", "ta", "wudi", "tsv"):
        peak("scripts/merge.py", start)
        assert peak("NLU/adapt.py", start) < 3, start
