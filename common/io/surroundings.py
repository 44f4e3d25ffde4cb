"""What surrounds the weights of a merged model: the base's own files, with no more changed than must be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.core.notices import warn
from common.io.checkpoints import copy_files, write_text
from common.io.model_config import edited
from common.io.tokenizer_files import TOKENIZER_FILES, VOCABULARIES, has_tokenizer, matching


def copy_tokenizer(source: Path, target: Path) -> None:
    """Make the tokenizer files of a folder those of another, and remove others that were there."""
    wanted = matching(source, TOKENIZER_FILES)
    for name in matching(target, TOKENIZER_FILES):
        if name not in wanted:
            (target / name).unlink()
    copy_files(source, target, wanted)


def lend_tokenizer(folder: Path, experts: Mapping[str, Path]) -> None:
    """Give a merged model whose base has no tokenizer that of the experts, if those that have one have the same
    vocabulary, byte by byte; say which it has, or why none.

    experts: the folder or file of each, by task.
    """
    folders = {task: path if path.is_dir() else path.parent for task, path in experts.items()}
    having = {task: place for task, place in folders.items() if has_tokenizer(place)}
    if not having or has_tokenizer(folder):
        return
    first, *others = having.values()
    if all(vocabulary_of(other) == vocabulary_of(first) for other in others):
        copy_tokenizer(first, folder)
        warn(f"the base has no tokenizer; the merged model has that of {', '.join(having)}")
    else:
        warn(
            f"the base has no tokenizer and those of {', '.join(having)} differ, so the merged model has none; put the "
            "one that is meant beside the base"
        )


def vocabulary_of(folder: Path) -> dict[str, bytes]:
    """{name: content} of the files of a folder that hold a vocabulary."""
    return {name: (folder / name).read_bytes() for name in matching(folder, VOCABULARIES)}


def write_edited(text: str, target: Path, changes: Mapping[str, Any], dropped: tuple[str, ...] = ()) -> None:
    """Write a JSON text with some fields changed or dropped, and otherwise as it is."""
    write_text(target, edited(text, changes, dropped))
