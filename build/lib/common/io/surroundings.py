"""What surrounds the weights of a merged model: the base's own files, with no more changed than must be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.io.checkpoints import copy_files, write_text
from common.io.model_config import edited
from common.io.tokenizer_files import TOKENIZER_FILES, matching


def copy_tokenizer(source: Path, target: Path) -> None:
    """Make the tokenizer files of a folder those of another, and remove others that were there."""
    wanted = matching(source, TOKENIZER_FILES)
    for name in matching(target, TOKENIZER_FILES):
        if name not in wanted:
            (target / name).unlink()
    copy_files(source, target, wanted)


def write_edited(text: str, target: Path, changes: Mapping[str, Any], dropped: tuple[str, ...] = ()) -> None:
    """Write a JSON text with some fields changed or dropped, and otherwise as it is."""
    write_text(target, edited(text, changes, dropped))
