"""Reading lazily, writing whole or not at all."""

import hashlib
import json
import struct

import pytest
import torch

from common.core.errors import InputError
from common.io.checkpoints import (
    Checkpoint,
    check_provenance,
    read_header,
    tensor_digest,
    write_tensors,
    write_text,
)
from common.io.hashes import digest, identity


@pytest.fixture
def file(tmp_path):
    write_tensors(
        tmp_path / "model.safetensors", {"a.x": torch.ones(2), "a.y": torch.zeros(3).half(), "b": torch.ones(1)}
    )
    return tmp_path / "model.safetensors"


def test_a_block_is_read_without_its_prefix_and_in_float32(file):
    for path in (file, file.parent):
        checkpoint = Checkpoint(path)
        assert checkpoint.shapes == {"a.x": (2,), "a.y": (3,), "b": (1,)}
        block = checkpoint.read_under("a.")
        assert {n: t.dtype for n, t in block.items()} == {"x": torch.float32, "y": torch.float32}


def test_shards_are_found_through_their_index(tmp_path):
    write_tensors(tmp_path / "one.safetensors", {"a": torch.ones(1)})
    write_tensors(tmp_path / "two.safetensors", {"b": torch.ones(1) * 2})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {n: t.item() for n, t in Checkpoint(tmp_path).read(["b", "a"]).items()} == {"b": 2, "a": 1}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-3]), "truncated"),
        (lambda f: f.write_bytes(b"no checkpoint"), "truncated or no safetensors"),
        (lambda f: f.unlink(), "holds none of model.safetensors"),
        (lambda f: write_tensors(f, {"a.x": torch.tensor([1.0, torch.nan])}), "a.x holds NaN or Inf"),
        (lambda f: write_tensors(f, {"a.x": torch.tensor([torch.inf])}), "a.x holds NaN or Inf"),
        (
            lambda f: write_tensors(f, {"a.x": torch.tensor([1e300, -1e301], dtype=torch.float64)}),
            r"the tensor a.x reaches 1e\+301, which float32 cannot hold",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(file, damage, message):
    damage(file)
    with pytest.raises(InputError, match=message) as error:
        Checkpoint(file.parent).read_under("a.")
    assert "\n" not in str(error.value) and str(file.parent) in str(error.value)


def test_a_pickle_is_not_opened(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "zeroshot.pt")
    with pytest.raises(InputError, match="convert_checkpoint.py"):
        Checkpoint(tmp_path / "zeroshot.pt")


def test_the_same_contents_give_the_same_bytes(tmp_path):
    header = {"steps": 3, "init": "weight", "trace": [0.5, 0.25]}
    for name in ("one", "two"):
        write_tensors(tmp_path / name, {"x": torch.arange(4.0)}, header)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert read_header(tmp_path / "one") == header


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    write_text(tmp_path / "file", "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"cannot write .*file.*No space left"):
        write_text(tmp_path / "file", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(InputError, match=r"cannot write .*taken/anchors"):
        write_tensors(tmp_path / "taken" / "anchors", {"x": torch.ones(1)})


def test_digest_sees_names_shapes_types_and_values():
    one = {"a": torch.tensor([1.0, 2.0])}
    others = [
        {"b": one["a"]},
        {"a": one["a"].double()},
        {"a": one["a"][None]},
        {"a": torch.tensor([1.0, 2.5])},
    ]
    assert len({tensor_digest(x) for x in [one, *others]}) == 5
    assert tensor_digest(one) == tensor_digest({"a": torch.tensor([1.0, 2.0])})


def test_digests_are_those_that_existing_files_say_they_were_made_from():
    """Of the text that is hashed, written out; of no tensors as of an empty JSON object."""
    data = b"a torch.float32 (2,)" + struct.pack("<2f", 1.0, 2.0)
    assert tensor_digest({"a": torch.tensor([1.0, 2.0])}) == hashlib.sha256(data).hexdigest()[:16]
    text = hashlib.sha256(b'{"a": 1, "b": [null]}').hexdigest()[:16]
    assert digest({"b": [None], "a": 1}) == text and identity(["x"]) == f"sha256:{digest(['x'])}"
    assert tensor_digest({}) == digest({}) == hashlib.sha256(b"{}").hexdigest()[:16]


def test_provenance_names_the_field_that_differs(tmp_path):
    found = {"anchors": {"steps": 1200, "lr": 0.01}, "seed": 0, "extra": 1}
    check_provenance(tmp_path, found, {"anchors": {"steps": 1200}, "seed": 0})
    with pytest.raises(InputError, match=r"anchors\.steps = 1200, now it is 300"):
        check_provenance(tmp_path, found, {"anchors": {"steps": 300}})


def test_a_run_of_the_sampled_fingerprints_is_called_so(tmp_path):
    found = {"inputs": {"experts": [["math", "0123456789abcdef"]], "base": "0123456789abcdef"}}
    expected = {"inputs": {"experts": [["math", "sha256:0123456789abcdef"]]}}
    with pytest.raises(InputError, match=r"earlier version, which looked at samples of inputs\.experts alone"):
        check_provenance(tmp_path, found, expected)
    check_provenance(tmp_path, expected, expected)
    with pytest.raises(InputError, match=r"made with inputs\.experts = .*f5.*, now it is .*ef"):
        check_provenance(tmp_path, {"inputs": {"experts": [["math", "sha256:f5"]]}}, expected)
