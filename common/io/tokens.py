"""The tokens of a tokenizer and their numbers, read from its files as data; and a tokenizer with some tokens more."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.core.errors import InputError
from common.io.checkpoints import write_text
from common.io.json_files import read_object
from common.io.model_config import read_text
from common.io.tokenizer_files import VOCABULARIES, contents

FAST, ADDED, SETTINGS = "tokenizer.json", "added_tokens.json", "tokenizer_config.json"
PLAIN, LINES = "vocab.json", "vocab.txt"  # {token: number}; a token a line, whose number is that of the line
CODES = "bpe.codes"  # beside it a vocab.txt is a list of pieces with their frequencies, as of BERTweet


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer knows.

    ids: {token: its number, which is its row}. added: the tokens beyond the trained vocabulary, each as tokenizer.json
    describes it. padding: the token that fills a batch up, if there is one.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    padding: str | None = None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; InputError if the file holds none."""
    return read_object(file, "file of a tokenizer, a JSON object")


def read_tokens(folder: Path) -> Tokens | None:
    """The tokens of the tokenizer in a folder; None if there is none, or none but such as a tokenizer.model.

    InputError names a file that is damaged.
    """
    try:
        if (folder / FAST).is_file():
            whole = read_json(folder / FAST)
            known = whole["model"]["vocab"]  # of a Unigram model a list of [token, score]
            pairs = known.items() if isinstance(known, dict) else ((row[0], i) for i, row in enumerate(known))
            added = {row["content"]: row for row in whole.get("added_tokens") or []}
            ids = dict(pairs) | {token: row["id"] for token, row in added.items()}
        elif (folder / PLAIN).is_file():
            ids, added = read_json(folder / PLAIN), {}
        elif has_tokens(folder):
            lines = read_text(folder / LINES).removesuffix("\n").split("\n")
            ids, added = {token: i for i, token in enumerate(lines)}, {}
        else:
            return None
        more = read_json(folder / ADDED) if (folder / ADDED).is_file() else {}
        settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
        more |= {row["content"]: int(i) for i, row in (settings.get("added_tokens_decoder") or {}).items()}
        padding = settings.get("pad_token")
        padding = padding["content"] if isinstance(padding, dict) else padding
        return Tokens({token: int(i) for token, i in (more | ids).items()}, added, padding)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"the tokenizer in {folder} is damaged: its files lack what they should hold ({error!r})"
        ) from error


def has_tokens(folder: Path) -> bool:
    """Whether the tokens of the tokenizer in a folder can be read."""
    known = any((folder / name).is_file() for name in (FAST, PLAIN))
    return known or ((folder / LINES).is_file() and not (folder / CODES).is_file())


def same_vocabulary(one: Path, other: Path) -> bool:
    """Whether the files of two tokenizers that hold a vocabulary are the same where both have them, byte by byte."""
    files = [contents(folder, VOCABULARIES) for folder in (one, other)]
    shared = files[0].keys() & files[1].keys()
    more = [contents(folder, [ADDED]) for folder in (one, other)]
    return bool(shared) and more[0] == more[1] and all(files[0][name] == files[1][name] for name in shared)


def with_more(source: Path, more: Mapping[str, tuple[int, Mapping[str, Any]]]) -> str:
    """The text of the tokenizer.json of `source` with more tokens, {token: (number, its description)}.

    InputError if the tokenizers library would number them otherwise.
    """
    from tokenizers import Tokenizer

    whole = read_json(source / FAST)
    whole["added_tokens"] = [*(whole.get("added_tokens") or []), *({**row, "id": i} for i, row in more.values())]
    text = json.dumps(whole, ensure_ascii=False, indent=2)
    opened = Tokenizer.from_str(text)
    for token, (i, _) in more.items():
        if opened.token_to_id(token) != i:
            raise InputError(
                f"{source / FAST} leaves numbers out, so that {token!r} would be {opened.token_to_id(token)}"
            )
    return text


def write_with_more(source: Path, folder: Path, more: Mapping[str, tuple[int, Mapping[str, Any]]]) -> None:
    """Write the tokenizer of `source` with more tokens into `folder`; as `with_more`."""
    write_text(folder / FAST, with_more(source, more))
    if (source / SETTINGS).is_file():
        settings = read_json(source / SETTINGS)
        if "added_tokens_decoder" in settings:
            own = {str(i): {k: v for k, v in row.items() if k != "id"} for i, row in more.values()}
            settings["added_tokens_decoder"] |= own
            write_text(folder / SETTINGS, json.dumps(settings, ensure_ascii=False, indent=2) + "\n")
