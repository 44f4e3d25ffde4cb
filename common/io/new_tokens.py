"""Tokens that experts have and the base lacks: which rows they get in the merged model, and whether the base's
tokenizer can take them in. What model.vocabulary has to do with it is in vocabulary.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.core.errors import InputError, in_short
from common.core.notices import warn
from common.io.checkpoints import Checkpoint
from common.io.tokens import FAST, Tokens, with_more

PADDING = ""  # stands for the padding token that the base lacks, by whatever name
ONE = "models that are merged must have one vocabulary"
NewTokens = Mapping[str, Mapping[str, int]]
"""{token that the base lacks: {task: its row in that expert}}"""
Added = dict[str, tuple[int, Mapping[str, Any]]]
"""{token: (its row in the merged model, its description)} of what joins the base's tokenizer."""


@dataclass(frozen=True)
class Vocabularies:
    """What is known of the tokens of base and experts.

    own: the base's tokens. tokens: those of each expert; None where they are unknown.
    count: how many rows the base has. counts: how many each expert has.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    own: Tokens | None
    tokens: Mapping[str, Tokens | None]
    count: int
    counts: Mapping[str, int]


def new_tokens(known: Vocabularies) -> dict[str, dict[str, int]]:
    """{token: {task: its row there}} of the tokens that the base lacks, in the order of tasks and rows."""
    base, new = known.own.ids if known.own else {}, {}
    for task, own in known.tokens.items():
        count = known.counts[task]
        lacking = sorted((i, t) for t, i in (own.ids.items() if own else ()) if t not in base and i < count)
        for i, token in lacking:
            assert own
            new.setdefault(key_of(token, own), {})[task] = i
    return new


def placed(known: Vocabularies, new: NewTokens, policy: str) -> tuple[int, dict[str, int], Added]:
    """How many rows the merged model has, {new token: its row there}, and the tokens that join the base's tokenizer."""
    if policy != "union":
        places = own_places(known, new, policy)
        rows = max(known.count, *known.counts.values()) if policy == "pad" else known.count
        return rows, places, taken_over(known, new, places, policy)
    require_tokenizers(known)
    places = {key: max(known.own.ids.values()) + 1 + i for i, key in enumerate(new)} if known.own else {}
    more = described(known, new, places)
    with_more(known.base.folder, more)
    return max([known.count, *(place + 1 for place in places.values())]), places, more


def own_places(known: Vocabularies, new: NewTokens, policy: str) -> dict[str, int]:
    """The rows of new tokens where they have them in the experts; InputError if a row would be two tokens, or a token
    two rows."""
    taken = {i: (token, known.base.path) for token, i in known.own.ids.items()} if known.own else {}
    places = {}
    for key, owners in new.items():
        for task, row in owners.items():
            first = places.setdefault(key, row)  # where an expert before has it
            token, path = taken.setdefault(first, (key, known.experts[task].path))
            if token != key or first != row:
                ways = (
                    "model.vocabulary may be union (each token gets a row of its own) or base (tokens that the base "
                    "lacks are left out)"
                )
                raise InputError(
                    f"row {first} is {called(token)} in {path}, {called(key)} is row {row} in "
                    f"{known.experts[task].path}; {ways if policy else ONE}"
                )
    return places


def require_tokenizers(known: Vocabularies) -> None:
    """InputError if the tokens of some model are unknown."""
    base = known.base.folder
    for path, found in [(base, known.own), *((known.experts[task].path, own) for task, own in known.tokens.items())]:
        if found is None or (path == base and not (base / FAST).is_file()):
            raise InputError(f"model.vocabulary is union, but {path} has no {FAST}; save its tokenizer there")


def described(known: Vocabularies, new: NewTokens, places: Mapping[str, int]) -> Added:
    """{token: (row, description)} of new tokens; InputError if one is more than an added token."""
    more = {}
    for key in places:
        task = next(iter(new[key]))
        own = known.tokens[task]
        assert own
        token = own.padding if key == PADDING else key
        if token is None or token not in own.added:
            raise InputError(
                f"{token!r} is in the trained vocabulary of {known.experts[task].path}, not among its added_tokens, so "
                "it cannot join the base's tokenizer; model.vocabulary may be base"
            )
        more[token] = (places[key], own.added[token])
    return more


def taken_over(known: Vocabularies, new: NewTokens, places: Mapping[str, int], policy: str) -> Added:
    """{token: (row, description)} of new tokens in the rows that they have in the experts, which join the base's
    tokenizer; none, with a warning, if it cannot have one of them there."""
    base = known.base.folder
    if not places:
        return {}
    try:
        if not (base / FAST).is_file():
            raise InputError(f"{base} has no {FAST}")
        more = described(known, new, dict(sorted(places.items(), key=lambda place: place[1])))
        with_more(base, more)
        return more
    except InputError as error:
        named = [repr(key) for key in places if key != PADDING]
        way = "; model.tokenizers gives an expert's a folder beside the merged model" if policy else ""
        if named:
            warn(
                f"rows are merged of {', '.join(in_short(named))}, tokens of "
                f"{', '.join(dict.fromkeys(task for owners in new.values() for task in owners))}, which the merged "
                f"model's tokenizer does not know, for it is the base's: {error}{way}"
            )
        return {}


def key_of(token: str, tokens: Tokens) -> str:
    """What a token that the base lacks is known by: its text, or that it is the padding token."""
    return PADDING if token == tokens.padding else token


def called(key: str) -> str:
    """A token for a sentence, by what it is known by."""
    return f"the token {key!r}" if key != PADDING else "the padding token"
