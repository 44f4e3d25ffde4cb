"""The NLU wing end to end on pico encoders: three families, every start, stock transformers, every refusal."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from pico_nlu import (
    CONFIGS,
    PICO_TASKS,
    pico_architecture,
    pico_config,
    write_large_encoders,
    write_pico_encoders,
    write_pico_texts,
)
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, RobertaConfig

from common.command import parse
from common.config import ROOT, Config
from common.core.blocks import moved
from common.core.errors import InputError
from common.core.task_vectors import subtract
from common.evaluation.metrics import METRICS
from common.evaluation.scoring import score_run
from common.experiment import open_experiment
from common.fda.construction import Unit, optimise_anchors
from common.fda.matching import matching_loss
from common.io.checkpoints import Checkpoint, read_header, write_tensors
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import describe
from common.validation import check_choices
from NLU import domain, scoring

KEY_BIAS = "attention.self.key.bias"
CPU = torch.device("cpu")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()


def change(config: Config, section: str, **fields) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **fields)})


def files_of(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob(pattern)) if f.is_file()}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """Encoders of each family under its name, texts under data; read only."""
    root = tmp_path_factory.mktemp("pico_nlu")
    for family in CONFIGS:
        write_pico_encoders(root / family, family, PICO_TASKS)
    write_pico_texts(root / "data", PICO_TASKS)
    return root


@pytest.fixture
def config(inputs, tmp_path) -> Config:
    return pico_config(inputs, tmp_path)


@pytest.fixture
def own(inputs, tmp_path) -> Config:
    """A config whose encoders and texts a test may damage."""
    shutil.copytree(inputs / "roberta", tmp_path / "own" / "roberta")
    shutil.copytree(inputs / "data", tmp_path / "own" / "data")
    return pico_config(tmp_path / "own", tmp_path)


def rewrite(file: Path, edit) -> None:
    tensors = load_file(file)
    write_tensors(file, edit(tensors) or tensors)


@pytest.mark.parametrize("family", CONFIGS)
def test_stock_transformers_opens_the_encoder_of_every_start_and_family(inputs, tmp_path, family):
    config = change(pico_config(inputs, tmp_path, family), "run", score=False)
    construct(config, domain)
    for start in ("pretrained", "ta", "tsv", "wudi"):
        folder = adapt(change(config, "start", method=start), domain)
        encoder, report = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert {name.split(".")[0] for name in report["missing_keys"]} <= {"pooler"} and not report["unexpected_keys"]
        tokens = AutoTokenizer.from_pretrained(folder)("w1 w2", return_tensors="pt")
        assert encoder(**tokens).last_hidden_state.isfinite().all()
    score_run(config, domain)
    rows = json.loads((config.run.dir / "results.json").read_text())["rows"]
    assert Counter(r["method"] for r in rows) == {m: 3 * n for m, n in zip(
        ("pretrained", "individual", "ta", "tsv", "wudi", "fda"), (1, 1, 1, 1, 1, 4), strict=True
    )}  # fmt: skip
    assert {r["task"]: (r["metric"], r["n"]) for r in rows} == {
        "CoLA": ("Matthews", 30), "STS-B": ("Pearson and Spearman", 30), "MNLI": ("accuracy", 30)
    }  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("task", PICO_TASKS)
def test_the_score_is_that_of_stock_transformers(inputs, tmp_path, family, task):
    """Expert, and merged encoder under the expert's head as exported, one example at a time."""
    config = change(pico_config(inputs, tmp_path, family), "start", method="ta")
    config = change(config, "model", heads=(task,))
    expert, merged = config.model.path("expert", task), merge_alone(change(config, "run", score=False), domain)
    found = domain.score(config, task, {"expert": expert, "merged": merged}, CPU)
    folders = {"expert": expert, "merged": merged / "heads" / task}
    tokenizer, row = AutoTokenizer.from_pretrained(expert), domain.TASKS[task]
    records = datasets.load_from_disk(f"{config.eval.data}/{task}")[row.split]
    for name in found:
        stock, report = AutoModelForSequenceClassification.from_pretrained(folders[name], output_loading_info=True)
        assert not any(report.values())
        with torch.no_grad():
            logits = torch.cat(
                [stock(**tokenizer(*(r[key] for key in row.text), return_tensors="pt")).logits for r in records]
            )
        answers = logits[:, 0] if row.labels == 1 else logits.argmax(1)
        assert found[name] == (pytest.approx(METRICS[row.metric](records["label"], answers), abs=1e-4), 30)


def test_classifiers_are_written_as_asked_and_the_encoder_is_kept_once(config):
    start = change(change(config, "start", method="ta"), "run", score=False)
    assert not (merge_alone(start, domain) / "heads").exists()
    folder = merge_alone(change(change(start, "model", heads=("CoLA", "MNLI")), "run", name="heads"), domain)
    assert sorted(f.name for f in (folder / "heads").iterdir()) == ["CoLA", "MNLI"]
    assert sum(f.lstat().st_size for f in (folder / "heads").rglob("*.safetensors")) < 10_000
    shutil.move(folder, folder.with_name("moved"))
    AutoModelForSequenceClassification.from_pretrained(folder.with_name("moved") / "heads" / "MNLI")
    with pytest.raises(InputError, match="model.heads: unknown task 'cola'; choose from CoLA"):
        merge_alone(change(start, "model", heads=("cola",)), domain)


def test_another_test_set_is_scored_under_the_head_of_its_task(own):
    """eval.tests: the sentences of CoLA, called SST-2, under CoLA's head."""
    shutil.copytree(f"{own.eval.data}/CoLA", f"{own.eval.data}/SST-2")
    expert = {"x": own.model.path("expert", "CoLA")}
    other = change(own, "eval", tests={"CoLA": ["CoLA", "SST-2"], "MNLI": ["RTE"]})
    labels = datasets.load_from_disk(f"{own.eval.data}/CoLA")["validation"]["label"]
    value, n = domain.score(other, "SST-2", expert, CPU)["x"]
    assert n == len(labels) == 30 and round(value * 30) == pytest.approx(value * 30), "an accuracy, not Matthews'"
    with pytest.raises(InputError, match="eval.tests: MNLI and RTE have unlike numbers of labels, 3 against 2"):
        domain.score(other, "RTE", expert, CPU)


def test_batches_and_limit(config):
    """The score does not depend on the batches; a limit takes the first examples."""
    expert = {"x": config.model.path("expert", "STS-B")}
    whole = domain.score(config, "STS-B", expert, CPU)["x"]
    assert domain.score(change(config, "eval", batch_size=7), "STS-B", expert, CPU)["x"] == pytest.approx(
        whole, abs=1e-4
    )
    tokenizer = scoring.open_tokenizer(config.model, "STS-B", 50)
    labels = [x for _, batch in scoring.tokenised(change(config, "eval", limit=4), "STS-B", tokenizer) for x in batch]
    first = datasets.load_from_disk(f"{config.eval.data}/STS-B")["validation"]["label"][:4]
    assert sorted(labels) == pytest.approx(sorted(first))


def test_the_validation_cut_is_scored_apart_from_the_test_set(config):
    """The cut is the last tenth of a permutation by RandomState(0); rows of both splits stay, a table shows one."""
    cut = change(config, "eval", split="validation_cut")
    tokenizer = scoring.open_tokenizer(config.model, "STS-B", 50)
    train = datasets.load_from_disk(f"{config.eval.data}/STS-B")["train"]["label"]
    expected = [train[i] for i in np.random.RandomState(0).permutation(30)[27:]]
    labels = [x for _, batch in scoring.tokenised(cut, "STS-B", tokenizer) for x in batch]
    assert sorted(labels) == pytest.approx(sorted(expected))
    tables = []
    for one in (config, cut, config):
        score_run(one, domain)
        rows = json.loads((config.run.dir / "results.json").read_text())["rows"]
        tables.append((config.run.dir / "table.md").read_text())
    scores = [table.split("Avg:")[0] for table in tables]
    assert Counter((r["split"], r["n"]) for r in rows) == {("test", 30): 6, ("validation_cut", 3): 6}
    assert "STS-B Pearson and Spearman 3," in tables[1] and scores[0] == scores[2] != scores[1]


def test_local_files_named_after_the_split_are_that_split(config, tmp_path):
    """`datasets` alone would put validation_mismatched and validation_matched together as validation."""
    for split, label in (("validation_matched", 1), ("validation_mismatched", 2), ("train", 0)):
        (tmp_path / "data" / "MNLI").mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict({"premise": ["w1"] * 4, "hypothesis": ["w2"] * 4, "label": [label] * 4})
        table.to_parquet(tmp_path / "data" / "MNLI" / f"{split}-00000-of-00001.parquet")
    local = change(config, "eval", data=str(tmp_path / "data"))
    ((_, labels),) = scoring.tokenised(local, "MNLI", scoring.open_tokenizer(config.model, "MNLI", 50))
    assert labels.tolist() == [1] * 4


def test_long_examples_are_cut_at_128_tokens(own):
    long = {"sentence": ["w1 " * 300], "label": [1]}
    datasets.DatasetDict({"validation": datasets.Dataset.from_dict(long)}).save_to_disk(f"{own.eval.data}/CoLA")
    ((tokens, _),) = scoring.tokenised(own, "CoLA", scoring.open_tokenizer(own.model, "CoLA", 50))
    assert tokens["input_ids"].shape == (1, 128)


def test_anchors_do_not_depend_on_the_order_of_tasks_and_blocks(config):
    construct(config, domain)
    other = change(replace(config, tasks=PICO_TASKS[::-1]), "run", name="other")
    for block in (1, 0):
        construct(change(other, "run", blocks=[block]), domain)
    assert files_of(config.run.dir / "anchors") == files_of(other.run.dir / "anchors")


def test_position_embeddings_lie_in_what_is_stored(config):
    """A step of length nothing leaves the anchors at their start: what is stored differs by the expert's rows."""
    still = change(change(config, "anchors", steps=1, lr=1e-30), "run", score=False)
    added = change(change(still, "anchors", position_embeddings=True), "run", name="added")
    for one in (still, added):
        construct(one, domain)
    rows_TD = open_experiment(added, domain).positions("MNLI")
    expert = Checkpoint(config.model.path("expert", "MNLI")).read(["roberta.embeddings.position_embeddings.weight"])
    assert torch.equal(rows_TD, expert["roberta.embeddings.position_embeddings.weight"][:3])
    stored, plain = (
        load_file(c.run.dir / "anchors/weight/MNLI/block_01.safetensors")["anchors"] for c in (added, still)
    )
    torch.testing.assert_close(stored, plain + rows_TD)
    adapt(added, domain)
    with pytest.raises(InputError, match="anchors.position_embeddings = True, now it is False"):
        construct(change(still, "run", name="added"), domain)


def test_position_embeddings_are_added_while_anchors_are_optimised(config):
    """The loss that the file records is the loss of what it holds, at the block itself."""
    added = change(change(config, "anchors", position_embeddings=True), "run", score=False)
    construct(added, domain)
    experiment = open_experiment(added, domain)
    file = experiment.anchor_file("CoLA", 0)
    theta_0, theta_t = (experiment.read_block(c, 0) for c in (experiment.base, experiment.experts["CoLA"]))
    tau = moved(experiment.task_vector("CoLA", theta_0, theta_t))
    losses = matching_loss(experiment.block, theta_0, theta_t, tau, load_file(file)["anchors"])
    assert dict(zip(tau, losses.tolist(), strict=True)) == pytest.approx(read_header(file)["losses"], abs=1e-4)


def test_position_embeddings_that_cannot_be_added_are_refused(inputs, tmp_path, config):
    """ELECTRA's are as narrow as its word embeddings; 141 tokens are more than there are positions."""
    narrow = change(pico_config(inputs, tmp_path, "electra"), "anchors", position_embeddings=True)
    with pytest.raises(InputError, match=r"position_embeddings.weight is \(140, 8\), anchors are \(3, 16\)"):
        construct(narrow, domain)
    with pytest.raises(InputError, match=r"is \(140, 16\), anchors are \(141, 16\)"):
        construct(change(config, "anchors", position_embeddings=True, tokens=141), domain)


@pytest.mark.parametrize("form", ["bare", "classifier", "legacy"])
def test_a_base_saved_in_another_form_is_the_same_base(own, form):
    """The pico base is a masked language model: roberta.… and lm_head.…; the names of the encoder are what counts."""
    encoder = {n: t for n, t in load_file(own.model.path("base") / "model.safetensors").items() if "lm_head" not in n}
    bare = {n.removeprefix("roberta."): t for n, t in encoder.items()}
    forms = {
        "bare": bare | {"pooler.dense.weight": torch.ones(16, 16), "embeddings.position_ids": torch.arange(140)[None]},
        "classifier": encoder | {"classifier.dense.weight": torch.ones(16, 16)},
        "legacy": {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in encoder.items()
        },
    }
    write_tensors(own.model.path("base") / "model.safetensors", forms[form])
    base = open_experiment(own, domain).base
    assert base.shapes.keys() == bare.keys()
    assert all(torch.equal(t, bare[n]) for n, t in base.read(base.shapes).items())


def test_the_papers_models_have_the_papers_shapes(tmp_path):
    large = RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    for name, architecture, width, depth, size in (
        ("base", RobertaConfig(), 768, 12, 7_087_872),
        ("large", large, 1024, 24, 12_596_224),
    ):
        architecture.save_pretrained(tmp_path / name)
        model = replace(pico_config(tmp_path, tmp_path).model, root=str(tmp_path), base=name)
        assert domain.token_shape(model) == (5, width)
        blocks = domain.FAMILIES["roberta"].modules(domain.skeleton(model))
        parameters = dict(blocks[0].named_parameters())
        assert (len(blocks), len(parameters), sum(p.numel() for p in parameters.values())) == (depth, 16, size)
        assert all(p.is_meta for p in parameters.values())


def test_the_key_bias_is_noise_when_kept_and_a_floor_gone_when_dropped():
    """No input moves it: its loss stays about 1, where chance has it, and what chases it is lost for the others."""
    torch.manual_seed(0)
    wide = pico_architecture("roberta", hidden_size=64, num_hidden_layers=1)
    encoder = AutoModel.from_config(wide, attn_implementation="eager")
    family = domain.FAMILIES["roberta"]
    (module,) = family.modules(encoder)
    block = family.pure(module)
    theta_0 = {n: p.detach() + 0.1 * torch.randn_like(p) for n, p in module.named_parameters()}
    theta_t = {n: p + 0.05 * torch.randn_like(p) for n, p in theta_0.items()}
    x = torch.randn(8, 5, 64)

    exact = {n: p.double().requires_grad_() for n, p in theta_0.items()}
    block(exact, x.double()).square().sum().backward()
    assert exact[KEY_BIAS].grad.abs().max() < 1e-12 < 1e-3 < exact["attention.self.query.bias"].grad.abs().max()

    tau = subtract(theta_t, theta_0)
    cleaned = family.without_null_gradients(tau)
    kept, dropped, alone = (
        optimise_anchors(block, theta_0, Unit(theta_t, t, x), steps=60, lr=0.05)
        for t in (tau, cleaned, {KEY_BIAS: tau[KEY_BIAS]})
    )
    assert set(kept.losses) - set(dropped.losses) == {KEY_BIAS}
    assert sum(alone.trace) / 61 == pytest.approx(1, abs=0.1), "sixty steps on it alone lead nowhere"
    assert kept.losses[KEY_BIAS] > 0.5 > max(dropped.trace[-1], dropped.losses["attention.self.query.bias"])
    others = [loss for name, loss in kept.losses.items() if name != KEY_BIAS]
    assert sum(dropped.losses.values()) < sum(others), "the noise costs the other tensors as well"


def test_heads_and_poolers_are_never_merged(inputs, tmp_path):
    """A BERT classifier pools before it classifies: whatever is merged, it scores with the expert's own pooler."""
    config = pico_config(inputs, tmp_path, "bert")
    merged = Checkpoint(merge_alone(change(change(config, "start", method="ta"), "run", score=False), domain))
    assert {n.split(".")[0] for n in merged.shapes} == {"embeddings", "encoder"}
    own, expert = scoring.open_classifier(config.model, "MNLI").state_dict(), config.model.path("expert", "MNLI")
    stored = load_file(expert / "model.safetensors")
    heads = [n for n in stored if n.startswith(("classifier.", "bert.pooler."))]
    assert len(heads) == 4 and all(torch.equal(own[n], stored[n]) for n in heads)


def write_released_anchors(folder: Path, layer: int, width: int = 16) -> Path:
    """A pickled dictionary in a .npy, as published for RoBERTa."""
    folder.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(layer).normal(size=(4, 5, width)).astype(np.float32)
    content = {"input": x, "gt": x, "attention_mask": np.zeros((4, 1, 5, 5), np.float32)}
    np.save(folder / f"dual_anchors_layer_{layer}.npy", np.array(content, dtype=object), allow_pickle=True)
    return folder / f"dual_anchors_layer_{layer}.npy"


@pytest.mark.parametrize("source", ["", "/{slug}"])
def test_released_anchors_are_used_in_place(config, tmp_path, source):
    """<task>/dual_anchors_layer_<n>.npy; the published folders have the tasks in lower case."""
    released = tmp_path / "released"
    for task in PICO_TASKS:
        for layer in (1, 2):
            write_released_anchors(released / (task.lower().replace("-", "") if source else task), layer)
    adapt(change(change(config, "anchors", source=f"{released}{source}"), "run", score=False), domain)


def test_released_anchors_that_would_run_something_are_refused_and_do_not(config, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for task in PICO_TASKS:
        file, _ = (write_released_anchors(tmp_path / "released" / task, layer) for layer in (1, 2))
    np.save(file, np.array({"input": Hostile()}, dtype=object), allow_pickle=True)
    source = change(config, "anchors", source=str(tmp_path / "released"))
    with pytest.raises(InputError, match=r"MNLI/dual_anchors_layer_1.npy names `posix.mkdir`.*nothing was executed"):
        adapt(change(source, "run", score=False), domain)
    assert pickle.dumps(Hostile()) and not (tmp_path / "ran").exists()


def edit_config(folder: Path, **fields) -> None:
    architecture = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(architecture))


def labels_of(number: int) -> dict:
    return {
        "id2label": {str(i): f"LABEL_{i}" for i in range(number)},
        "label2id": {f"LABEL_{i}": i for i in range(number)},
    }


@pytest.mark.parametrize(
    ("task", "outputs", "message"),
    [
        ("STS-B", 2, "stsb/model has num_labels 2, but the task STS-B is a regression and has 1"),
        ("CoLA", 1, "cola/model has num_labels 1, but the task CoLA has 2 classes"),
        ("MNLI", 4, "mnli/model has num_labels 4, but the task MNLI has 3 classes"),
    ],
)
def test_a_head_with_another_number_of_outputs_is_refused(own, task, outputs, message):
    edit_config(own.model.path("expert", task), **labels_of(outputs))
    with pytest.raises(InputError, match=message):
        domain.score(own, task, {}, CPU)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if "classifier" not in n}, r"the head in .*/model: class\S+: missing"),
        (lambda t: t | {"classifier.out_proj.bias": torch.ones(3)}, r"classifier.out_proj.bias: \(3,\) against \(2,\)"),
        (lambda t: t | {"classifier.out_proj.bias": torch.full((2,), torch.nan)}, "classifier.out_proj.bias holds NaN"),
    ],
    ids=["missing", "shape", "nan"],
)  # fmt: skip
def test_an_expert_without_a_whole_head_is_refused(own, edit, message):
    rewrite(own.model.path("expert", "CoLA") / "model.safetensors", edit)
    with pytest.raises(InputError, match=message):
        domain.score(own, "CoLA", {}, CPU)


def test_an_encoder_whose_answers_are_not_finite_is_named(own):
    def overflow(tensors):
        tensors["roberta.encoder.layer.1.output.LayerNorm.weight"].fill_(3e38)

    expert = own.model.path("expert", "MNLI")
    rewrite(expert / "model.safetensors", overflow)
    with pytest.raises(InputError, match="mnli/model answers task MNLI with NaN or Inf"):
        domain.score(own, "MNLI", {"x": expert}, CPU)


def test_a_tokenizer_that_does_not_fit_is_refused_the_bases_stands_in(own):
    with pytest.raises(InputError, match="cola/model knows 44 tokens, the encoder embeds 43"):
        scoring.open_tokenizer(own.model, "CoLA", 43)
    for which in ("expert", "base"):
        for file in own.model.path(which, "CoLA").glob("tokenizer*"):
            file.unlink()
        if which == "expert":
            assert len(scoring.open_tokenizer(own.model, "CoLA", 50)) == 44
    with pytest.raises(InputError, match=r"no tokenizer: neither .*cola/model nor .*base holds one of tokenizer.json"):
        scoring.open_tokenizer(own.model, "CoLA", 50)


def test_data_with_missing_columns_or_strange_labels_is_refused_by_name(own):
    tokenizer = scoring.open_tokenizer(own.model, "CoLA", 50)
    for columns, message in (
        ({"sentence": ["w1"], "target": [0]}, "task CoLA lacks the column label; it has sentence, target"),
        ({"text": ["w1"]}, "task CoLA lacks the columns sentence, label; it has text"),
        ({"sentence": ["w1", "w2"], "label": [-1, 2]}, "task CoLA has labels -1 to 2; the task has 0 to 1"),
    ):
        shutil.rmtree(f"{own.eval.data}/CoLA")
        datasets.DatasetDict({"validation": datasets.Dataset.from_dict(columns)}).save_to_disk(f"{own.eval.data}/CoLA")
        with pytest.raises(InputError, match=message):
            scoring.tokenised(own, "CoLA", tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{text: [sentence], labels: 2}", "task X: .*missing .*'metric'"),
        (
            "{text: [sentence], labels: 2, metric: bleu}",
            "task X: unknown metric 'bleu'; choose from accuracy, Matthews",
        ),
        ("{text: [sentence], labels: 1, metric: accuracy}", "task X: accuracy does not fit labels: 1"),
        ("{text: [a], labels: 5, metric: Pearson and Spearman}", "task X: Pearson and Spearman does not fit labels: 5"),
    ],
)
def test_a_row_of_tasks_that_cannot_be_scored_is_refused(tmp_path, row, message):
    (tmp_path / "tasks.yaml").write_text(f"X: {row}\n")
    with pytest.raises(InputError, match=message):
        scoring.read_tasks(tmp_path / "tasks.yaml")


def test_checkpoints_of_another_kind_are_refused(own):
    with pytest.raises(InputError, match="base has model type 'roberta', model.family is 'bert'"):
        construct(change(own, "model", family="bert"), domain)
    with pytest.raises(InputError, match="model.head is not for nlu"):
        construct(change(own, "model", head="x"), domain)
    expert = own.model.path("expert", "CoLA")
    (expert / "model.safetensors").rename(expert / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"cola/model holds none of .*; scripts/convert_checkpoint.py makes .*\.bin"):
        construct(own, domain)


@pytest.mark.parametrize(("content", "message"), [("{", "base/config.json is of no use"), (None, "no config.json")])
def test_a_base_without_a_readable_config_is_refused_in_the_dry_run_too(own, content, message):
    file = own.model.path("base") / "config.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(InputError, match=message):
        construct(own, domain)
    assert message in describe(own, domain)


def test_code_that_comes_with_a_model_is_never_run(own, tmp_path):
    base = own.model.path("base")
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(base, model_type="strange", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(InputError, match="base/config.json is of no use"):
        construct(own, domain)
    assert not (tmp_path / "ran").exists()


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
    assert config.model.path("expert", "SST-2") == Path(f"checkpoints/glue/sst2/roberta-{name}_lr1e-05")


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
