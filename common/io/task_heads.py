"""The heads of tasks, which are never merged: read from each task's expert, and put beside the one merged body."""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.core.errors import InputError
from common.core.task_vectors import LazyTensor, Params, is_finite, require_same_shapes
from common.io.adapters import is_adapter
from common.io.checkpoints import Checkpoint, plain_names, write_tensors, write_text
from common.io.lora import open_checkpoint
from common.io.model_files import INDEX_FILE

if TYPE_CHECKING:  # an import of seconds
    from transformers import PreTrainedModel

BODY, HEAD = "encoder.safetensors", "head.safetensors"


def read_task_head(
    classifier: "PreTrainedModel", in_body: Callable[[str], str | None], expert: Path, base: Path
) -> Params:
    """All tensors of an expert that lie in no body, under the names that its class gives them.

    Args:
        classifier: The expert's class without weights.
        in_body: From a name in the class to that in the body; None of one that belongs to the head.
        expert, base: Where the expert is, whole or an adapter of the base.
    Raises: InputError if the expert lacks one of them or has it in another shape than its class.
    """
    prefix = f"{classifier.base_model_prefix}."
    from common.io.skeleton import turned_weights

    shapes = {name: tensor.shape for name, tensor in classifier.state_dict().items() if in_body(name) is None}
    full = {name.removeprefix(prefix): name for name in shapes}  # a bare base has no prefix before its pooler
    turned = {in_body(name) or name for name in turned_weights(classifier)}
    head = open_checkpoint(
        expert, base, lambda stored: full.get(stored.removeprefix(prefix)) or in_body(stored), turned=turned
    )
    found = {name: shape for name, shape in head.shapes.items() if name in shapes}
    require_same_shapes(found, shapes, f"the head in {expert}")
    return head.read(shapes)


def refuse_copies(path: Path, names: Callable[[str], str | None], known: Collection[str], blocks: str) -> None:
    """InputError if a model has its layers a second time under other names, as a moving average beside them: what lies
    in no body counts as a head, and one of the two would be left out without a word.

    Args:
        names: From a stored name to that in the body, None for what lies in none.
        known: Names of all tensors of the body.
        blocks: The path of its layers.
    """
    stored = plain_names(path) if not is_adapter(path) else []
    there = {own for own in map(names, stored) if own in known}
    for name in stored:
        words = name.split(".") if names(name) is None else []
        inner = (names(".".join(words[begin:])) for begin in range(1, len(words)))
        copied = next((own for own in inner if own and own in there and own.startswith(f"{blocks}.")), None)
        if copied:
            raise InputError(
                f"{path} holds {name} beside {copied}: a second model, as a moving average of the first; which is "
                "meant no name tells; save that one alone"
            )


def with_pooler(tensors: Mapping[str, LazyTensor], base: Checkpoint, pooler: str) -> dict[str, LazyTensor]:
    """The merged tensors, and the base's pooler where none was merged: stock AutoModel would draw one at random.

    pooler: how the names of its tensors begin.
    """
    return {**tensors, **base.lazy(name for name in base.names(pooler) if name not in tensors)}


def head_in_type(head: Params, dtype: torch.dtype, task: str) -> Params:
    """A head in the type of the merged weights; InputError names a tensor whose values that cannot hold."""
    stored = {name: tensor.to(dtype) for name, tensor in head.items()}
    for name, tensor in stored.items():
        if not is_finite(tensor):
            raise InputError(
                f"model.heads: {name} of the head of {task} reaches {head[name].abs().max():.3g}, too much for "
                f"{dtype}, which the base is stored in; leave {task} out of model.heads, or give the base in float32"
            )
    return stored


def write_task_head(place: Path, head: Params, file: Path, body: Iterable[str], prefix: str) -> None:
    """A folder within that of a merged model: the head, a relative link to the body, and the index by which stock
    transformers finds the tensors of both.

    A head's own pooler has the name that the base's has in the body: of two files in the order of their names
    transformers takes the later, which is the head's.

    Args:
        place: The folder, heads/<task> in that of the merged model, or deeper where the task's name has a slash.
        head: The tensors under the names that the task's class gives them.
        file, body: The merged model's file, and the names of the tensors in it.
        prefix: How names in the class begin of what lies in the body.
    """
    held = set(body)
    head = {name.removeprefix(prefix) if name.removeprefix(prefix) in held else name: t for name, t in head.items()}
    write_tensors(place / HEAD, head)
    (place / BODY).unlink(missing_ok=True)
    (place / BODY).symlink_to(os.path.relpath(file, place))
    files = dict.fromkeys(held, BODY) | dict.fromkeys(head, HEAD)
    index = {"metadata": {}, "weight_map": dict(sorted(files.items()))}
    write_text(place / INDEX_FILE, json.dumps(index, indent=1) + "\n")


def order_of(outputs: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """For each class the number of the output that has its name, in whatever case and punctuation; None unless each has
    one, and no other name is among them."""
    plain, wanted = [folded(name) for name in outputs], [folded(name) for name in classes]
    same = len(set(plain)) == len(plain) and sorted(plain) == sorted(wanted)
    return [plain.index(name) for name in wanted] if same else None


def folded(name: str) -> str:
    """A name without case, punctuation and spaces of its own; of a number, alone or behind LABEL_, the number."""
    words = re.sub(r"[\W_]+", " ", str(name).casefold()).strip()
    number = words.removeprefix("label ")
    return str(int(number)) if number.isdecimal() else words
