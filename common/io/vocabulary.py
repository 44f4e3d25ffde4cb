"""Vocabularies that differ: rows of embeddings and heads are matched by token, so that one row means one token.

Rows are those of the embedding, and what other tensors have along their axis of tokens: a head, its bias, a second
embedding. The merged model has the base's rows in the base's order. A token that an expert lacks is the base's there:
its task vector is zero in that row. What becomes of tokens that the base lacks is the policy's, model.vocabulary:
    refuse  base and experts have equally many rows; a token of experts alone has the row that it has there
            and joins the base's tokenizer, as with pad
    pad     as many rows as the largest model has; what the base lacks begins as the mean of its rows
    base    the base's rows; what the base lacks is left out
    union   a row for every token of any model, behind the base's; it begins as the mean of those that experts have
Rows without a token, and those of models without a tokenizer, are matched by number. What fills up batches is one
token whatever the experts call it: no model looks at it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.core.errors import InputError, in_short
from common.core.notices import warn
from common.io.adapters import is_adapter
from common.io.checkpoints import Checkpoint
from common.io.matched import JoinedBase, MatchedExpert, Matching
from common.io.model_files import folder_of
from common.io.tensors import with_size
from common.io.token_rows import are_comparable, require_equal_sizes, require_kept_sizes, row_count, row_counts
from common.io.tokenizer_files import VOCABULARIES, has_tokenizer, matching
from common.io.tokens import FAST, Tokens, has_tokens, read_tokens, same_vocabulary, with_more

PADDING = ""  # stands for the padding token that the base lacks, by whatever name


def match_vocabularies(
    axes: Mapping[str, int], base: Checkpoint, experts: Mapping[str, Checkpoint], policy: str
) -> tuple[Checkpoint, dict[str, Checkpoint], Matching]:
    """Base and experts with the same rows for the same tokens, and how they were matched.

    Args:
        axes: {tensor: its axis of tokens}, the embedding first. One of other than the embedding's size keeps it.
        policy: model.vocabulary; "" where there is no such choice, which refuses without naming it.
    Raises: InputError if the policy cannot have it so.
    """
    models = (base, *experts.values())
    axes = {name: axis for name, axis in axes.items() if name in base.shapes}
    if not axes or not all(are_comparable(axes, base, model) for model in models):  # what compares shapes says so
        return base, dict(experts), Matching(0)
    count = base.shapes[next(iter(axes))][next(iter(axes.values()))]
    joint = {name: axis for name, axis in axes.items() if base.shapes[name][axis] == count}
    require_kept_sizes({name: axis for name, axis in axes.items() if name not in joint}, base, models)
    sizes = {model: row_count(joint, model) for model in models}
    if not all(sizes.values()) or (not policy and len(set(sizes.values())) > 1):  # as above
        return base, dict(experts), Matching(0)
    if policy == "refuse":
        require_equal_sizes(base, sizes)
    names = list(axes)
    own = read_tokens(base.folder)
    named = any(has_tokenizer(model.folder) for model in models)  # else there are no names that could tell otherwise
    tokens = {
        task: tokens_of_expert(expert, base.folder, own, names if named else ()) for task, expert in experts.items()
    }
    counts = {task: sizes[expert] for task, expert in experts.items()}
    paths = {task: expert.path for task, expert in experts.items()}
    new = {} if policy == "base" or own is None else new_tokens(own, tokens, counts)
    more: dict[str, tuple[int, Mapping[str, Any]]] = {}
    if policy == "union":
        require_tokenizers(base.folder, own, tokens, paths)
        places = {key: max(own.ids.values()) + 1 + i for i, key in enumerate(new)} if own else {}
        more = described(new, places, tokens, paths)
        with_more(base.folder, more)
        rows = max([sizes[base], *(place + 1 for place in places.values())])
    else:
        rows = max(sizes.values()) if policy == "pad" else sizes[base]
        places = own_places(new, own, paths, base.path, policy)
        more = taken_over(base.folder, new, places, tokens, paths, policy)
    own_rows = {
        task: {key: owners[task] for key, owners in new.items() if task in owners and owners[task] < counts[task]}
        for task in experts
    }
    sources = {task: source_of(rows, counts[task], own, tokens[task], own_rows[task], places) for task in experts}
    moved = {task: moved_token(own, tokens[task], own_rows[task], places) for task in experts}
    matching = Matching(rows, sources, more, {task: token for task, token in moved.items() if token})
    if policy == "union" and more:
        base = JoinedBase(base, experts, joint, matching)
    else:
        base.resize({name: with_size(base.shapes[name], axis, rows) for name, axis in joint.items()})
    plain = torch.arange(rows)
    matched = {
        task: expert
        if torch.equal(sources[task], plain) and row_counts(axes, expert).items() <= row_counts(axes, base).items()
        else MatchedExpert(expert, base, axes, sources[task])
        for task, expert in experts.items()
    }
    return base, matched, matching


def tokens_of_expert(expert: Checkpoint, base: Path, own: Tokens | None, names: Sequence[str]) -> Tokens | None:
    """An expert's tokens; the base's, `own`, where the expert's files are those of the base's folder, or for an adapter
    without a tokenizer; None if they are unknown, with a warning where it moves tensors of these names."""
    same = not has_tokens(expert.folder) and same_vocabulary(expert.folder, base)
    read = not same and (has_tokens(expert.folder) or not is_adapter(expert.path))
    found = read_tokens(expert.folder) if read else own
    if (found is None or own is None) and not same and any(map(expert.touches, names)):
        lacking = ("the base", base) if own is None else (expert.path, expert.folder)
        files = [matching(folder, VOCABULARIES) for folder in (expert.folder, base)]
        shared = sorted(set(files[0]) & set(files[1]))
        why = f"{lacking[0]} has no {FAST}"
        if not has_tokens(expert.folder) and own is None and shared:
            why = f"its {shared[0]} is not the base's, nor is there a {FAST}"
        warn(
            f"the rows of {expert.path} are matched by number: {why}; save the tokenizers of all with save_pretrained, "
            f"which writes a {FAST}, and rows are matched by token"
        )
    return found


def key_of(token: str, tokens: Tokens) -> str:
    """What a token that the base lacks is known by: its text, or that it is the padding token."""
    return PADDING if token == tokens.padding else token


def called(key: str) -> str:
    """A token for a sentence, by what it is known by."""
    return f"the token {key!r}" if key != PADDING else "the padding token"


def new_tokens(
    base: Tokens, tokens: Mapping[str, Tokens | None], counts: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """{token: {task: its row there}} of the tokens that the base lacks, in the order of tasks and rows."""
    new: dict[str, dict[str, int]] = {}
    for task, own in tokens.items():
        lacking = sorted((i, t) for t, i in (own.ids.items() if own else ()) if t not in base.ids and i < counts[task])
        for i, token in lacking:
            assert own
            new.setdefault(key_of(token, own), {})[task] = i
    return new


def own_places(
    new: Mapping[str, Mapping[str, int]], base: Tokens | None, paths: Mapping[str, Path], base_path: Path, policy: str
) -> dict[str, int]:
    """The rows of new tokens where they have them in the experts; InputError if a row would be two tokens, or a token
    two rows."""
    taken = {i: (token, base_path) for token, i in base.ids.items()} if base else {}
    places = {}
    for key, owners in new.items():
        for task, row in owners.items():
            first = places.setdefault(key, row)  # where an expert before has it
            token, path = taken.setdefault(first, (key, paths[task]))
            if token != key or first != row:
                ways = (
                    "model.vocabulary may be union (each token gets a row of its own) or base (tokens that the base "
                    "lacks are left out)"
                )
                raise InputError(
                    f"row {first} is {called(token)} in {path}, {called(key)} is row {row} in {paths[task]}; "
                    f"{ways if policy else 'models that are merged must have one vocabulary'}"
                )
    return places


def require_tokenizers(
    base: Path, own: Tokens | None, tokens: Mapping[str, Tokens | None], paths: Mapping[str, Path]
) -> None:
    """InputError if the tokens of some model are unknown."""
    for path, found in [(base, own), *((paths[task], found) for task, found in tokens.items())]:
        if found is None or (path == base and not (base / FAST).is_file()):
            raise InputError(f"model.vocabulary is union, but {path} has no {FAST}; save its tokenizer there")


def described(
    new: Mapping[str, Mapping[str, int]],
    places: Mapping[str, int],
    tokens: Mapping[str, Tokens | None],
    paths: Mapping[str, Path],
) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """{token: (row, description)} of new tokens; InputError if one is more than an added token."""
    more = {}
    for key in places:
        task = next(iter(new[key]))
        own = tokens[task]
        assert own
        token = own.padding if key == PADDING else key
        if token is None or token not in own.added:
            raise InputError(
                f"{token!r} is in the trained vocabulary of {paths[task]}, not among its added_tokens, so it cannot "
                "join the base's tokenizer; model.vocabulary may be base"
            )
        more[token] = (places[key], own.added[token])
    return more


def taken_over(
    base: Path,
    new: Mapping[str, Mapping[str, int]],
    places: Mapping[str, int],
    tokens: Mapping[str, Tokens | None],
    paths: Mapping[str, Path],
    policy: str,
) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """{token: (row, description)} of new tokens in the rows that they have in the experts, which join the base's
    tokenizer; none, with a warning, if it cannot have one of them there."""
    if not places:
        return {}
    try:
        if not (base / FAST).is_file():
            raise InputError(f"{base} has no {FAST}")
        more = described(new, dict(sorted(places.items(), key=lambda place: place[1])), tokens, paths)
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


def source_of(
    rows: int,
    count: int,
    base: Tokens | None,
    own: Tokens | None,
    own_rows: Mapping[str, int],
    places: Mapping[str, int],
) -> Tensor:
    """For every merged row the expert's, of which there are `count`; -1 where the expert lacks it.

    own_rows: {new token: row in the expert}. places: {new token: row in the merged model}.
    """
    source = list(range(min(rows, count))) + [-1] * (rows - count)
    if base and own and own is not base:
        for i in own.ids.values():
            if i < len(source):
                source[i] = -1  # the row of a token, which goes where the token belongs
        for token, i in base.ids.items():
            if i < rows:
                source[i] = own.ids.get(token, -1)
        for key, i in places.items():
            source[i] = own_rows.get(key, -1)
    found = torch.tensor(source)
    return torch.where(found < count, found, -1)


def moved_token(
    base: Tokens | None, own: Tokens | None, own_rows: Mapping[str, int], places: Mapping[str, int]
) -> tuple[str, int, int] | None:
    """A token of an expert that has another row in the merged model: the token, its row in the expert, in the model."""
    if not base or not own or own is base:
        return None
    shared = ((token, i, base.ids[token]) for token, i in own.ids.items() if token in base.ids)
    new = ((key, i, places[key]) for key, i in own_rows.items() if key in places)
    return next((row for row in (*shared, *new) if row[1] != row[2]), None)


def tokenizer_folder(expert: Path, base: Path, files: Sequence[str]) -> Path:
    """The expert's folder, or else the base's, where one of a tokenizer's files is; InputError if in neither."""
    for folder in map(folder_of, (expert, base)):
        if any(file.is_file() for name in files for file in folder.glob(name)):
            return folder
    raise InputError(f"no tokenizer: neither {expert} nor {base} holds one of {', '.join(files)}")
