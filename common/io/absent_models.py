"""What a path is that holds no model to open, and what to do: caches, ids of the hub, pickles, other formats."""

import re
from collections.abc import Iterator
from pathlib import Path

from common.core.errors import in_short

HUB_ID = r"[\w.-]+/[\w.-]+"
CACHED = "models--"
NOT_FETCHED: dict[Path, str] = {}  # in a dry run: where a model would be, and a sentence on what a run fetches first
FOREIGN = {
    "tf_model.h5": "TensorFlow's weights; open them with transformers before 5 and from_tf=True, and save them",
    "flax_model.msgpack": "Flax's weights; open them with transformers before 5 and from_flax=True, and save them",
    "model.onnx": "an ONNX graph; take the model that it was exported from",
    "weights.npz": "weights of MLX; take the model that they were converted from",
    "consolidated.00.pth": "Meta's own format; transformers' convert_llama_weights_to_hf.py makes a folder of it",
    "consolidated.safetensors": "Mistral's own format; transformers' convert_mistral_weights_to_hf.py reads it",
    "zero_to_fp32.py": "of a DeepSpeed checkpoint; `python zero_to_fp32.py . OUT --safe_serialization` makes weights",
    "mp_rank_00_model_states.pt": "a part of a DeepSpeed checkpoint; zero_to_fp32.py beside this folder makes weights",
}


def nothing_at(path: Path) -> str:
    """Why there is no checkpoint at a path that does not exist."""
    if path.is_symlink():
        return f"{path} is a link to {path.readlink()}, which is not there"
    said = f"there is no checkpoint at {path}"
    name = "/".join(path.parts[-2:])
    cached = snapshot_of(name) or snapshot_of(path.name)
    if cached:
        return f"{said}; an id of the hub is no path here, but the model is in this machine's cache: name {cached}"
    if re.fullmatch(HUB_ID, name) and path.suffix != ".safetensors" and not path.parent.exists():
        return f"{said}; if {name} is an id of the hub, `hf download {name} --local-dir {path}` puts the model there"
    return said


def snapshot_of(name: str) -> Path | None:
    """Where the hub's cache on this machine keeps a model, if it does."""
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = snapshots_in(Path(HF_HUB_CACHE) / (CACHED + name.replace("/", "--")))
    return snapshots[0] if snapshots else None


def snapshots_in(root: Path) -> list[Path]:
    """The snapshots of a model in a cache of the hub: that of `main` first, the others in order."""
    try:
        main = (root / "refs" / "main").read_text().strip()
        return sorted((root / "snapshots").iterdir(), key=lambda snapshot: (snapshot.name != main, snapshot.name))
    except OSError:
        return sorted((root / "snapshots").iterdir()) if (root / "snapshots").is_dir() else []


def nothing_in(folder: Path) -> str:
    """What a folder without a model to open holds instead, as the end of a sentence; "" if nothing that is known."""
    return "".join(f"; {hint}" for hint in hints(folder))


def hints(folder: Path) -> Iterator[str]:
    """What a folder is that holds no model to open, each with what to do."""
    root = folder.parent if folder.name == "snapshots" else folder
    snapshots, cached = snapshots_in(root), sorted(folder.glob(f"{CACHED}*"))
    if snapshots or root.name.startswith(CACHED):
        yield (
            f"it is a model in a cache of the hub, name its snapshot {snapshots[0]}"
            if snapshots
            else ("it is a model in a cache of the hub without a snapshot, download it again")
        )
    elif cached:
        inside = [snapshot for model in cached for snapshot in snapshots_in(model)]
        yield f"it is a cache of the hub, name a snapshot in it{f' such as {inside[0]}' if inside else ''}"
    yield from hints_of_files(folder)
    below = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: ("model" not in p.name, p.name))
    distributed = [each for each in (folder, *below) if is_distributed(each)]  # beside the model its optimizer's
    for each in distributed[:1]:
        yield (
            f"{each} is a distributed checkpoint of PyTorch, as FSDP saves it: `accelerate merge-weights {each} OUT` "
            "makes weights of it, or `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{each} OUT.pt` a pickle for scripts/convert_checkpoint.py"
        )
    if not snapshots and not cached:
        below = sorted(p.name for p in folder.iterdir() if p.is_dir() and holds_weights(p))
        if below:
            yield f"name the folder in it that is meant: {', '.join(in_short(below))}"


def hints_of_files(folder: Path) -> Iterator[str]:
    """What the files of a folder without a model to open are."""
    if (folder / "pytorch_model.bin").is_file():
        yield "scripts/convert_checkpoint.py makes safetensors of pytorch_model.bin"
    if (folder / "pytorch_model.bin.index.json").is_file():
        yield "NLG/split_model.py makes safetensors of the files in pytorch_model.bin.index.json"
    if (folder / "adapter_config.json").is_file():
        yield "it holds an adapter, which can be an expert only"
    shards = sorted(folder.glob("*-of-*.safetensors"))
    if shards and re.fullmatch(r"model-\d+-of-\d+\.safetensors", shards[0].name):
        yield f"it holds {len(shards)} shards, {shards[0].name} the first, without the index that stock libraries need"
        yield "download the index too, or save the model again"
    indices = sorted(folder.glob("model.safetensors.index.*.json"))
    variants = indices or sorted(folder.glob("model.*.safetensors"))
    if variants:
        variant = variants[0].name.removeprefix("model.safetensors.index.").removeprefix("model.").split(".")[0]
        yield f"it holds the variant {variant}, {variants[0].name}, which stock libraries open only when asked for it"
        single = variants[0].name == f"model.{variant}.safetensors"
        yield (
            "rename it to model.safetensors"
            if single
            else (f"save it without: from_pretrained(FOLDER, variant={variant!r}).save_pretrained(OTHER)")
        )
    for file in sorted(folder.glob("*.gguf"))[:1]:
        yield f"{file.name} is a GGUF file; from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(OTHER) reads it"
    yield from (f"{name} is {what}" for name, what in FOREIGN.items() if (folder / name).exists())


def is_distributed(folder: Path) -> bool:
    """Whether a folder holds what torch.distributed.checkpoint writes: a part of each process."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.distcp", ".metadata"))


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds weights under a name that stock libraries open, here or once they are converted."""
    patterns = ("*model*.safetensors", "pytorch_model*.bin", "adapter_config.json")
    return any(next(folder.glob(pattern), None) for pattern in patterns)
