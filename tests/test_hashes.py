"""Every changed byte is seen, and what has not changed is not read again."""

import hashlib
import json
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.core.errors import InputError
from common.io import hashes
from common.io.checkpoints import Checkpoint
from common.io.hashes import file_hash, record_of

CONTENTS = bytes(range(256)) * 400


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "functional-dual-anchors" / "hashes"


@pytest.fixture
def reads(monkeypatch):
    """The files that are read, one entry a reading."""
    read, seen = hashes.read_hash, []
    monkeypatch.setattr(hashes, "read_hash", lambda file: seen.append(file.name) or read(file))
    return seen


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that was last changed long ago, as far as the clock of this process tells."""
    (tmp_path / "weights").write_bytes(CONTENTS)
    later(monkeypatch, 60)
    return tmp_path / "weights"


def later(monkeypatch, seconds):
    """The clock runs on; a file's times are the kernel's and stay."""
    now = time.time() + seconds
    monkeypatch.setattr(hashes.time, "time", lambda: now)


def sha256(contents):
    return hashlib.sha256(contents).hexdigest()


def test_an_unchanged_file_is_read_once(file, reads, cache):
    assert file_hash(file) == file_hash(file) == sha256(CONTENTS)
    assert reads == ["weights"] and len(list(cache.iterdir())) == 1


def test_links_to_a_file_share_its_record(file, reads, tmp_path):
    (tmp_path / "link").symlink_to(file)
    assert file_hash(tmp_path / "link") == file_hash(file) and len(reads) == 1


@pytest.mark.parametrize("place", [0, 1, 4096, len(CONTENTS) // 2, len(CONTENTS) - 1])
@pytest.mark.parametrize("way", ["in place", "replaced", "in place, with its time set back"])
def test_any_changed_byte_is_seen(file, monkeypatch, place, way):
    file_hash(file)
    changed, at = bytearray(CONTENTS), os.stat(file)
    changed[place] ^= 1
    if way == "replaced":
        file.with_name("new").write_bytes(changed)
        os.replace(file.with_name("new"), file)
    else:
        with open(file, "rb+") as handle:
            handle.seek(place)
            handle.write(changed[place : place + 1])
    if "set back" in way:
        os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns))
        assert os.stat(file).st_mtime_ns == at.st_mtime_ns
    later(monkeypatch, 60)
    assert file_hash(file) == sha256(bytes(changed)) != sha256(CONTENTS)


def test_a_file_that_was_just_changed_is_not_remembered(tmp_path, reads, cache):
    """A second change within the same tick of the file system's clock would leave its times as they are."""
    (tmp_path / "new").write_bytes(CONTENTS)
    assert file_hash(tmp_path / "new") == file_hash(tmp_path / "new") == sha256(CONTENTS)
    assert len(reads) == 2 and not cache.exists()


def test_a_file_that_changes_while_it_is_read_is_refused(file, monkeypatch, cache):
    def read(file):
        file.write_bytes(b"new")
        return sha256(b"new")

    monkeypatch.setattr(hashes, "read_hash", read)
    with pytest.raises(InputError, match="weights was written to while it was read"):
        file_hash(file)
    assert not cache.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: "",
        lambda kept: "[1]",
        lambda kept: json.dumps(kept)[:-20],
        lambda kept: json.dumps(kept | {"sha256": "0" * 64}),
        lambda kept: json.dumps(kept | {"state": [1, 2, 3, 4, 5]}),
        lambda kept: "\x00" * 100,
    ],
)
def test_a_damaged_record_costs_a_reading_and_no_more(file, reads, damage):
    file_hash(file)
    record_of(file).write_text(damage(json.loads(record_of(file).read_text())))
    assert file_hash(file) == sha256(CONTENTS) and len(reads) == 2
    assert file_hash(file) == sha256(CONTENTS) and len(reads) == 2


def test_a_record_of_another_file_is_not_believed(file, tmp_path, reads):
    (tmp_path / "other").write_bytes(CONTENTS[::-1])
    file_hash(file)
    record_of(tmp_path / "other").write_bytes(record_of(file).read_bytes())
    assert file_hash(tmp_path / "other") == sha256(CONTENTS[::-1])


def test_without_a_place_to_write_it_works_all_the_same(file, monkeypatch, tmp_path, reads):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    assert file_hash(file) == file_hash(file) == sha256(CONTENTS) and len(reads) == 2


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*gone"):
        file_hash(tmp_path / "gone")
    with pytest.raises(InputError, match=r"cannot be read: Is a directory"):
        file_hash(tmp_path)


# ---- of checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    """A folder with a head of 60,000 rows and a config."""
    (tmp_path / "model").mkdir()
    save_file({"head": torch.zeros(60_000, 4), "norm": torch.ones(4)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text('{"rope_theta": 10000}')
    return tmp_path / "model"


def test_forty_rows_of_sixty_thousand_change_the_fingerprint(model):
    before, tensors = Checkpoint(model).fingerprint(), load_file(model / "model.safetensors")
    assert before.startswith("sha256:") and Checkpoint(model).fingerprint() == before
    tensors["head"][30_000:30_040] += 1
    save_file(tensors, model / "model.safetensors")
    assert Checkpoint(model).fingerprint() != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "spm.model", "chat_template.jinja"])
def test_what_stock_libraries_read_beside_the_weights_counts(model, name):
    before = Checkpoint(model).fingerprint()
    (model / name).write_text('{"rope_theta": 500000}')
    assert Checkpoint(model).fingerprint() != before


def test_a_folder_and_its_file_are_one_model(model):
    assert Checkpoint(model / "model.safetensors").fingerprint() == Checkpoint(model).fingerprint()


def test_notes_beside_the_weights_do_not_count(model):
    before = Checkpoint(model).fingerprint()
    for name in ("README.md", "provenance.json", "trainer_state.json"):
        (model / name).write_text("{}")
    assert Checkpoint(model).fingerprint() == before
