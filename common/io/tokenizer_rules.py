"""How a tokenizer words a conversation and reads a text, from its files: what models of equal tokens differ in.

A merged model has the base's tokenizer, so what an expert was trained with and the base lacks is worth a sentence.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.core.notices import warn
from common.io.model_config import read_text
from common.io.model_files import folder_of
from common.io.tokens import FAST, SETTINGS, read_json

TEMPLATE, MORE_TEMPLATES, OF_PROCESSOR = "chat_template.jinja", "additional_chat_templates", "chat_template.json"
READING = ("normalizer", "pre_tokenizer")  # the parts of tokenizer.json by which a text becomes pieces
LETTERS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")  # settings of a tokenizer of BERT's


def chat_templates(path: Path) -> dict[str, str]:
    """{name: chat template} of a model where transformers looks for them: files of their own, or else its settings."""
    folder = folder_of(path)
    files = {"default": folder / TEMPLATE} | {file.stem: file for file in sorted(folder.glob(f"{MORE_TEMPLATES}/*"))}
    found = {name: read_text(file) for name, file in files.items() if file.is_file()}
    if found:
        return found
    settings = (read_json(file) for file in (folder / SETTINGS, folder / OF_PROCESSOR) if file.is_file())
    said = next((fields["chat_template"] for fields in settings if fields.get("chat_template")), {})
    if isinstance(said, list):  # as settings have several
        return {str(row.get("name")): str(row.get("template")) for row in said if isinstance(row, dict)}
    return said if isinstance(said, dict) else {"default": str(said)}


def warn_of_templates(base: Path, others: Mapping[str, Path], with_folder: Collection[str]) -> None:
    """Say which experts word a conversation otherwise than the base, whose chat template the merged model has.

    Args:
        base, others: Paths of the base and of each expert.
        with_folder: Experts whose tokenizer gets a folder of its own beside the merged one.
    """
    ours = chat_templates(base)
    found = {task: chat_templates(path) for task, path in others.items()}
    unlike = {task: theirs for task, theirs in found.items() if theirs and theirs != ours}
    if not unlike:
        return
    tasks, first = list(unlike), next(iter(unlike.values()))
    which = "one chat template" if all(theirs == first for theirs in unlike.values()) else "unlike chat templates"
    said = f"{tasks[0]} has a chat template" if len(tasks) == 1 else f"{', '.join(tasks)} have {which}"
    kept = "another, which the merged model has" if ours else "none, and neither has the merged model"
    warn(f"{said}, the base, {base}, has {kept}{beside(tasks, with_folder, 'model.tokenizers')}")


def warn_of_reading(base: Path, others: Mapping[str, Path], with_folder: Collection[str], option: str) -> None:
    """Say which experts read a text otherwise than the base, as one that makes all letters small.

    Args: As `warn_of_templates`, and `option`: what gives an expert's tokenizer a folder.
    """
    ours = reading_of(base)
    for task, path in others.items():
        theirs = reading_of(path)
        parts = [part for part in ours if part in theirs and ours[part] != theirs[part]]
        if parts:
            file, its = (folder_of(each) / (FAST if parts[0] in READING else SETTINGS) for each in (path, base))
            warn(
                f"the {' and the '.join(parts)} in {file} {'is' if len(parts) == 1 else 'are'} not the base's, {its}: "
                f"the merged model reads a text as the base does{beside([task], with_folder, option)}"
            )


def beside(tasks: Sequence[str], with_folder: Collection[str], option: str) -> str:
    """How a sentence ends: which of these experts' tokenizers lie in a folder beside the merged model's."""
    there = [task for task in tasks if task in with_folder]
    if there:
        return f"; beside it lies that of {', '.join(there)}, as {option} says"
    return f"; {option} can name experts whose tokenizer, with all this, gets a folder beside the merged model's"


def reading_of(path: Path) -> dict[str, Any]:
    """{part: its settings} of how a text becomes pieces, every default written out; without a tokenizer.json what the
    settings of the tokenizer say of letters, {} if nothing."""
    file, settings = (folder_of(path) / name for name in (FAST, SETTINGS))
    if not file.is_file():
        said = read_json(settings) if settings.is_file() else {}
        return {part: said[part] for part in LETTERS if part in said}
    whole = read_json(file)
    parts = {part: whole.get(part) for part in READING}
    from tokenizers import Tokenizer

    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    try:
        parsed = json.loads(Tokenizer.from_str(json.dumps(empty | parts)).to_str())
    except Exception:  # whatever the library raises of a part that it does not know: compared as it is written
        return parts
    return {part: parsed.get(part) for part in READING}
