"""Weights in a file that the class of its model does not load, such as layers that predict several tokens at once."""

from collections.abc import Callable, Iterable, Mapping

from common.core.errors import in_short
from common.core.notices import warn
from common.io.checkpoints import Checkpoint


def settle_unread(base: Checkpoint, others: Iterable[Checkpoint], unread: Callable[[str], bool]) -> None:
    """Let every model have those of these weights that the base has, which are merged like others then.

    A model that transformers saved lacks them, as it was trained without: it is given the base's. What the base lacks
    is left out. Either is said.
    """
    expected = set(filter(unread, base.shapes))
    for model in others:
        own = set(filter(unread, model.shapes))
        for name in expected - own:
            model.borrow(name, base)
        for name in own - expected:
            model.drop(name)
        if expected - own:
            warn(f"{model.path} lacks {said(expected - own)}; the base's stand for them, {base.path}")
        if own - expected:
            warn(f"{model.path} has {said(own - expected)}, which the base, {base.path}, lacks; they are not merged")


def with_copies(axes: Mapping[str, int], base: Checkpoint, unread: Callable[[str], bool]) -> dict[str, int]:
    """The tensors with a row for every token, {name: axis}, the embedding first, and its copies among these weights."""
    shape = base.shapes.get(next(iter(axes), ""))
    return {**axes, **{name: 0 for name, own in base.shapes.items() if own == shape and unread(name)}}


def said(names: set[str]) -> str:
    """Tensors, for a sentence."""
    named = " and ".join(in_short(sorted(names), most=2))
    return f"{named}, which transformers leaves aside when it opens such a model"
