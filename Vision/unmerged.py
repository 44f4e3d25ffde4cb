"""What a CLIP that is merged has besides its image tower, which is never merged: said in a warning, not dropped in
silence."""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from pathlib import Path

import torch

from common.config import Model
from common.core.blocks import BlockFamily
from common.core.errors import InputError
from common.core.notices import warn
from common.io.adapters import is_adapter
from common.io.checkpoints import Checkpoint
from common.io.headers import StoredTensor
from common.io.hub import is_stand_in
from common.io.lora import open_checkpoint
from common.io.model_files import State, same_bytes, state_of
from common.io.stored_types import FLOATS, coarser
from common.io.tensors import read_tensor
from common.io.unstacked import stored_type, unstacked
from Vision.layouts import PROJECTION

TEXT = (  # how names of a text tower begin in a file of either library
    "text_model.", "text_projection", "text.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.",
)  # fmt: skip
LEFT = ("logit_scale", "logit_bias", "visual_projection.")  # of no weight in an answer; compared elsewhere


def warn_of_unmerged(model: Model, family: BlockFamily, known: Collection[str], others: Mapping[str, Path]) -> None:
    """Say which of some models have a text tower unlike the base's, and which have a head or other tensors besides.

    Args:
        known: names of all tensors of the base's whole model.
        others: the path of each model that is merged, by its name.
    """
    kept = Checkpoint(model.path("base"), family.names).rows
    if model.text and model.path("text").exists():
        kept = Checkpoint(model.path("text"), family.names).rows | kept
    unlike, apart, more = {}, {}, {}
    for task, path in others.items():
        try:
            theirs = open_checkpoint(path, model.path("base"), family.names)
        except InputError:  # which is said where it is opened to be merged
            continue
        names = [name for name in theirs.names() if not name.startswith((family.scope, *LEFT))]
        beside = [name for name in names if name not in known and is_weight(theirs, name)]
        tower = [name for name in names if name in known and name in kept]
        own = [name for name in tower if theirs.touches(name)]
        if not is_adapter(path):
            own = [] if is_stand_in(path) else first_unlike(kept, theirs.rows, own)
        for where, found in (
            (unlike, own),
            (apart, [name for name in beside if name.startswith(TEXT)]),
            (more, [name for name in beside if not name.startswith(TEXT)]),
        ):
            if found:
                where[task] = found[0]
    say(unlike, "is a text tower unlike the base's")
    say(apart, "is a text tower in another library's layout, which is not compared with the base's")
    say(more, "are tensors that are no part of the base's model")


def say(found: Mapping[str, str], what: str) -> None:
    """The warning for what some models have: {task: name of a tensor of it}."""
    if found:
        warn(
            f"{', '.join(found)}: there {what}, such as {next(iter(found.values()))}: image towers alone are merged, "
            "and the base's text tower is kept, which makes the zero-shot heads; model.head can name other heads"
        )


def is_weight(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is no buffer of whole numbers, as a counter of steps."""
    return is_adapter(checkpoint.path) or checkpoint.rows[name].dtype in FLOATS


def first_unlike(
    ours: Mapping[str, StoredTensor], theirs: Mapping[str, StoredTensor], names: Iterable[str]
) -> list[str]:
    """The smallest tensor in which two models differ, in a list; an empty one if there is none."""
    for name in sorted(names, key=lambda name: theirs[name].nbytes):
        one, other = ours[name], theirs[name]
        if not equal(one, other, state_of((one.file, other.file))):
            return [name]
    return []


@cache
def equal(one: StoredTensor, other: StoredTensor, state: State) -> bool:
    """Whether two stored tensors are the same numbers, rounded to the coarser of their types.

    state: of their two files. A comparison of the same state is made once, for a run opens its models again and again.
    """
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        return same_bytes(one, other)
    if one.dtype not in FLOATS or other.dtype not in FLOATS:
        return False
    dtype = coarser(one.dtype, other.dtype)
    return torch.equal(read_tensor(one).to(dtype), read_tensor(other).to(dtype))


def check_projection(base: Path, family: BlockFamily, answering: Callable[[], Checkpoint], other: Path) -> None:
    """InputError if another model, or an adapter of the base, brings a projection of its own behind the tower, which is
    never merged.

    answering: gives the checkpoint whose projection the merged model answers through.
    """
    theirs = unstacked(open_checkpoint(other, base, family.names), family.pieces)
    if PROJECTION not in theirs.shapes or is_stand_in(other) or not theirs.touches(PROJECTION):
        return
    ours = answering()
    if is_adapter(other):
        same = torch.equal(*(each.read([PROJECTION])[PROJECTION] for each in (theirs, ours)))
    else:
        same = same_rounded(theirs, ours, PROJECTION)
    if not same:
        raise InputError(
            f"{other}: {PROJECTION} is not that of {ours.path}; the image tower alone is merged, and would answer "
            "through the latter: take experts whose projection was frozen"
        )


def same_rounded(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether a tensor is the same numbers in two models, rounded to the coarser of its types: that of a model which
    was saved in half precision was only rounded where it was frozen."""
    dtype = coarser(*(stored_type(each, name) for each in (one, other)))
    return torch.equal(*(each.read([name])[name].to(dtype) for each in (one, other)))
