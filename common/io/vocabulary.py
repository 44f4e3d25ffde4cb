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

import torch
from torch import Tensor

from common.core.errors import InputError
from common.core.notices import warn
from common.io.adapters import is_adapter
from common.io.checkpoints import Checkpoint
from common.io.matched import JoinedBase, MatchedExpert, Matching
from common.io.model_files import folder_of
from common.io.new_tokens import Added, NewTokens, Vocabularies, new_tokens, placed
from common.io.tensors import with_size
from common.io.token_rows import are_comparable, require_equal_sizes, require_kept_sizes, row_count, row_counts
from common.io.tokenizer_files import VOCABULARIES, has_tokenizer, matching
from common.io.tokens import FAST, Tokens, has_tokens, read_tokens, same_vocabulary


def match_vocabularies(
    axes: Mapping[str, int], base: Checkpoint, experts: Mapping[str, Checkpoint], policy: str
) -> tuple[Checkpoint, dict[str, Checkpoint], Matching]:
    """Base and experts with the same rows for the same tokens, and how they were matched.

    Args:
        axes: {tensor: its axis of tokens}, the embedding first. One of other than the embedding's size keeps it.
        policy: model.vocabulary; "" where there is no such choice, which refuses without naming it.
    Raises: InputError if the policy cannot have it so.
    """
    axes = {name: axis for name, axis in axes.items() if name in base.shapes}
    joint = axes_of_rows(axes, base, experts, policy)
    if not joint:
        return base, dict(experts), Matching(0)
    known = read_vocabularies(axes, joint, base, experts)
    new = {} if policy == "base" or known.own is None else new_tokens(known)
    rows, places, more = placed(known, new, policy)
    matching = matching_of(known, rows, new, places, more)
    if policy == "union" and more:
        base = JoinedBase(base, experts, joint, matching)
    else:
        base.resize({name: with_size(base.shapes[name], axis, rows) for name, axis in joint.items()})
    plain, own_counts = torch.arange(rows), row_counts(axes, base)
    matched = {
        task: expert
        if torch.equal(matching.sources[task], plain) and row_counts(axes, expert).items() <= own_counts.items()
        else MatchedExpert(expert, base, axes, matching.sources[task])
        for task, expert in experts.items()
    }
    return base, matched, matching


def axes_of_rows(
    axes: Mapping[str, int], base: Checkpoint, experts: Mapping[str, Checkpoint], policy: str
) -> dict[str, int]:
    """Of the tensors with an axis of tokens those whose rows are matched, as many as the embedding has; none where what
    compares shapes has to say what is wrong. InputError if numbers of rows differ that must not."""
    models = (base, *experts.values())
    if not axes or not all(are_comparable(axes, base, model) for model in models):
        return {}
    count = base.shapes[next(iter(axes))][next(iter(axes.values()))]
    joint = {name: axis for name, axis in axes.items() if base.shapes[name][axis] == count}
    require_kept_sizes({name: axis for name, axis in axes.items() if name not in joint}, base, models)
    sizes = {model: row_count(joint, model) for model in models}
    if not all(sizes.values()) or (not policy and len(set(sizes.values())) > 1):
        return {}
    if policy == "refuse":
        require_equal_sizes(base, sizes)
    return joint


def read_vocabularies(
    axes: Mapping[str, int], joint: Mapping[str, int], base: Checkpoint, experts: Mapping[str, Checkpoint]
) -> Vocabularies:
    """The tokens and numbers of rows of base and experts."""
    own = read_tokens(base.folder)
    named = any(has_tokenizer(model.folder) for model in (base, *experts.values()))
    names = list(axes) if named else []  # without any tokenizer there are no names that could tell otherwise
    tokens = {task: tokens_of_expert(expert, base.folder, own, names) for task, expert in experts.items()}
    counts = {task: row_count(joint, expert) for task, expert in experts.items()}
    return Vocabularies(base, experts, own, tokens, row_count(joint, base), counts)


def matching_of(known: Vocabularies, rows: int, new: NewTokens, places: Mapping[str, int], more: Added) -> Matching:
    """Which row of each expert is which of the merged model's `rows`."""
    sources, moved = {}, {}
    for task, tokens in known.tokens.items():
        count = known.counts[task]
        own_rows = {key: owners[task] for key, owners in new.items() if task in owners and owners[task] < count}
        sources[task] = source_of(rows, count, known.own, tokens, own_rows, places)
        if token := moved_token(known.own, tokens, own_rows, places):
            moved[task] = token
    return Matching(rows, sources, more, moved)


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
