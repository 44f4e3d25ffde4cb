"""Which file of a folder is the model, against what transformers and open_clip choose; and what is none is named."""

import json
import shutil

import open_clip.factory
import pytest
import torch
from safetensors.torch import save_file
from transformers import modeling_utils

from common.core.errors import InputError
from common.io import headers, model_files
from common.io.checkpoints import Checkpoint
from common.io.model_config import config_file
from common.io.model_files import INDEX_FILE, find_model, folder_of, weight_files

ONE, TWO = {"a": torch.ones(3), "b": torch.zeros(2)}, {"a": torch.ones(3), "b": torch.zeros(2) + 1}
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def write_sharded(folder, tensors, index=INDEX_FILE):
    """One tensor a shard, and the index."""
    for shard, (name, tensor) in zip(SHARDS, tensors.items(), strict=True):
        save_file({name: tensor}, folder / shard)
    weight_map = dict(zip(tensors, SHARDS, strict=True))
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def transformers_choice(folder, explicit=None):
    """The files that from_pretrained(folder) opens."""
    files, _ = modeling_utils._get_resolved_checkpoint_files(str(folder), None, None, None, None, False, explicit)
    return sorted(files)


def found(folder):
    return sorted(map(str, find_model(folder).files))


def refusal(path):
    with pytest.raises(InputError) as error:
        Checkpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "open_clip_model.safetensors", "a.safetensors"])
def test_a_file_of_a_name_of_ones_own_has_nothing_beside_it(tmp_path, name):
    """Its neighbours may be of other models; and a config of transformers beside a file of open_clip is not its own."""
    (tmp_path / "config.json").write_text("{}")
    assert folder_of(tmp_path / name) == (tmp_path / name if name == "a.safetensors" else tmp_path)
    beside = tmp_path / "config.json" if name == "model.safetensors" else None
    assert folder_of(tmp_path) == tmp_path and config_file(tmp_path / name) == beside


# ---- what the stock library opens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["single", "sharded", "both", "index alone left", "index broken", "leftovers"])
def test_transformers_folders(tmp_path, layout):
    if layout != "sharded":
        save_file(ONE, tmp_path / "model.safetensors")
    if layout != "single":
        write_sharded(tmp_path, ONE)
    if layout == "index alone left":
        (tmp_path / SHARDS[1]).unlink()
    if layout == "index broken":
        (tmp_path / INDEX_FILE).write_text("{")
    if layout == "leftovers":
        (tmp_path / INDEX_FILE).unlink()
        for name in ("consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"):
            save_file(TWO, tmp_path / name)
        (tmp_path / "pytorch_model.bin").write_bytes(b"old")
    assert found(tmp_path) == transformers_choice(tmp_path)
    assert {n: t.tolist() for n, t in Checkpoint(tmp_path).read_under("").items()} == {"a": [1, 1, 1], "b": [0, 0]}


def test_a_config_can_name_the_file(tmp_path):
    save_file(TWO, tmp_path / "model.safetensors")
    save_file(ONE, tmp_path / "other.safetensors")
    (tmp_path / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    assert found(tmp_path) == transformers_choice(tmp_path, "other.safetensors")
    (tmp_path / "config.json").write_text('{"transformers_weights": "../other.safetensors"}')
    assert "outside its folder" in refusal(tmp_path)


OPEN_CLIP = [
    ["open_clip_model.safetensors", "model.safetensors"],
    ["open_clip_pytorch_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin"],
    ["model.safetensors", "pytorch_model.bin", "epoch_3.safetensors"],
    ["epoch_3.safetensors", "epoch_3.bin"],
]


@pytest.mark.parametrize("files", OPEN_CLIP, ids=lambda files: files[0])
def test_open_clip_folders(tmp_path, files):
    """model.safetensors holds other names, as the CLIP of transformers has them."""
    (tmp_path / "open_clip_config.json").write_text("{}")
    for name in files:
        hugging_face = name == "model.safetensors" and files[0] != name
        save_file({"vision_model.a": torch.ones(1)} if hugging_face else ONE, tmp_path / name)
    assert found(tmp_path) == [open_clip.factory._find_checkpoint_in_dir(tmp_path)] == [str(tmp_path / files[0])]


@pytest.mark.parametrize("damage", ["pointer", "dangling", "truncated"])
def test_a_useless_copy_for_transformers_does_not_hinder_open_clip(tmp_path, damage):
    save_file(ONE, tmp_path / "open_clip_model.safetensors")
    beside = tmp_path / "model.safetensors"
    if damage == "dangling":
        beside.symlink_to("../gone")
    else:
        beside.write_text("version https://git-lfs.github.com/spec/v1\n" if damage == "pointer" else "{")
    assert found(tmp_path) == [str(tmp_path / "open_clip_model.safetensors")]


def test_open_clip_s_own_pickle_goes_before_a_model_for_transformers(tmp_path):
    save_file(ONE, tmp_path / "model.safetensors")
    torch.save(ONE, tmp_path / "open_clip_pytorch_model.bin")
    assert open_clip.factory._find_checkpoint_in_dir(tmp_path).endswith("open_clip_pytorch_model.bin")
    assert "open_clip opens" in refusal(tmp_path) and "convert_checkpoint.py" in refusal(tmp_path)


def test_the_dry_run_is_told_what_is_read_and_what_is_not(tmp_path):
    save_file(ONE, tmp_path / "model.safetensors")
    assert str(find_model(tmp_path)) == "model.safetensors"
    save_file(ONE, tmp_path / "consolidated.safetensors")
    assert str(find_model(tmp_path)) == "model.safetensors; not read: consolidated.safetensors"
    for number in range(4):
        save_file(ONE, tmp_path / f"old-{number}.safetensors")
    expected = "model.safetensors; not read: consolidated.safetensors, old-0.safetensors, old-1.safetensors, 2 more"
    assert str(find_model(tmp_path)) == expected


# ---- two candidates --------------------------------------------------------------------------------------------------

UNLIKE = {
    "value": {"a": torch.ones(3), "b": torch.tensor([0.0, 1e-30])},
    "type": {"a": torch.ones(3), "b": torch.zeros(2).half()},
    "shape": {"a": torch.ones(3), "b": torch.zeros(3)},
    "name": {"a": torch.ones(3), "c": torch.zeros(2)},
}


@pytest.mark.parametrize("difference", UNLIKE)
def test_a_single_file_and_shards_that_differ_are_refused(tmp_path, difference):
    save_file(ONE, tmp_path / "model.safetensors")
    write_sharded(tmp_path, UNLIKE[difference])
    said = refusal(tmp_path)
    assert f"holds two models, model.safetensors and {INDEX_FILE}, which differ in b" in said and "remove" in said


@pytest.mark.parametrize("other", ["open_clip_pytorch_model.safetensors", "model.safetensors"])
def test_two_files_of_one_naming_in_open_clip_s_folder_must_agree(tmp_path, other):
    save_file(ONE, tmp_path / "open_clip_model.safetensors")
    save_file(ONE, tmp_path / other)
    assert found(tmp_path) == [str(tmp_path / "open_clip_model.safetensors")]
    save_file(TWO, tmp_path / other)
    assert f"two models, open_clip_model.safetensors and {other}, which differ in b" in refusal(tmp_path)


def test_two_unknown_names_in_open_clip_s_folder_must_agree(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    for name, tensors in (("epoch_1.safetensors", ONE), ("epoch_2.safetensors", TWO)):
        save_file(tensors, tmp_path / name)
    assert "epoch_1.safetensors and epoch_2.safetensors, which differ in b" in refusal(tmp_path)


def test_bytes_beyond_the_first_piece_are_compared_and_only_once(tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "CHUNK_BYTES", 8)
    large = {"a": torch.arange(99.0), "b": torch.zeros(2)}
    save_file(large, tmp_path / "model.safetensors")
    write_sharded(tmp_path, large)
    assert Checkpoint(tmp_path).shapes == {"a": (99,), "b": (2,)}
    monkeypatch.setattr(model_files, "same_bytes", None)
    assert Checkpoint(tmp_path).shapes == {"a": (99,), "b": (2,)}
    monkeypatch.undo()
    large["a"][98] = -1
    write_sharded(tmp_path, large)
    assert "differ in a" in refusal(tmp_path)


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path):
    write_sharded(tmp_path, ONE)
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / SHARDS[0])
    assert "the tensor b is in two shards" in refusal(tmp_path)
    save_file({"c": torch.ones(3)}, tmp_path / SHARDS[0])
    assert f"{INDEX_FILE} has the tensor a in {SHARDS[0]}, which lacks it" in refusal(tmp_path)


# ---- caches, links, pointers, ids ------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path):
    """A model as the hub's cache keeps it: links in a snapshot to blobs, and refs."""
    root = tmp_path / "hub" / "models--lab--pico"
    for name in ("blobs", "refs", "snapshots/abc", "snapshots/aaa"):
        (root / name).mkdir(parents=True)
    save_file(ONE, root / "blobs" / "0f")
    (root / "snapshots" / "abc" / "model.safetensors").symlink_to("../../blobs/0f")
    (root / "refs" / "main").write_text("abc\n")
    return root


def test_a_snapshot_is_opened_through_its_links(cached):
    assert Checkpoint(cached / "snapshots" / "abc").shapes == {"a": (3,), "b": (2,)}


@pytest.mark.parametrize("below", ["", "snapshots"])
def test_the_root_of_a_cached_model_is_called_so(cached, below):
    assert f"a model in a cache of the hub, name its snapshot {cached / 'snapshots' / 'abc'}" in refusal(cached / below)


def test_a_cache_is_called_so(cached):
    snapshot = cached / "snapshots" / "abc"
    assert f"it is a cache of the hub, name a snapshot in it such as {snapshot}" in refusal(cached.parent)
    shutil.rmtree(cached / "snapshots")
    assert "a model in a cache of the hub without a snapshot, download it again" in refusal(cached)


def test_a_link_to_nothing_is_called_so(cached):
    (cached / "blobs" / "0f").unlink()
    said = refusal(cached / "snapshots" / "abc")
    assert "model.safetensors is a link to ../../blobs/0f, which is not there; download it again" in said
    (cached / "link").symlink_to("nowhere")
    assert "link is a link to nowhere, which is not there" in refusal(cached / "link")


def test_shards_that_are_not_there_are_named(tmp_path):
    write_sharded(tmp_path, ONE)
    (tmp_path / SHARDS[1]).unlink()
    assert f"there is no file {tmp_path / SHARDS[1]}, which {INDEX_FILE} names" in refusal(tmp_path)
    (tmp_path / SHARDS[1]).symlink_to("../gone")
    assert f"{SHARDS[1]} is a link to ../gone, which is not there" in refusal(tmp_path)


def test_an_id_of_the_hub_is_no_path(cached, monkeypatch):
    said = refusal(cached / "lab" / "other")
    assert f"if lab/other is an id of the hub, `hf download lab/other --local-dir {cached / 'lab/other'}`" in said
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cached.parent))
    for place in ("lab/pico", "elsewhere/lab/pico"):
        assert f"this machine's cache: name {cached / 'snapshots' / 'abc'}" in refusal(cached.parent / place)
    assert refusal(cached / "missing") == f"there is no checkpoint at {cached / 'missing'}"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 25248\n"
MISTAKEN = {
    "is a Git LFS pointer, not the 25,248 bytes of weights; `git lfs pull`": POINTER.encode(),
    "is a git-annex pointer": b"/annex/objects/SHA256E-s25248--00.safetensors\n",
    "is a GGUF file; transformers makes safetensors of it": b"GGUF\x03\x00\x00\x00" + bytes(40),
    "is a web page": b"<!DOCTYPE html><html>",
    "is the hub's answer that it has no such file": b"Entry not found",
    "is empty; download it again": b"",
    "is truncated or no safetensors file": b"\x80\x02\x00\x00\x00\x00\x00\x00{",
}


@pytest.mark.parametrize("what", MISTAKEN)
@pytest.mark.parametrize("place", ["model.safetensors", "open_clip_model.safetensors", SHARDS[0], "alone.safetensors"])
def test_what_is_no_safetensors_file_is_called_what_it_is(tmp_path, what, place):
    if place == SHARDS[0]:
        write_sharded(tmp_path, ONE)
    (tmp_path / place).write_bytes(MISTAKEN[what])
    said = refusal(tmp_path / place if place.startswith("alone") else tmp_path)
    assert f"{tmp_path / place} {what}" in said


@pytest.mark.parametrize("new", [True, False], ids=["archive", "stream"])
def test_a_pickle_under_another_name_is_called_so(tmp_path, new):
    torch.save(ONE, tmp_path / "model.safetensors", _use_new_zipfile_serialization=new)
    assert "convert_checkpoint.py makes safetensors of it" in refusal(tmp_path)


def test_a_pointer_in_the_place_of_an_index_is_called_so(tmp_path):
    (tmp_path / INDEX_FILE).write_text(POINTER)
    assert f"{INDEX_FILE} is a Git LFS pointer" in refusal(tmp_path)
    assert "is a Git LFS pointer" in refusal(tmp_path / INDEX_FILE)
    write_sharded(tmp_path, ONE)
    assert f"is an index; name its folder, {tmp_path}" in refusal(tmp_path / INDEX_FILE)


# ---- folders without a model to open ---------------------------------------------------------------------------------


def touch(*names):
    def make(folder):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")

    return make


NOTHING = {
    "shards without their index": (
        touch(*SHARDS),
        "holds 2 shards, model-00001-of-00002.safetensors the first, with",
    ),
    "a variant": (touch("model.fp16.safetensors"), "the variant fp16, .* rename it to model.safetensors"),
    "shards of a variant": (
        touch("model.safetensors.index.bf16.json", "model.bf16-00001-of-00001.safetensors"),
        r"the variant bf16, .* from_pretrained\(FOLDER, variant='bf16'\)",
    ),
    "Mistral's": (touch("consolidated.safetensors", "params.json"), "convert_mistral_weights_to_hf.py"),
    "Meta's": (touch("consolidated.00.pth"), "convert_llama_weights_to_hf.py"),
    "TensorFlow's": (touch("tf_model.h5"), "TensorFlow's weights"),
    "a pickle": (touch("pytorch_model.bin"), "convert_checkpoint.py makes safetensors of pytorch_model.bin"),
    "pickled shards": (touch("pytorch_model.bin.index.json"), "NLG/split_model.py"),
    "DeepSpeed's": (touch("zero_to_fp32.py", "latest"), r"zero_to_fp32.py \. OUT"),
    "distributed": (touch(".metadata", "__0_0.distcp"), "is a distributed checkpoint .*accelerate merge-weights"),
    "FSDP's": (
        touch("pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"),
        r"pytorch_model_fsdp_0 is a distributed .*`accelerate merge-weights \S*model_fsdp_0 OUT` .*checkpoint.py$",
    ),
    "GGUF": (touch("pico-q4.gguf"), "pico-q4.gguf is a GGUF file"),
    "a run with checkpoints": (
        touch("checkpoint-20/model.safetensors", "checkpoint-9/pytorch_model.bin", "logs/events"),
        "name the folder in it that is meant: checkpoint-20, checkpoint-9$",
    ),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_a_folder_without_a_model_says_what_it_holds_and_what_to_do(tmp_path, kind):
    make, sentence = NOTHING[kind]
    make(tmp_path)
    with pytest.raises(InputError, match=f"holds none of model.safetensors.*; .*{sentence}"):
        weight_files(tmp_path)


def test_nothing_is_read_but_headers(tmp_path, monkeypatch):
    """Opening asks for no tensor, whatever the layout."""
    write_sharded(tmp_path, ONE)
    monkeypatch.setattr(model_files, "same_bytes", None)
    monkeypatch.setattr(headers, "mistaken_for", None)
    assert Checkpoint(tmp_path).shapes == {"a": (3,), "b": (2,)}
