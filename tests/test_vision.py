"""The vision wing end to end on a pico CLIP: both boxes, every start, resuming, and every refusal."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

import common.pipeline as pipeline
from common.config import Model
from common.core.errors import InputError
from common.core.seeding import seeded
from common.domain import Scored
from common.evaluation.rows import read_results
from common.evaluation.scoring import score_run
from common.evaluation.tables import footnotes
from common.io.checkpoints import Checkpoint, read_header, write_tensors
from common.layout import SAME_REST
from common.pipeline import adapt, construct, merge_alone
from common.planning.dry_run import describe
from common.run.run_log import processor
from helpers import change, files_of, rewrite
from pico_vision import COCA, PICO_TASKS, write_pico_clip
from Vision import domain, open_clip_models, zero_shot


@pytest.fixture
def own_inputs(pico_inputs, pico_config, tmp_path):
    """A copy of the pico checkpoints that a test may damage, and the config that reads it."""
    shutil.copytree(pico_inputs / "clip", tmp_path / "clip")
    return tmp_path / "clip", change(pico_config, "model", root=str(tmp_path / "clip"))


def test_every_start_gives_a_checkpoint_that_stock_open_clip_opens(pico_config):
    for init in ("weight", "gauss"):
        grid = change(change(pico_config, "anchors", init=init), "run", score=False)
        construct(grid, domain)
        for start in ("pretrained", "average", "ta", "tsv", "wudi"):
            folder = adapt(change(grid, "start", method=start), domain)
            clip = open_clip.create_model(f"local-dir:{folder}")
            assert clip.encode_image(torch.zeros(1, 3, 16, 16)).isfinite().all()
    score_run(pico_config, domain)
    results = json.loads((pico_config.run.dir / "results.json").read_text())
    assert Counter(r["method"] for r in results["rows"]) == {
        "pretrained": 2, "individual": 2, "average": 4, "ta": 4, "tsv": 4, "wudi": 4, "fda": 20,
    }  # fmt: skip
    assert Counter(r["label"] for r in results["rows"] if r["method"] == "ta") == {"": 2, SAME_REST: 2}
    assert all(r["n"] == 20 and 0 <= r["value"] <= 1 and r["metric"] == "accuracy" for r in results["rows"])
    assert (pico_config.run.dir / "matching_weight.png").stat().st_size > 1000


def test_the_score_is_the_accuracy_of_a_plain_loop(pico_config, pico_inputs):
    """Individual on MNIST, by hand: stock model, stock preprocessing, zero-shot head, argmax."""
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{pico_inputs / 'clip' / 'base'}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{pico_inputs / 'clip' / 'base'}")
    with torch.no_grad():
        prompts = clip.encode_text(tokenize([f'a photo of the number: "{c}".' for c in range(10)]), normalize=True)
        clip.load_state_dict(Checkpoint(pico_inputs / "clip/MNIST/finetuned.safetensors").read_under(""), strict=False)
        records = datasets.load_dataset(str(pico_inputs / "data" / "MNIST"), split="test")
        images = clip.encode_image(torch.stack([preprocess(r["image"]) for r in records]), normalize=True)
    expected = ((images @ prompts.T).argmax(1) == torch.tensor(records["label"])).float().mean().item()
    file = dict(
        domain.score(pico_config, "MNIST", {"x": Path(pico_config.model.path("expert", "MNIST"))}, torch.device("cpu"))
    )
    assert file["x"][:2] == (pytest.approx(expected), 20)


@torch.no_grad()
def test_a_coca_is_merged_and_scored_as_open_clip_would(pico_config, tmp_path):
    """Its image tower gives the tokens besides, for the decoder of captions, which is the base's."""
    write_pico_clip(tmp_path / "coca", fields=COCA)
    config = change(change(pico_config, "model", root=str(tmp_path / "coca")), "start", method="ta", hyper={})
    folder = merge_alone(change(config, "run", score=False), domain)
    clip = open_clip.create_model(f"local-dir:{folder}").eval()
    base = load_file(tmp_path / "coca" / "base" / "open_clip_model.safetensors")
    towers = [load_file(tmp_path / "coca" / task / "finetuned.safetensors") for task in PICO_TASKS]
    for name, tensor in clip.state_dict().items():
        moved = 0.3 * sum(tower[name] - base[name] for tower in towers) if name in towers[0] else 0
        torch.testing.assert_close(tensor, base[name] + moved, atol=1e-6, rtol=1e-6)
    empty, prefix, _ = open_clip_models.classifier(config, "MNIST")
    images = torch.randn(2, 3, 16, 16)
    ours = domain.filled(empty, prefix, config.model, folder, torch.device("cpu"))(pixel_values=images)
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    prompts = clip.encode_text(tokenize([f'a photo of the number: "{c}".' for c in range(10)]), normalize=True)
    torch.testing.assert_close(ours, clip.logit_scale.exp() * clip.encode_image(images, normalize=True) @ prompts.T)


def test_every_weight_is_read_once(pico_config, monkeypatch):
    reads = Counter()
    read = Checkpoint.read

    def counting(self, names):
        names = list(names)
        reads.update((self.path, name) for name in names)
        return read(self, names)

    monkeypatch.setattr(Checkpoint, "read", counting)
    construct(pico_config, domain)
    assert set(reads.values()) == {1}
    assert len(reads) == 3 * 2 * 12  # base and two experts, two blocks of twelve tensors


def test_interrupted_work_goes_on_and_ends_with_the_same_bytes(pico_config, monkeypatch):
    alone = change(pico_config, "run", name="alone", score=False)
    construct(alone, domain)
    adapt(alone, domain)
    stopped = change(pico_config, "run", name="stopped", score=False)
    for stage in (construct, adapt):
        for survived in (1, 2):
            with monkeypatch.context() as patch:
                patch.setattr("common.run.progress.UnitBar.advance", dying_after(survived))
                with pytest.raises(KeyboardInterrupt):
                    stage(stopped, domain)
        stage(stopped, domain)
    for folder in ("anchors", "merged"):
        assert files_of(alone.run.dir / folder) == files_of(stopped.run.dir / folder)


def test_scores_are_kept_model_by_model(pico_config):
    """Also those of a test set that was not finished."""
    asked = []

    def scoring(models):
        def score(config, task, checkpoints, device):
            for name in checkpoints:
                if len(asked) == models:
                    raise KeyboardInterrupt
                asked.append((task, name))
                yield name, Scored(0.5, 7, "")

        return SimpleNamespace(**vars(domain) | {"score": score})

    with pytest.raises(KeyboardInterrupt):
        score_run(pico_config, scoring(models=1))
    score_run(pico_config, scoring(models=100))
    expected = [(task, name) for task in ("MNIST", "SVHN") for name in ("Pretrained", "Individual")]
    assert sorted(asked) == sorted(expected)


def dying_after(calls):
    left = [calls]

    def advance(self, fraction, loss):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    return advance


def test_units_computed_alone_and_in_another_order_are_the_same(pico_config):
    construct(pico_config, domain)
    other = change(replace(pico_config, tasks=PICO_TASKS[::-1]), "run", name="other")
    for block in (1, 0):
        construct(change(other, "run", blocks=[block]), domain)
    assert files_of(pico_config.run.dir / "anchors") == files_of(other.run.dir / "anchors")


def test_blocks_adapted_apart_are_put_together_with_the_last(pico_config):
    whole = change(pico_config, "run", score=False)
    construct(whole, domain)
    expected = files_of(adapt(whole, domain), "*.safetensors")
    shutil.rmtree(whole.run.dir / "merged")
    assert adapt(change(whole, "run", blocks=[1]), domain) is None
    assert not list(whole.run.dir.glob("merged/fda*/open_clip_model*"))
    assert files_of(adapt(change(whole, "run", blocks=[0]), domain), "*.safetensors") == expected


def test_two_processes_that_adapt_at_once_end_with_one_whole_model(pico_config, monkeypatch, capsys):
    """The other is done, and has removed its blocks, while this one still fits its last."""
    config, fit = change(pico_config, "run", score=False), pipeline.adapt_blocks
    construct(config, domain)
    expected = files_of(adapt(change(config, "adapt", label="alone"), domain), "*.safetensors")

    def slower(*arguments):
        with monkeypatch.context() as other:
            other.setattr(pipeline, "adapt_blocks", fit)
            adapt(config, domain)
        experiment, _, provenance = arguments
        fit(replace(experiment, config=change(config, "run", score=False, blocks=[1])), domain, provenance)

    monkeypatch.setattr(pipeline, "adapt_blocks", slower)
    assert files_of(adapt(config, domain), "*.safetensors") == expected
    assert "not put together" not in capsys.readouterr().out


def test_a_second_run_touches_nothing(pico_config):
    times = []
    for _ in range(2):
        construct(pico_config, domain)
        adapt(pico_config, domain)
        times.append([f.stat().st_mtime_ns for f in sorted(pico_config.run.dir.rglob("*.safetensors"))])
    assert times[0] == times[1] and len(times[0]) == 5  # four units and the merged model


def test_without_a_step_the_anchors_are_those_that_it_would_begin_with(pico_config):
    still = change(change(pico_config, "anchors", steps=0, init="gauss"), "run", score=False)
    construct(still, domain)
    file = still.run.dir / "anchors/gauss/MNIST/block_00.safetensors"
    first = 0.01 * torch.randn(4, 5, 16, generator=seeded(0, "anchors", "MNIST", 0))
    torch.testing.assert_close(load_file(file)["anchors"], first)


def test_the_seed_changes_the_anchors(pico_config):
    construct(pico_config, domain)
    other = change(pico_config, "run", name="other", seed=1)
    construct(other, domain)
    one, two = files_of(pico_config.run.dir / "anchors"), files_of(other.run.dir / "anchors")
    assert len(set(one.values()) | set(two.values())) == len(one) + len(two)


def test_rest_follows_the_config(pico_config, pico_inputs):
    config = change(change(pico_config, "start", method="ta"), "run", score=False)
    construct(config, domain)
    name = "visual.conv1.weight"
    base = Checkpoint(pico_inputs / "clip" / "base").read([name])[name]
    experts = [Checkpoint(config.model.path("expert", t)).read([name])[name] for t in PICO_TASKS]
    merged = {"pretrained": base, "start": base + 0.3 * sum(e - base for e in experts)}
    for rest, expected in merged.items():
        folder = adapt(change(config, "adapt", rest=rest, label=rest), domain)
        torch.testing.assert_close(Checkpoint(folder).read([name])[name], expected)


def test_one_expert_merged_with_weight_one_is_that_expert(pico_config):
    config = change(replace(pico_config, tasks=["MNIST"]), "start", method="ta", hyper={"ta": {"scale": 1.0}})
    merged, expert = Checkpoint(merge_alone(config, domain)), Checkpoint(config.model.path("expert", "MNIST"))
    for name in expert.names("visual."):
        torch.testing.assert_close(merged.read([name])[name], expert.read([name])[name])


def test_wudi_leaves_what_is_outside_the_blocks_at_the_base(pico_config):
    merged = Checkpoint(merge_alone(change(pico_config, "start", method="wudi"), domain))
    base = Checkpoint(pico_config.model.path("base"))
    same = [n for n in base.names("visual.") if torch.equal(merged.read([n])[n], base.read([n])[n])]
    assert all("resblocks" not in n or "bias" in n or "ln_" in n for n in same)
    assert "visual.conv1.weight" in same and "visual.transformer.resblocks.0.mlp.c_fc.weight" not in same


def test_released_anchors_are_used_in_place(pico_config, tmp_path):
    for task in PICO_TASKS:
        (tmp_path / "released" / task).mkdir(parents=True)
        for layer in (1, 2):
            x_TAD = np.random.default_rng(layer).normal(size=(5, 4, 16)).astype(np.float32)
            np.save(tmp_path / "released" / task / f"dual_anchors_layer_{layer}.npy", x_TAD)
    adapt(change(pico_config, "anchors", source=str(tmp_path / "released")), domain)
    with pytest.raises(InputError, match=r"anchors made elsewhere, .*released: none are to be constructed"):
        construct(change(pico_config, "anchors", source=str(tmp_path / "released")), domain)
    missing = tmp_path / "released" / "SVHN" / "dual_anchors_layer_2.npy"
    missing.write_bytes(missing.read_bytes()[:-40])
    with pytest.raises(InputError, match="dual_anchors_layer_2.npy"):
        config = change(pico_config, "anchors", source=str(tmp_path / "released"))
        adapt(change(config, "adapt", label="again"), domain)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("visual.ln_pre.bias"), "visual.ln_pre.bias: missing"),
        (lambda t: t.update({"visual.extra": torch.ones(1)}), "visual.extra: extra"),
        (lambda t: t.update({"visual.proj": torch.ones(16, 9)}), r"visual.proj: \(16, 9\) against \(16, 8\)"),
    ],
)
def test_an_expert_that_does_not_fit_is_refused_by_tensor(own_inputs, edit, message):
    root, config = own_inputs
    rewrite(root / "SVHN" / "finetuned.safetensors", edit)
    with pytest.raises(InputError, match="SVHN/finetuned.safetensors: " + message):
        construct(config, domain)
    assert not config.run.dir.exists()


def test_an_expert_that_is_a_tower_alone_is_merged_as_within_the_model(own_inputs):
    root, config = own_inputs
    config = change(change(config, "start", method="average"), "run", score=False)
    expected = load_file(merge_alone(config, domain) / "open_clip_model.safetensors")
    for task in PICO_TASKS:
        file = root / task / "finetuned.safetensors"
        rewrite(file, lambda t: {name.removeprefix("visual."): x for name, x in t.items()})
        assert "conv1.weight" in load_file(file)
    merged = load_file(merge_alone(change(config, "run", name="bare"), domain) / "open_clip_model.safetensors")
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], x) for name, x in expected.items())


def test_a_base_of_another_architecture_is_refused_by_tensor(own_inputs):
    with pytest.raises(InputError, match=r"open_clip_config.json: embed_dim is 8, not 512; .* as model.arch ViT-B-32"):
        construct(change(own_inputs[1], "model", arch="ViT-B-32"), domain)
    (own_inputs[0] / "base" / "open_clip_config.json").unlink()
    with pytest.raises(InputError, match=r"clip/base: .*resblocks.0.attn.in_proj_bias: \(48,\) against \(2304,\)"):
        construct(change(own_inputs[1], "model", arch="ViT-B-32"), domain)


def test_an_expert_that_equals_the_base_is_refused(own_inputs):
    root, config = own_inputs
    base = Checkpoint(root / "base")
    write_tensors(root / "SVHN" / "finetuned.safetensors", base.read(base.names("visual.")))
    with pytest.raises(InputError, match="expert of SVHN, .* equals the base in every anchored block"):
        construct(config, domain)


def test_an_expert_with_one_frozen_block_is_welcome(own_inputs):
    root, config = own_inputs
    prefix = "visual.transformer.resblocks.0."
    frozen = {prefix + n: t for n, t in Checkpoint(root / "base").read_under(prefix).items()}
    rewrite(root / "SVHN" / "finetuned.safetensors", lambda t: t.update(frozen))
    construct(config, domain)
    adapt(config, domain)


def test_nan_in_a_checkpoint_is_refused_by_tensor(own_inputs):
    root, config = own_inputs
    name = "visual.transformer.resblocks.1.ln_1.weight"
    rewrite(root / "SVHN" / "finetuned.safetensors", lambda t: t[name].fill_(torch.nan))
    with pytest.raises(InputError, match=f"SVHN/finetuned.safetensors: the tensor {name} holds NaN"):
        construct(config, domain)
    assert not (config.run.dir / "anchors/weight/SVHN/block_01.safetensors").exists()


def test_a_loss_that_is_not_finite_names_task_block_and_step(own_inputs):
    root, config = own_inputs
    name = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    rewrite(root / "SVHN" / "finetuned.safetensors", lambda t: t[name].fill_(1e38))
    with pytest.raises(InputError, match="construct: SVHN, block 1: the matching loss is (nan|inf) at step 0"):
        construct(config, domain)


def test_anchors_of_another_config_are_refused_by_field_and_stay(pico_config):
    construct(pico_config, domain)
    before = files_of(pico_config.run.dir / "anchors")
    for config, field in [
        (change(pico_config, "anchors", steps=6), r"anchors\.steps = 5, now it is 6"),
        (change(pico_config, "anchors", number=5), r"anchors\.shape = \[4, 5, 16\], now it is \[5, 5, 16\]"),
        (change(pico_config, "anchors", weights="norm"), r"anchors\.weights = equal, now it is norm"),
        (change(pico_config, "run", seed=1), r"run\.seed = 0, now it is 1"),
    ]:
        for stage in (construct, adapt):
            with pytest.raises(InputError, match=field):
                stage(config, domain)
    assert files_of(pico_config.run.dir / "anchors") == before


def test_tensors_count_by_their_weights_where_the_config_says_so(pico_config):
    losses = {}
    for weights in ("equal", "size"):
        run = replace(pico_config.run, name=weights)
        config = replace(change(pico_config, "anchors", weights=weights, steps=0), run=run)
        construct(config, domain)
        losses[weights] = read_header(config.run.dir / "anchors/weight/SVHN/block_01.safetensors")["losses"]
    bias, matrix = "mlp.c_fc.bias", "mlp.c_fc.weight"  # 64 and 64 x 16 entries; the initial anchors are the same
    ratio = {name: losses["size"][name] / losses["equal"][name] for name in losses["equal"]}
    assert ratio[matrix] == pytest.approx(16 * ratio[bias])
    assert sum(ratio.values()) == pytest.approx(len(ratio))


def test_anchors_of_another_expert_are_refused(own_inputs):
    root, config = own_inputs
    construct(config, domain)
    rewrite(root / "SVHN" / "finetuned.safetensors", lambda t: [x.mul_(1.1) for x in t.values()])
    with pytest.raises(InputError, match=r"SVHN/block_00.safetensors was made with weights\.expert"):
        construct(config, domain)


def test_missing_and_truncated_anchors_are_named(pico_config):
    with pytest.raises(InputError, match=r"there are no anchors at .*MNIST/block_00.safetensors"):
        adapt(pico_config, domain)
    construct(pico_config, domain)
    file = pico_config.run.dir / "anchors/weight/SVHN/block_01.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"SVHN/block_01.safetensors is truncated"):
        adapt(pico_config, domain)


def test_a_row_says_what_made_the_model_and_which_commit_scored_it(pico_config, monkeypatch):
    """A merge that is kept may be of earlier code than its scores."""
    monkeypatch.setattr("common.assembly.commit", lambda: "earlier")
    merge_alone(change(pico_config, "start", method="ta"), domain)
    monkeypatch.undo()
    score_run(pico_config, domain)
    rows, _ = read_results(pico_config.run.dir / "results.json")
    made = {row["method"]: row.get("made") for row in rows}
    assert made == {"pretrained": None, "individual": None, "ta": "earlier"}
    assert re.search("commits .*earlier", footnotes(rows, None))
    assert {row.get("made_on") for row in rows} == {None, processor()} and processor().endswith(")")
    assert f"Made on {processor()}." in footnotes(rows, None)


def test_a_result_of_other_settings_is_refused_unless_it_gets_a_label(pico_config):
    config = change(pico_config, "run", score=False)
    construct(config, domain)
    adapt(config, domain)
    longer = change(config, "adapt", epochs=3)
    with pytest.raises(InputError, match=r"adapt\.epochs = 2, now it is 3"):
        adapt(longer, domain)
    assert adapt(change(longer, "adapt", label="longer"), domain).name == "fda-pretrained-weight-longer"


def test_without_a_text_tower_the_error_says_what_would_help(own_inputs):
    root, config = own_inputs
    rewrite(root / "base" / "open_clip_model.safetensors", lambda t: t.pop("transformer.resblocks.0.ln_1.bias"))
    with pytest.raises(InputError, match=r"no text tower: .*lacks transformer.resblocks.0.ln_1.bias; model.text"):
        merge_alone(change(config, "start", method="ta"), domain)
    shutil.copytree(config.model.path("base").parent.parent / "clip", root.parent / "copy", dirs_exist_ok=True)


def test_missing_data_names_the_folder_and_the_hub_id(pico_config, monkeypatch):
    def no_hub(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", no_hub)
    with pytest.raises(InputError, match=r"no data for task MNIST: a folder nowhere/MNIST, or the hub's ylecun/mnist"):
        score_run(change(pico_config, "eval", data="nowhere"), domain)


@pytest.mark.parametrize("layout", ["save_to_disk", "imagefolder"])
def test_other_local_layouts_give_the_same_score(pico_config, pico_inputs, tmp_path, layout):
    records = datasets.load_dataset(str(pico_inputs / "data" / "MNIST"), split="test")
    if layout == "save_to_disk":
        datasets.DatasetDict({"test": records}).save_to_disk(str(tmp_path / "data" / "MNIST"))
    else:
        for i, record in enumerate(records):
            folder = tmp_path / "data" / "MNIST" / "test" / str(record["label"])
            folder.mkdir(parents=True, exist_ok=True)
            record["image"].save(folder / f"{i}.png")
    path = {"x": pico_config.model.path("expert", "MNIST")}
    expected = dict(domain.score(pico_config, "MNIST", path, torch.device("cpu")))
    other = change(pico_config, "eval", data=str(tmp_path / "data"))
    found = dict(domain.score(other, "MNIST", path, torch.device("cpu")))
    assert found["x"][:2] == expected["x"][:2]  # the files are in another order


def test_data_of_another_number_of_classes_is_refused(pico_config, pico_inputs, tmp_path):
    shutil.copytree(pico_inputs / "data" / "MNIST", tmp_path / "data" / "DTD")
    with pytest.raises(InputError, match="data of task DTD has 10 classes; .* has 47"):
        domain.labelled_images(change(pico_config, "eval", data=str(tmp_path / "data")), "DTD")


def test_a_head_file_is_used_where_there_is_one(own_inputs):
    root, config = own_inputs
    model = replace(config.model, head="head_{task}.safetensors")
    built = zero_shot.head_of(model, "MNIST", open_clip_models.text_directions)
    assert built.shape == (10, 8)
    write_tensors(root / "head_MNIST.safetensors", {"weight": built * 2, "bias": torch.zeros(10)})
    torch.testing.assert_close(zero_shot.head_of(model, "MNIST", open_clip_models.text_directions), built * 2)
    write_tensors(root / "head_MNIST.safetensors", {"weight": built[:9]})
    with pytest.raises(InputError, match="has 9 classes, the task MNIST has 10"):
        zero_shot.head_of(model, "MNIST", open_clip_models.text_directions)


def test_position_embeddings_are_refused_where_there_are_none(pico_config):
    with pytest.raises(InputError, match="anchors.position_embeddings is on, but the models have none"):
        construct(change(pico_config, "anchors", position_embeddings=True), domain)


def test_the_validation_cut_is_a_tenth_of_the_training_images(pico_config, pico_inputs, tmp_path):
    shutil.copytree(pico_inputs / "data" / "MNIST", tmp_path / "data" / "MNIST")
    for file in (tmp_path / "data" / "MNIST").iterdir():
        file.rename(file.with_name(file.name.replace("test", "train")))
    cut = change(pico_config, "eval", split="validation_cut", data=str(tmp_path / "data"))
    assert len(domain.labelled_images(cut, "MNIST")) == 2
    with pytest.raises(InputError, match="no split 'train'"):
        domain.labelled_images(change(pico_config, "eval", split="validation_cut"), "MNIST")


def test_a_family_that_the_base_is_not_of_is_refused(pico_config):
    with pytest.raises(InputError, match="unknown model.family 'vgg'; .*/base is of open_clip"):
        construct(change(pico_config, "model", family="vgg"), domain)


def test_the_dry_run_names_what_is_missing_and_what_is_needed(pico_config):
    text = describe(change(pico_config, "model", root="/nowhere", arch="ViT-B-32-quickgelu"), domain).text
    for line in (
        "MISSING    base: there is no checkpoint at /nowhere/base",
        "MISSING    expert SVHN",
        "12 x visual.transformer.resblocks.N, 12 tensors, 27 MiB; D 768",
        "GFLOP",
    ):
        assert line in text
    assert "found      expert MNIST" in describe(pico_config, domain).text
    assert "Needs: not known yet" in describe(change(pico_config, "model", root="/nowhere"), domain).text


@pytest.mark.parametrize(("few", "expected"), [(2**25, "float32"), (0, "bf16")])
def test_the_dry_run_names_the_precision_that_pays(pico_config, monkeypatch, few, expected):
    monkeypatch.setattr("common.fda.precision.FEW", few)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    text = describe(change(pico_config, "run", precision="bf16", device="cpu"), domain).text
    assert f"construct, in      {expected}\n" in text


def test_an_unknown_architecture_is_named():
    with pytest.raises(InputError, match="open_clip cannot build model.arch 'ViT-X'"):
        domain.skeleton(Model(arch="ViT-X"))
