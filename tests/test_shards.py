"""Shards: a stream comes back whole, a copy byte by byte, and an unfinished folder never looks finished."""

import errno
import hashlib
import json
import os
import threading
import weakref
from functools import partial
from operator import attrgetter

import pytest
import torch
from safetensors.torch import load_file

from common.core.errors import InputError
from common.core.task_vectors import LazyTensor
from common.io import shards
from common.io.checkpoints import Checkpoint, read_header, write_tensors
from common.io.model_files import INDEX_FILE
from common.io.shards import (
    copy_stored,
    publish_shards,
    require_names,
    stage_shards,
    stored_in,
    stored_tensors,
    stored_when_made,
    write_stored,
)
from common.io.tensors import in_rows
from helpers import as_made

TENSORS = {f"layer.{i}": torch.full((4, 4), float(i)) for i in range(5)}  # 64 bytes each


def write(tensors, folder, limit=128):
    stage_shards(as_made(tensors), folder, limit)
    publish_shards(folder)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_stream_becomes_as_many_shards_as_the_limit_asks_for(tmp_path):
    write(TENSORS, tmp_path)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names(tmp_path) == [*shards, INDEX_FILE]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 5 * 64
    assert index["weight_map"]["layer.1"] == shards[0] and index["weight_map"]["layer.4"] == shards[2]
    read = Checkpoint(tmp_path).read_under("")
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_a_tensor_is_made_once_and_no_other_is_held(tmp_path):
    made = []

    def make(i):
        tensor = torch.full((16,), float(i))
        made.append(weakref.ref(tensor))
        assert sum(ref() is not None for ref in made) == 1
        return tensor

    lazy = {f"t{i}": LazyTensor((16,), (partial(make, i),)) for i in range(8)}
    stage_shards({name: stored_when_made(tensor, torch.float32) for name, tensor in lazy.items()}, tmp_path, 128)
    assert len(made) == 8


def test_a_made_tensor_comes_back_in_every_type_and_shape(tmp_path):
    types = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64, torch.float16)
    tensors = {f"of {t}": torch.tensor([[1, 0, 1]]).to(t) for t in types}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 2), "turned": torch.arange(6.0).view(2, 3).T}
    write_stored(tmp_path / "all.safetensors", as_made(tensors))
    found = load_file(tmp_path / "all.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())


@pytest.mark.parametrize("made", [torch.zeros(3), torch.zeros(2, dtype=torch.float16)], ids=["shape", "type"])
def test_a_tensor_other_than_was_said_is_not_written(tmp_path, made):
    with pytest.raises(ValueError, match=r"was made of a tensor of torch.float32 \(2,\)"):
        write_stored(
            tmp_path / "a.safetensors", {"a": stored_when_made(LazyTensor((2,), (lambda: made,)), torch.float32)}
        )
    assert not names(tmp_path)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    write_stored(tmp_path / "new" / "model.safetensors", as_made(TENSORS))
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert names(tmp_path / "new") == ["model.safetensors"]
    with pytest.raises(InputError, match="model.safetensors: the models have no tensor head, which the architecture"):
        require_names(TENSORS, ["layer.0", "head"], tmp_path / "new" / "model.safetensors")
    with pytest.raises(KeyboardInterrupt):
        write_stored(tmp_path / "new" / "model.safetensors", breaking_off(3))
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == TENSORS.keys()


def breaking_off(whole):
    """Tensors of which so many can be made."""

    def make():
        raise KeyboardInterrupt

    last = list(TENSORS)[whole]
    return as_made(TENSORS) | {last: stored_when_made(LazyTensor((4, 4), (make,)), torch.float32)}


def test_a_tensor_larger_than_the_limit_has_a_shard_of_its_own(tmp_path):
    write({"small": torch.ones(1), "large": torch.ones(99), "last": torch.ones(1)}, tmp_path)
    assert len(names(tmp_path)) == 3 + 1


def test_a_stream_that_breaks_off_leaves_the_earlier_checkpoint(tmp_path):
    write(TENSORS, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        stage_shards(breaking_off(4), tmp_path, 128)
    assert before.items() <= {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}.items()
    write(dict(list(TENSORS.items())[:3]), tmp_path)  # fewer shards than before: none is left over
    assert names(tmp_path) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX_FILE]


@pytest.mark.parametrize(
    ("step", "sentence"),
    [("bytes_of", r"cannot write .*model-00000\.staged: .*"), ("os.fsync", r"cannot write .*model-00001\.staged: .*")],
)
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, step, sentence):
    """Full while a shard is written, or when the second one is flushed."""
    write(TENSORS, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    calls, works = iter(range(9)), attrgetter(step)(shards)

    def full(argument):
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        return works(argument)

    monkeypatch.setattr(f"common.io.shards.{step}", full)
    with pytest.raises(InputError, match=sentence):
        write(TENSORS, tmp_path)
    after = {name: (tmp_path / name).read_bytes() for name in names(tmp_path) if not name.startswith(".")}
    assert before == after


@pytest.mark.parametrize("died_in", [0, 1, 2])
def test_without_an_index_a_folder_is_no_checkpoint(tmp_path, monkeypatch, died_in):
    """Killed while the shards get their names: no reader takes the folder for a checkpoint, and it can be made anew."""
    write(TENSORS, tmp_path)
    stage_shards(as_made(TENSORS), tmp_path, 128)
    renames = iter(range(9))

    def dying(source, target, replace=os.replace):
        if next(renames) == died_in:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("common.io.shards.os.replace", dying)
        with pytest.raises(KeyboardInterrupt):
            publish_shards(tmp_path)
    with pytest.raises(InputError, match="holds none of"):
        Checkpoint(tmp_path)
    write(TENSORS, tmp_path)
    assert len(Checkpoint(tmp_path).shapes) == 5 and len(names(tmp_path)) == 4


def test_a_copy_has_the_bytes_of_every_type(tmp_path):
    types = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float64)
    tensors = {f"of {t}": torch.tensor([[1, 0, 1]]).to(t) for t in types} | {"scalar": torch.tensor(3.0)}
    write_tensors(tmp_path / "one.safetensors", tensors)
    torch.save(tensors, tmp_path / "one.bin")
    for suffix in ("safetensors", "bin"):
        with stored_in(tmp_path / f"one.{suffix}") as stored:
            copy_stored(tmp_path / "two.safetensors", stored, {"from": suffix})
        copied = load_file(tmp_path / "two.safetensors")
        assert all(torch.equal(copied[n], t) and copied[n].dtype == t.dtype for n, t in tensors.items())
        assert copied.keys() == tensors.keys() and read_header(tmp_path / "two.safetensors") == {"from": suffix}
        assert stored_tensors(tmp_path / "two.safetensors").keys() == tensors.keys()


def test_a_copy_that_does_not_read_back_is_refused_and_not_kept(tmp_path, monkeypatch):
    write_tensors(tmp_path / "one.safetensors", TENSORS)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: hashlib.sha256(b"other bytes"))
    with pytest.raises(InputError, match="two.safetensors does not read back as it was written"):
        copy_stored(tmp_path / "two.safetensors", stored_tensors(tmp_path / "one.safetensors"), {})
    assert names(tmp_path) == ["one.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_large_tensor_is_read_in_pieces(tmp_path, monkeypatch, dtype):
    tensors = {"matrix": torch.randn(7, 5).to(dtype), "long": torch.arange(99).to(dtype), "none": torch.tensor(3.0)}
    write_tensors(tmp_path / "model.safetensors", tensors)
    monkeypatch.setattr("common.io.tensors.PIECE", 12)
    for name, tensor in Checkpoint(tmp_path).read_under("").items():
        assert torch.equal(tensor, tensors[name].float()) and tensor.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_read_by_themselves(tmp_path, dtype):
    tensors = {"matrix": torch.randn(7, 5).to(dtype), "long": torch.arange(9).to(dtype), "none": torch.tensor(3.0)}
    write_tensors(tmp_path / "model.safetensors", tensors)
    opened = Checkpoint(tmp_path)
    for name, shape in opened.shapes.items():
        parts = in_rows(shape, 10)
        assert len(parts) == {"matrix": 4, "long": 1, "none": 1}[name] and opened.has_rows(name)
        if name != "none":
            assert torch.equal(torch.cat([opened.read_rows(name, rows) for rows in parts]), tensors[name].float())
            assert opened.read_rows(name, slice(2, 4)).shape == (2, *shape[1:])
    opened.resize({"matrix": (9, *opened.shapes["matrix"][1:])})
    assert not opened.has_rows("matrix")


@pytest.mark.parametrize("fails_at", [None, 1, 4])
def test_a_file_is_flushed_while_it_is_written(tmp_path, monkeypatch, fails_at):
    """In a thread of its own; an error there is that of the file, of which nothing is left."""
    calls, fsync = [], os.fsync

    def watched(descriptor):
        calls.append(threading.current_thread() is threading.main_thread())
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(shards, "FLUSHED_BYTES", 64)
    file, given = tmp_path / "model.safetensors", as_made(TENSORS)
    if fails_at:
        with pytest.raises(InputError, match=f"cannot write {file}: .*No space left"):
            for _ in range(4):
                write_stored(file, given)
        assert names(tmp_path) in ([], [file.name])
    else:
        write_stored(file, given)
        assert calls.count(True) == 1 and calls[-1] and 1 <= calls.count(False) <= 5
        assert load_file(file).keys() == TENSORS.keys()


def test_a_file_that_became_shorter_is_refused(tmp_path):
    write_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(9), "b": torch.ones(9)})
    opened, file = Checkpoint(tmp_path), tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(InputError, match=f"{file} is truncated while it is read: 4 bytes of b are missing"):
        opened.read(["b"])
    file.unlink()
    with pytest.raises(InputError, match=f"there is no file {file}"):
        opened.read(["b"])


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/outside.safetensors", "a/../../b.safetensors"])
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, shard):
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(InputError, match=f"{INDEX_FILE} names the shard {shard}, which lies outside its folder"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": ["a"]}'])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(InputError, match=f"{INDEX_FILE} is no index of shards"):
        Checkpoint(tmp_path)


def test_a_stack_that_is_made_of_too_little_is_not_written(tmp_path):
    """As many bytes as its header says, or nothing: an input may be replaced meanwhile."""
    lazy = LazyTensor((3, 2), (lambda: torch.zeros(2), lambda: torch.ones(2)))
    with pytest.raises(InputError, match=r"stack has 16 bytes, not 24"):
        write_stored(tmp_path / "a.safetensors", {"stack": stored_when_made(lazy, torch.float32)})
    assert not names(tmp_path)
    whole = LazyTensor((2, 2), lazy.parts)
    write_stored(tmp_path / "a.safetensors", {"stack": stored_when_made(whole, torch.float32)})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["stack"], torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
