"""Damaged files, drawn by hypothesis: safetensors, JSON and YAML as disks, downloads and editors leave them."""

import json
import string
import struct

from hypothesis import strategies as st

LEAST, MOST = -(2**63), 2**64 - 1
NUMBERS = st.one_of(st.integers(-3, 70000), st.integers(LEAST, MOST), st.just(10**400))
ODD = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.sampled_from([float("inf"), float("nan"), 0.5, "", "x", "../x", "\x00", "F32", [], {}, [[]], {"a": []}]),
)
NO_JSON = [b"", b"{", b"\xff\xfe{}", b"\x00" * 64, b"[" * 100_000, b'{"a": ' * 100_000, b"9" * 5000, b"{} {}", b"NaNN"]
NO_OBJECT = [b"[]", b"null", b"3", b'"x"', b"[{}]", b"NaN"]


def split_file(contents: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file and the bytes behind it."""
    length = struct.unpack("<Q", contents[:8])[0]
    return json.loads(contents[8 : 8 + length]), contents[8 + length :]


def joined(header: object, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of a header, which may say another length than it has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@st.composite
def broken_tensors(draw, contents: bytes) -> bytes:
    """A safetensors file that is none any more: no reader of the format may accept it."""
    header, data = split_file(contents)
    names = sorted(name for name in header if name != "__metadata__")
    name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    begin, end = header[name]["data_offsets"]
    row, kind = dict(header[name]), draw(st.sampled_from(KINDS))
    if kind == "length":
        true = struct.unpack("<Q", contents[:8])[0]
        return struct.pack("<Q", draw(st.integers(0, MOST).filter(lambda n: n != true))) + contents[8:]
    if kind == "truncated":
        return contents[: draw(st.integers(0, len(contents) - 1))]
    if kind == "longer":
        return contents + draw(st.binary(min_size=1, max_size=40))
    if kind == "no JSON":
        return joined(draw(st.sampled_from([*NO_JSON, *NO_OBJECT])), data)
    if kind == "offsets":
        shift = draw(st.integers(1, len(data)) | st.integers(1, MOST - len(data)))
        moved = [[begin + shift, end + shift], [begin, end + shift], [end + shift, begin], [-shift, end], [begin], "x"]
        row["data_offsets"] = draw(st.sampled_from(moved))
    if kind == "overlap":
        begins = [begin - (end - begin), begin + (end - begin) // 2, begin - 4]
        row["data_offsets"] = [(at := draw(st.sampled_from(begins))), at + end - begin]
    if kind == "type":
        row["dtype"] = draw(st.sampled_from(["F64", "F16", "U8", "F13", "f32", "", None, 32, ["F32"]]))
    if kind == "shape":
        wrong = [[2**62, 4], [2**64 - 1], [-1], [0.5], "x", None, [*row["shape"], 2], [2**32, 2**32, 2**32]]
        row["shape"] = draw(st.sampled_from(wrong))
    if kind == "no field":
        del row[draw(st.sampled_from(sorted(row)))]
    if kind == "metadata":
        name, row = "__metadata__", draw(st.sampled_from([3, "x", [], {"a": 1}, {"a": {}}, {"a": None}]))
    if kind == "one place":
        name, row = "of no family", header[other]
    return joined(header | {name: row}, data)


KINDS = [
    "length", "truncated", "longer", "no JSON", "offsets", "overlap", "type", "shape", "no field", "metadata",
    "one place",
]  # fmt: skip


@st.composite
def flipped_bytes(draw, contents: bytes) -> bytes:
    """A file with a few bytes replaced, more often near its beginning."""
    damaged = bytearray(contents)
    for at in draw(st.lists(st.integers(0, min(len(contents), 600) - 1), min_size=1, max_size=4)):
        damaged[at] = draw(st.integers(0, 255))
    return bytes(damaged)


@st.composite
def broken_json(draw, contents: bytes) -> bytes:
    """What is no JSON object: cut off, of another kind, of bytes that are no text."""
    cut = st.integers(0, len(contents.rstrip()) - 1).map(lambda n: contents[:n])
    inserted = st.integers(0, len(contents) - 1).map(lambda n: contents[:n] + b"\xff" + contents[n:])
    return draw(st.one_of(cut, inserted, st.sampled_from([*NO_JSON, *NO_OBJECT])))


@st.composite
def odd_json(draw, contents: bytes) -> bytes:
    """A JSON object of which one field, however deep, has another value or is gone."""
    fields = json.loads(contents)
    place = fields
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        if draw(st.integers(0, 3)):
            place[key] = draw(ODD)
        else:
            del place[key]
        return json.dumps(fields).encode()


@st.composite
def broken_yaml(draw, contents: bytes) -> bytes:
    """What is no experiment file: no YAML, no mapping, an unknown key, something that asks to be executed."""
    key = draw(st.text(string.ascii_lowercase, min_size=5, max_size=9).filter(lambda word: word != "tasks"))
    rows = [
        f"{key}: 1\n", f"anchors: {{{key}: 1}}\n", "x: [\n", "x: {\n", "[x]\n", "anchors: 3\n", "tasks: 3\n",
        "\x00\n", "'\n", "x: &a [*a]\n", "x: *nowhere\n", "a: b: c\n", "\t- x\n", "anchors: {number: [1]}\n",
        "anchors: {number: x}\n", "run: {seed: 1.5}\n", "adapt: {by_start: 3}\n", "domain: 3\n", "start: {hyper: 1}\n",
        "run: {seed: " + "9" * 5000 + "}\n", "x: " + "[" * 3000 + "\n", "? [a]\n: 1\n", "!!binary x: 1\n",
        "x: !!python/object/apply:os.mkdir [RAN]\n", "x: !!python/name:os.system\n", "x: !!timestamp 2001-99-99\n",
    ]  # fmt: skip
    row = draw(st.sampled_from(rows)).encode()  # behind the rest: of two values of a key the last counts
    comment = f"# {draw(st.integers(0, 10**6))}\n".encode()
    return comment + draw(st.sampled_from([contents + row, contents + b"\xff" + row, row]))


def spoiled(contents: bytes, name: str, at: int, value: float) -> bytes:
    """A safetensors file with one number of one float32 tensor replaced."""
    header, data = split_file(contents)
    begin, end = header[name]["data_offsets"]
    place = begin + 4 * (at % ((end - begin) // 4))
    return joined(header, data[:place] + struct.pack("<f", value) + data[place + 4 :])
