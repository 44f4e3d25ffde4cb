"""Vocabularies that differ by some tokens: one policy for all tensors that have a row for every token."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from common.core.errors import InputError
from common.io.checkpoints import Checkpoint


def row_counts(names: Sequence[str], base: Checkpoint, others: Iterable[Checkpoint], policy: str) -> dict[str, int]:
    """Rows that the vocabulary tensors, embedding first, must have to fit each other; empty if they fit as they are.

    policy: "pad": as many as the largest model has; "base": as many as the base has; "refuse": InputError naming both.
    """
    others = list(others)
    models = [c for c in (base, *others) if any(n in c.shapes for n in names)]
    sizes = {c.path: max(c.shapes[n][0] for n in names if n in c.shapes) for c in models}
    rows = sizes.get(base.path)
    odd = next((path for path, size in sizes.items() if size != rows), None)
    if odd is None or rows is None:
        return {}
    if policy == "refuse":
        raise InputError(
            f"{odd} has {sizes[odd]} tokens, {base.path} has {rows}; model.vocabulary may be pad (missing rows become "
            "the mean of the others) or base (tokens that the base lacks are cut off)"
        )
    return {name: max(sizes.values()) if policy == "pad" else rows for name in names if name in base.shapes}


def tokenizer_folder(expert: Path, base: Path, files: Sequence[str]) -> Path:
    """The expert's folder, or else the base's, where one of a tokenizer's files is; InputError if in neither."""
    for folder in (expert, base):
        if any((folder / name).is_file() for name in files):
            return folder
    raise InputError(f"no tokenizer: neither {expert} nor {base} holds one of {', '.join(files)}")
