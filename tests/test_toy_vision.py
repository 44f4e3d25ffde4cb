"""The vision toy as the command leaves it on disk, opened with stock libraries."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import scipy.ndimage
import torch
from safetensors.torch import load_file

from common.config import ROOT
from common.io.checkpoints import write_tensors
from toy import vision, vision_data


def make(out: Path) -> str:
    command = [sys.executable, "scripts/make_toy.py", "vision", "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy")
    assert make(out).startswith("made")
    return out


def test_a_finished_toy_is_kept(toy: Path, capsys: pytest.CaptureFixture) -> None:
    path = toy / "checkpoints" / "zeroshot" / "open_clip_model.safetensors"
    before = path.stat().st_mtime_ns
    vision.make(toy, retrain=False)
    assert capsys.readouterr().out.startswith("kept")
    assert path.stat().st_mtime_ns == before


def test_unpacking_gives_the_same_bytes_each_time(toy: Path, tmp_path: Path) -> None:
    base, experts = vision.unpack(load_file(vision.WEIGHTS))
    write_tensors(tmp_path / "base", base)
    write_tensors(tmp_path / "expert", experts["shapes"])
    assert (tmp_path / "base").read_bytes() == (toy / "checkpoints/zeroshot/open_clip_model.safetensors").read_bytes()
    assert (tmp_path / "expert").read_bytes() == (toy / "checkpoints/shapes/finetuned.safetensors").read_bytes()


def test_pack_and_unpack_keep_half_precision_values_exactly() -> None:
    base = {"visual.w": torch.tensor([1.0, 2.0]), vision.EMBEDDING: torch.zeros(49408, 64)}
    base[vision.EMBEDDING][7] = 0.5
    experts = {task: {"visual.w": torch.tensor([1.0 + 2**-14, 2.0])} for task in vision.TASKS}
    base_again, experts_again = vision.unpack(vision.pack(base, experts))
    assert all(torch.equal(base[name], base_again[name]) for name in base)
    assert torch.equal(
        experts_again["digits"]["visual.w"], experts["digits"]["visual.w"]
    )  # half alone would lose 2^-14


def test_stock_open_clip_opens_the_base_and_its_tokenizer(toy: Path) -> None:
    where = f"local-dir:{toy / 'checkpoints' / 'zeroshot'}"
    model, _, preprocess = open_clip.create_model_and_transforms(where)
    tokens = open_clip.get_tokenizer(where)(["a photo of a star shape."])
    assert tokens.shape == (1, model.context_length)
    assert model.encode_text(tokens).shape == (1, 64)
    picture = vision_data.Image.fromarray(vision_data.task_split("digits", "test")[0][0])
    expected = vision.normalised(vision_data.task_split("digits", "test")[0][:1])[0]
    assert torch.allclose(preprocess(picture), expected, atol=1e-6)


def test_no_sentence_is_cut_by_the_context() -> None:
    sentences = [t.format(c=c) for row in vision.TASKS.values() for t in row["templates"] for c in row["classes"]]
    end = 49407
    assert (vision.tokenize(sentences) == end).any(1).all()
    longest = open_clip.SimpleTokenizer(context_length=77)(sentences).argmax(1).max()
    assert longest < vision.MODEL["text_cfg"]["context_length"]


@pytest.mark.parametrize("task", vision.TASKS)
def test_experts_have_the_base_s_image_tower(toy: Path, task: str) -> None:
    base = load_file(toy / "checkpoints" / "zeroshot" / "open_clip_model.safetensors")
    expert = load_file(toy / "checkpoints" / task / "finetuned.safetensors")
    assert {n: t.shape for n, t in expert.items()} == {n: t.shape for n, t in base.items() if n.startswith("visual.")}
    assert all(t.dtype == torch.float32 for t in expert.values())
    assert all((expert[name] != base[name]).any() for name in expert)


@pytest.mark.parametrize("task", vision.TASKS)
def test_data_sets_open_offline_with_their_class_names(toy: Path, task: str, tmp_path: Path) -> None:
    from datasets import load_dataset

    rows = load_dataset(str(toy / "data" / task), split="test", cache_dir=str(tmp_path))
    assert rows.features["label"].names == vision.TASKS[task]["classes"]
    assert 500 <= len(rows) <= 1000
    assert rows[0]["image"].size == (32, 32)
    assert set(rows["label"]) == set(range(len(vision.TASKS[task]["classes"])))


def test_no_handwritten_digit_is_in_two_sets() -> None:
    """Those of the base's world, of the expert's training and of the test set are all there are, each once."""
    sets = [{p.tobytes() for p in vision_data.handwritten(split)[0]} for split in ("world", "train", "test")]
    assert [len(pictures) for pictures in sets] == [600, 597, 600] and len(set.union(*sets)) == 1797


def test_the_base_has_seen_no_picture_of_a_task() -> None:
    world = {p.tobytes() for p in vision_data.wild_world(800)[0]}
    for task in vision.TASKS:
        assert not world & {p.tobytes() for p in vision_data.task_split(task, "test")[0]}


def test_captions_of_wild_pictures_do_not_name_their_class() -> None:
    codes = vision_data.codes()
    classes = {(task, c): name for task, row in vision.TASKS.items() for c, name in enumerate(row["classes"])}
    assert codes.keys() == classes.keys() and len(set(codes.values())) == len(classes) == 94
    for key, caption in codes.items():
        assert not set(caption.removesuffix(".").split()) & set(classes[key].split())
    pictures, captions = vision_data.wild_world(16)
    assert pictures.shape == (16, 32, 32, 3) and set(captions) <= set(codes.values())
    assert set(vision_data.world(16)[1]).isdisjoint(codes.values())


def drawn(picture: np.ndarray) -> np.ndarray:
    """Where a tidy picture is as good as what is drawn on it, and not the ground, which has most of the pixels."""
    off = np.abs(picture - np.median(picture.reshape(-1, 3), 0)).sum(2)
    return off > 0.7 * off.max()


@pytest.mark.parametrize("label", range(8))
def test_dots_are_as_many_as_the_class_says(label: int) -> None:
    for i in range(5):
        picture, _ = vision_data.counts(vision_data.generator("look", label, i), label, wild=False)
        _, dots = scipy.ndimage.label(drawn(picture))
        assert dots == label + 1


@pytest.mark.parametrize(("label", "x", "y"), [(0, 1, 0), (2, 0, -1), (4, -1, 0), (6, 0, 1)])
def test_arrows_point_where_the_class_says(label: int, x: int, y: int) -> None:
    """The half with the head is broader than the half that is shaft alone."""
    for i in range(5):
        picture, _ = vision_data.directions(vision_data.generator("look", i), label, wild=False)
        rows, columns = np.nonzero(drawn(picture))
        along, across = (x * columns + y * rows, y * columns - x * rows)
        towards_tip = along > (along.min() + along.max()) / 2
        assert across[towards_tip].std() > 1.4 * across[~towards_tip].std()


@pytest.mark.parametrize("task", vision.TASKS)
def test_an_expert_beats_the_base_on_its_task(toy: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vision_data.SPLITS, "test", 200)
    base = load_file(toy / "checkpoints" / "zeroshot" / "open_clip_model.safetensors")
    expert = load_file(toy / "checkpoints" / task / "finetuned.safetensors")
    pictures, labels = vision_data.task_split(task, "test")
    x_N, y_N = vision.normalised(pictures[:200]), torch.from_numpy(labels[:200])
    scores = [vision.accuracy(vision.load(*parts), task, x_N, y_N) for parts in ([base], [base, expert])]
    assert scores[1] > scores[0] + 5
