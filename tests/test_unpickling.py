"""Published pickles are read for their tensors, and nothing that they name ever runs."""

import io
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch
from numpy.lib import format as npy
from torch import nn

from common.core.errors import InputError
from common.io.pickles import read_anchors, read_tensors
from released import pickle_3, save_legacy, write_released

# ---- files as they were published ------------------------------------------------------------------------------------


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dump", [torch.save, save_legacy, pickle.dump, pickle_3])
@pytest.mark.parametrize("name", ["ImageEncoder", "ClassificationHead"])
def test_a_whole_module_gives_its_state_dict(tmp_path, name, dump):
    expected = write_released(tmp_path / "finetuned.pt", name, dump)
    before = dict(sys.modules)
    found = read_tensors(tmp_path / "finetuned.pt")
    assert_same(found, expected)
    assert sys.modules == before and "src.modeling" not in before
    assert not any("attn_mask" in key or "preprocess" in key for key in found)


def test_weights_kept_as_plain_attributes_are_found(tmp_path):
    def as_the_released_merge_leaves_them(module):
        blocks = module.model.visual.transformer.resblocks
        for owner in [m for m in blocks.modules() if m._parameters]:
            for name, parameter in list(owner._parameters.items()):
                delattr(owner, name)
                setattr(owner, name, parameter if parameter is None else parameter * 1.0)  # a non-leaf tensor
        assert not blocks.state_dict()

    expected = write_released(tmp_path / "merged.pt", "ImageEncoder", torch.save, as_the_released_merge_leaves_them)
    found = read_tensors(tmp_path / "merged.pt")
    assert_same(found, {name: expected[name] for name in found})
    assert found.keys() == expected.keys()


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)))
        self.text_projection = nn.Parameter(torch.randn(2, 3))
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x):
        return self.visual(x) @ self.text_projection


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_archives_give_their_state_dict(tmp_path):
    module = Scripted().half()
    torch.jit.save(torch.jit.script(module), tmp_path / "scripted.pt")
    assert_same(sorted_by_name(read_tensors(tmp_path / "scripted.pt")), sorted_by_name(module.state_dict()))
    module = Scripted()
    torch.jit.save(torch.jit.trace(module, torch.ones(1, 3)), tmp_path / "traced.pt")
    assert_same(sorted_by_name(read_tensors(tmp_path / "traced.pt")), sorted_by_name(module.state_dict()))


def sorted_by_name(tensors):
    return dict(sorted(tensors.items()))


def test_state_dicts_dicts_of_tensors_and_nested_ones(tmp_path):
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save(module.state_dict(), tmp_path / "a.pt")
    assert_same(read_tensors(tmp_path / "a.pt"), module.state_dict())
    torch.save({"epoch": 3, "config": {"lr": 0.1}, "state_dict": module.state_dict()}, tmp_path / "b.pt")
    assert_same(read_tensors(tmp_path / "b.pt"), {f"state_dict.{n}": t for n, t in module.state_dict().items()})


def test_views_ties_types_and_attributes(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tagged = torch.ones(2)
    tagged.note = "a tensor with an attribute"
    parameter = nn.Parameter(torch.ones(1))
    parameter.note = "likewise"
    tensors = {"base": base, "again": base, "transposed": base.T, "column": base[:, 1], "empty": torch.empty(0, 3)}
    tensors |= {"tagged": tagged, "parameter": parameter, "scalar": torch.tensor(2)}
    tensors |= {"bfloat16": torch.ones(3, dtype=torch.bfloat16), "bool": torch.tensor([True, False])}
    torch.save(tensors, tmp_path / "a.pt")
    found = read_tensors(tmp_path / "a.pt")
    assert_same(found, tensors)
    assert all(tensor.is_contiguous() for tensor in found.values())
    found["base"].zero_()  # each owns its memory
    assert torch.equal(found["again"], tensors["again"]) and found["column"].untyped_storage().nbytes() == 12


# ---- hostile files ---------------------------------------------------------------------------------------------------


def opcodes(thing):
    return pickle.dumps(thing, 2)[2:-1]


def call(module, name, *args):
    """The opcodes that call `module.name` with the arguments (raw opcodes, if bytes)."""
    packed = b"".join(arg if isinstance(arg, bytes) else opcodes(arg) for arg in args)
    return f"c{module}\n{name}\n(".encode() + packed + b"tR"


def complete(code):
    return b"\x80\x02" + code + b"."


def archive_of(path, data, storages=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for key, raw in enumerate(storages):
            archive.writestr(f"archive/data/{key}", raw)


def as_pickle(path, code):
    path.write_bytes(complete(code))


def as_archive(path, code):
    archive_of(path, complete(code))


def as_legacy(path, code):
    head = io.BytesIO()
    save_legacy(0, head)
    start = head.getvalue()
    path.write_bytes(start[: start.rindex(complete(opcodes(0)))] + complete(code) + complete(opcodes([])))


def as_argument_of_a_known_class(path, code):
    as_pickle(path, call("src.modeling", "ImageEncoder", code))


def as_state_of_a_known_class(path, code):
    as_pickle(path, b"csrc.modeling\nImageEncoder\n)\x81}" + opcodes("_parameters") + code + b"sb")


def within_a_storage(path, code):
    storage = b"ctorch.storage\n_load_from_bytes\n" + b"B" + len(complete(code)).to_bytes(4, "little") + complete(code)
    tensor = call("torch._utils", "_rebuild_tensor_v2", storage + b"\x85R", 0, (1,), (1,), False, None)
    path.write_bytes(b"\x80\x03}" + opcodes("weight") + tensor + b"s.")


WRAPPINGS = [
    as_pickle, as_archive, as_legacy, within_a_storage, as_argument_of_a_known_class, as_state_of_a_known_class,
]  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPPINGS)
def test_a_command_is_refused_by_name_and_does_not_run(tmp_path, wrap):
    marker = tmp_path / "marker"
    code = call("posix", "system", f"touch {marker}")
    pickle.loads(complete(code))
    assert marker.exists()  # the payload works where it is let run
    marker.unlink()
    wrap(tmp_path / "hostile.pt", code)
    with pytest.raises(InputError, match=r"hostile.pt.* names `posix.system`.*nothing was executed"):
        read_tensors(tmp_path / "hostile.pt")
    assert not marker.exists()


REFUSED = [
    ("os", "system"), ("builtins", "eval"), ("__builtin__", "eval"), ("builtins", "getattr"), ("builtins", "type"),
    ("torch", "load"), ("torch.serialization", "load"), ("torch.hub", "load"), ("torch.jit", "load"),
    ("torch", "nn.Linear"), ("torch.nnx", "Linear"), ("torchvision", "transforms.Compose"), ("srcs.modeling", "X"),
    ("open_clip_evil", "CLIP"), ("numpy", "load"), ("numpy.core.multiarray", "fromfile"), ("functools", "partial"),
    ("common.io.pickles", "Record"), ("pickle", "loads"), ("torch._utils", "_rebuild_wrapper_subclass"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), REFUSED)
def test_names_outside_the_lists_are_refused(tmp_path, module, name):
    as_pickle(tmp_path / "hostile.pt", call(module, name, "x"))
    with pytest.raises(InputError, match=f"names `{module}.{name}`"):
        read_tensors(tmp_path / "hostile.pt")


def test_known_names_stay_inert_whatever_is_done_with_them(tmp_path):
    huge = call("torch.nn.modules.linear", "Linear", 10**9, 10**9)  # would fill the memory if it were the real one
    system = call("torch.nn.modules", "os.system", f"touch {tmp_path / 'marker'}")
    mutated = b"csrc.modeling\nImageEncoder\n)\x81" + opcodes((None, {"__class__": 1, "origin": "x"})) + b"b"
    with_keywords = b"copen_clip.model\nCLIP\n)}" + opcodes("depth") + opcodes(3) + b"s\x92"
    weight = torch.arange(3.0)
    items = {"a": huge, "b": system, "c": mutated, "d": with_keywords, "weight": pickle.dumps(weight, 4)[2:-1]}
    code = b"}(" + b"".join(opcodes(name) + value for name, value in items.items())
    (tmp_path / "odd.pt").write_bytes(b"\x80\x04" + code + b"u.")
    assert_same(read_tensors(tmp_path / "odd.pt"), {"weight": weight})
    assert not (tmp_path / "marker").exists()


BUILD_A_CLASS = b"csrc.modeling\nX\n" + opcodes({"__new__": 1}) + b"b"


@pytest.mark.parametrize("code", [BUILD_A_CLASS, opcodes(()) + b")R", b"0", b""])
def test_nonsense_is_an_input_error(tmp_path, code):
    as_pickle(tmp_path / "nonsense.pt", code)
    with pytest.raises(InputError, match=r"nonsense.pt"):
        read_tensors(tmp_path / "nonsense.pt")


def test_a_module_inside_itself_ends(tmp_path):
    module = nn.Sequential(nn.Linear(1, 1))
    module._modules["loop"] = module
    torch.save(module, tmp_path / "loop.pt")
    assert list(read_tensors(tmp_path / "loop.pt")) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (5,), (1,)), (1, (4,), (1,)), (0, (2, 2), (3, 1)), (-1, (1,), (1,)), (0, (2,), (-1,)), (0, (10**12,), (0,)),
     (0, (2, 2), (1,)), (0, ("4",), (1,)), (2**62, (1,), (1,))],
)  # fmt: skip
def test_tensors_outside_their_storage_are_refused(tmp_path, offset, size, stride):
    pid = b"(" + opcodes("storage") + b"ctorch\nFloatStorage\n" + opcodes("0") + opcodes("cpu") + opcodes(4) + b"tQ"
    tensor = call("torch._utils", "_rebuild_tensor_v2", pid, offset, size, stride, False, None)
    archive_of(tmp_path / "far.pt", complete(b"}" + opcodes("weight") + tensor + b"s"), [bytes(16)])
    with pytest.raises(InputError, match=r"far.pt: weight.*(exceeds its storage of 4|impossible shape)"):
        read_tensors(tmp_path / "far.pt")


@pytest.mark.parametrize("dump", [torch.save, save_legacy, pickle.dump])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_named(tmp_path, dump, share):
    write_released(tmp_path / "whole.pt", "ImageEncoder", dump)
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=r"cut.pt is truncated"):
        read_tensors(tmp_path / "cut.pt")


@pytest.mark.parametrize("left", [0, 7, 8, 23])
def test_an_old_stream_cut_at_a_storage_is_named(tmp_path, left):
    """One storage of 4 floats ends the file: 8 bytes of count and 16 of numbers, of which `left` are there."""
    save_legacy({"weight": torch.arange(4.0)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) - 24 + left])
    with pytest.raises(InputError, match=r"cut.pt is truncated.*storage .* ends early"):
        read_tensors(tmp_path / "cut.pt")


def test_other_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"absent.pt cannot be read: No such file"):
        read_tensors(tmp_path / "absent.pt")
    np.savez(tmp_path / "a.npz", x=np.ones(2))
    with pytest.raises(InputError, match=r"a.npz is a zip archive, but"):
        read_tensors(tmp_path / "a.npz")
    torch.save({"epoch": 3}, tmp_path / "b.pt")
    with pytest.raises(InputError, match=r"b.pt holds no tensor under a name"):
        read_tensors(tmp_path / "b.pt")
    with zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c/data.pkl", complete(opcodes({})))
    with pytest.raises(InputError, match=r"c.pt is truncated, damaged.*data.pkl is compressed"):
        read_tensors(tmp_path / "c.pt")


# ---- anchors ---------------------------------------------------------------------------------------------------------


def test_plain_anchor_files(tmp_path):
    for layer in (1, 2):
        anchors = np.random.default_rng(layer).standard_normal((5, 4, 8), np.float32)
        np.save(tmp_path / f"dual_anchors_layer_{layer}.npy", anchors)
        found = read_anchors(tmp_path / f"dual_anchors_layer_{layer}.npy")
        assert list(found) == ["input"] and found["input"].dtype == np.float32
        np.testing.assert_array_equal(found["input"], anchors)


def save_as_numpy_1(path, content):
    with open(path, "wb") as file:
        npy.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(pickle.dumps(np.array(content), 3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.mark.parametrize("save", [np.save, save_as_numpy_1])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_anchor_dictionaries(tmp_path, save, kind):
    rng = np.random.default_rng(0)
    expected = {
        "input": rng.standard_normal((4, 5, 8), np.float32),
        "gt": np.asfortranarray(rng.standard_normal((4, 5, 8), np.float32)),
        "attention_mask": np.zeros((4, 1, 5, 5), np.float32),
    }
    save(tmp_path / "a.npy", {name: kind(array) for name, array in expected.items()} | {"steps": 1200})
    found = read_anchors(tmp_path / "a.npy")
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array)


def test_hostile_anchor_files_are_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'marker')!r}, 'w')",)

    np.save(tmp_path / "a.npy", {"input": Hostile()})
    with pytest.raises(InputError, match=r"a.npy names `builtins.exec`"):
        read_anchors(tmp_path / "a.npy")
    assert not (tmp_path / "marker").exists()
    np.save(tmp_path / "a.npy", {"input": np.array(["text"])})
    with pytest.raises(InputError, match=r"a.npy: input is an array of type 'U4', not of numbers"):
        read_anchors(tmp_path / "a.npy")


WRONG = [
    np.ones(3), np.ones((2, 3, 4), np.int64), {}, {"x": np.ones((2, 3, 4))}, {"input": np.ones((2, 3, 4, 5))},
    {"input": np.ones((2, 3, 4)), "gt": np.ones((2, 3, 5))}, [1, 2], np.array([{}, {}]),
]  # fmt: skip


@pytest.mark.parametrize("content", WRONG)
def test_anchor_files_of_another_shape_are_refused(tmp_path, content):
    np.save(tmp_path / "a.npy", content)
    with pytest.raises(InputError, match=r"a.npy"):
        read_anchors(tmp_path / "a.npy")


@pytest.mark.parametrize("content", [np.ones((2, 3, 4)), {"input": np.ones((2, 3, 4))}])
@pytest.mark.parametrize("cut", [-1, 90, 3, 0])
def test_anchor_files_cut_short_are_named(tmp_path, content, cut):
    np.save(tmp_path / "a.npy", content)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:cut])
    with pytest.raises(InputError, match=r"a.npy is truncated"):
        read_anchors(tmp_path / "a.npy")
