"""The heads of tasks, which are never merged: read from each task's expert, and put beside the one merged body."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.core.errors import InputError
from common.core.task_vectors import LazyTensor, Params, is_finite, require_same_shapes
from common.io.checkpoints import Checkpoint, write_tensors, write_text
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


def with_pooler(
    tensors: Mapping[str, LazyTensor], base: Checkpoint, pooler: str, headed: bool
) -> dict[str, LazyTensor]:
    """The merged tensors, and the base's pooler where none was merged: stock AutoModel would draw one at random.

    None at all where heads are written beside them (`headed`), whose folders hold their own if they have one.

    pooler: how the names of its tensors begin.
    """
    if headed:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(pooler)}
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


def write_task_head(folder: Path, head: Params, body: Iterable[str]) -> None:
    """A folder heads/<task> within that of a merged model: the head, a relative link to the body two folders above, and
    the index by which stock transformers finds the tensors of both.

    body: names of the tensors in the merged model's file.
    """
    write_tensors(folder / HEAD, head)
    (folder / BODY).unlink(missing_ok=True)
    (folder / BODY).symlink_to("../../model.safetensors")
    files = dict.fromkeys(body, BODY) | dict.fromkeys(head, HEAD)
    write_text(folder / INDEX_FILE, json.dumps({"metadata": {}, "weight_map": files}, indent=1) + "\n")
