"""Models, anchors and data of the Hugging Face hub wherever a path goes: hf://[datasets/]org/name[@revision][/path].

Only the files of a model that are read are fetched, into the hub's own cache and by its own rules (token, endpoint,
offline). A branch or tag is looked up once and all files are those of its commit, which is in their path. Of a pickle
nothing is executed: it is fetched only where there is no safetensors file, and turned into one beside the cache.
Under `headers_only` no weight is fetched: files of their size stand in for them, with their own headers; nothing for
pickles, of which only the size is known. A .safetensors file that is there as a pickle alone is that pickle, converted.
"""

import re
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath

from common.core.errors import InputError, in_short
from common.core.places import RESOLVERS
from common.io.absent_models import NOT_FETCHED
from common.io.conversion import convert, target_of
from common.io.hub_files import Place, all_cached, fetched, listing
from common.io.model_files import INDEX_FILE, MODEL_FILE, OPEN_CLIP_CONFIG, OPEN_CLIP_FILES
from common.io.tokenizer_files import MODULE_FILES, MODULES_FILE

SCHEME = "hf"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NOT_READ = (
    *PICKLES,
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".safetensors",
    "README.md",
    ".png",
    ".jpg",
    ".tflite",
    ".ot",
)
FIRST = 2**17  # bytes of a file in which most headers end
_STATE = {"headers_only": False}


@contextmanager
def headers_only() -> Iterator[None]:
    """Fetch no weight in this block, for a dry run."""
    before, _STATE["headers_only"] = _STATE["headers_only"], True
    try:
        yield
    finally:
        _STATE["headers_only"] = before


def parse(text: str) -> Place:
    """What a text says; InputError if it is no hf://org/name[@revision][/path]."""
    found = re.fullmatch(r"hf://(datasets/)?([\w.-]+/[\w.-]+?)(?:@(refs/pr/\d+|[\w.-]+))?(?:/(.*))?", text)
    if not found:
        raise InputError(f"{text} is no place on the hub; write hf://org/name, with @revision and /path as need be")
    kind, repo, revision, path = found.groups()
    return Place(text, "dataset" if kind else "model", repo, revision or "main", (path or "").strip("/"))


def resolve(text: str) -> Path:
    """The local path of a place on the hub, with the files that are read of it."""
    return _resolved(text, _STATE["headers_only"])


@cache
def _resolved(text: str, headers: bool) -> Path:
    place = parse(text)
    commit, sizes = listing(place)
    wanted = files_wanted(place, sizes)
    pickles = [name for name in wanted if name.endswith(PICKLES)]
    if headers and not (pickles and all_cached(place, commit, wanted)):
        return stand_ins(place, commit, {name: sizes[name] for name in wanted})
    folder = fetched(place, commit, wanted)
    if not pickles:
        return folder / place.path
    made = folder.parent.parent / "converted" / commit
    for name in pickles:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        convert(folder / name, target_of(made / name), float32=False)
    for name in set(wanted) - set(pickles):
        link = made / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(folder / name)
    return target_of(made / place.path) if place.path.endswith(PICKLES) else made / place.path


def files_wanted(place: Place, sizes: Sequence[str] | dict[str, int]) -> list[str]:
    """The files of a place that are read: itself, or of a folder its weights and the small files beside them.

    Raises: InputError if there is nothing of that name, or no weights there.
    """
    pickled = (name for name in sizes if name.endswith(PICKLES) and str(target_of(Path(name))) == place.path)
    file = place.path if place.path in sizes else next(pickled, "")
    if file:
        beside = str(PurePosixPath(file).with_name(OPEN_CLIP_CONFIG))
        return [file, *([beside] if beside in sizes else [])]
    start = f"{place.path}/" if place.path else ""
    names = [name.removeprefix(start) for name in sizes if name.startswith(start)]
    here = [name for name in names if "/" not in name]
    weights = weights_of(here)
    if not weights and names and not here:
        weights = [name for name in names if name.endswith(".npy")]  # a folder of folders, as anchors are released
    if not weights:
        near = sorted(here if names else {name.split("/")[0] for name in sizes})
        where = place.text if names else f"{place.repo}@{place.revision}"
        raise InputError(f"{place.text} holds no weights; {where} has {', '.join(in_short(near, most=8)) or 'nothing'}")
    small = [name for name in here if not name.endswith((*NOT_READ, ".npy"))]
    if MODULES_FILE in here:
        in_folders = [PurePosixPath(name) for name in names if name.count("/") == 1]
        small += [str(path) for path in in_folders if any(path.match(pattern) for pattern in MODULE_FILES)]
    return [start + name for name in dict.fromkeys([*weights, *small])]


def weights_of(names: Sequence[str]) -> list[str]:
    """Of the files in a folder those that stock libraries open: safetensors, pickles only where there are none."""
    safe = [name for name in names if name.endswith(".safetensors")]
    own = [name for name in OPEN_CLIP_FILES if name in safe]
    shards = [name for name in safe if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    if OPEN_CLIP_CONFIG in names and own:
        return own[:1]
    if MODEL_FILE in safe:
        return [MODEL_FILE]
    if INDEX_FILE in names and shards:
        return [INDEX_FILE, *shards]
    anchors = [name for name in names if name.endswith(".npy")]
    single = [name for name in ("open_clip_pytorch_model.bin", "pytorch_model.bin") if name in names]
    return safe or anchors or single[:1]


# ---- headers without weights -----------------------------------------------------------------------------------------


@cache
def stand_in_folder() -> tempfile.TemporaryDirectory:
    """Where files stand in for weights that are not fetched, until this process ends."""
    return tempfile.TemporaryDirectory(prefix="fda-headers-")


def is_stand_in(path: Path) -> bool:
    """Whether a path is one where only headers are true."""
    return stand_in_folder.cache_info().currsize > 0 and path.is_relative_to(stand_in_folder().name)


def stand_ins(place: Place, commit: str, sizes: dict[str, int]) -> Path:
    """A folder with the files of a place: small ones as they are, of weights the header alone, in a file of their size
    that takes no room; of pickles an empty file with the name of what they would become, or nothing in a folder."""
    folder = Path(stand_in_folder().name) / place.kind / place.repo / commit
    path = target_of(folder / place.path) if place.path.endswith(PICKLES) else folder / place.path
    pickles = [sizes.pop(name) for name in list(sizes) if name.endswith(PICKLES)]
    if pickles:
        NOT_FETCHED[path] = f"{place.text}, {sum(pickles) / 1e9:.3g} GB of pickles, read when the run begins"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            path.touch()
    small = [name for name in sizes if not name.endswith((".safetensors", ".npy"))]
    whole = fetched(place, commit, small) if small else folder
    for name, size in sizes.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            continue
        if name in small:
            file.symlink_to(whole / name)
            continue
        begin = header_of(place, commit, name) if name.endswith(".safetensors") else b""
        with open(file, "wb") as handle:
            handle.write(begin)
            handle.truncate(size)
    return path


def header_of(place: Place, commit: str, name: str) -> bytes:
    """The beginning of a safetensors file up to the end of its header, by requests of ranges of it."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(place.repo, name, repo_type=place.kind, revision=commit)

    def read(first: int, last: int) -> bytes:
        wanted = {**build_hf_headers(), "range": f"bytes={first}-{last}"}
        with get_session().stream("GET", url, headers=wanted, follow_redirects=True) as answer:
            hf_raise_for_status(answer)
            got = b""
            for piece in answer.iter_bytes():
                got += piece
                if len(got) > last - first:  # a server that knows no ranges sends all
                    break
        return got[: last - first + 1]

    try:
        begin = read(0, FIRST - 1)
        length = 8 + struct.unpack("<Q", begin[:8])[0]
        return begin[:length] if length <= len(begin) else begin + read(len(begin), length - 1)
    except Exception as error:  # whatever the transport raises
        said = " ".join(str(error).split())
        raise InputError(f"{place.text}: the header of {name} could not be read ({said})") from error


RESOLVERS[SCHEME] = resolve
