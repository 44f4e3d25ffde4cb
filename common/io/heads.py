"""Output heads that are one tensor with the embedding, or are not: told by config and tensors together.

A model is tied if its config says so (tie_word_embeddings, or the default of its class) and its file has no head of its
own, or an identical copy of the embedding. Stock transformers opens a head that differs as it is stored, whatever the
config says (transformers 5, PreTrainedModel.tie_weights); so do we.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.core.errors import InputError
from common.core.notices import warn
from common.io.adapters import is_adapter
from common.io.checkpoints import Checkpoint
from common.io.headers import opened
from common.io.lora import open_checkpoint
from common.io.model_config import config_file, known_config, parse, read_config
from common.io.model_files import CONFIG_FILE

ROWS = 4096  # of an embedding and a head that are compared at a time


def declared_config(path: Path, text: str = "") -> dict[str, Any]:
    """The config.json of the model at a path, or what `text` says where there is none; {} if there is neither."""
    file = config_file(path)
    return read_config(file) if file else parse(text or "{}", "model.arch")


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """tie_word_embeddings as transformers takes it: the class's own where the config leaves it out, of some models that
    see images that of their text; None if there is no config.

    A class without such a field, as Mllama's is, ties nothing: so does PreTrainedModel.tie_weights.
    """
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return config.get("tie_word_embeddings")
    return bool(getattr(known_config(config, CONFIG_FILE), "tie_word_embeddings", False))


def says_headless(config: Mapping[str, Any]) -> str:
    """The architecture that a config names if it is one without a head over the vocabulary, else ""."""
    from transformers.models.auto import modeling_auto as classes

    named = config.get("architectures") or []
    kinds = (
        classes.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        classes.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        classes.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return "" if any(set(named) & set(kind.values()) for kind in kinds) else "".join(named[:1])


def is_tied(model: Checkpoint, names: tuple[str, ...], config: Mapping[str, Any]) -> bool | None:
    """Whether a model's embedding is its head; None if it has no head at all, as a reward model has none.

    A tied model that keeps its one tensor under the head's name is given the embedding's. InputError if the config
    says that there is a head of its own, and there is none.
    """
    embedding, head = names
    said = says_tied(config)
    if head in model.shapes and embedding not in model.shapes and said:
        model.alias(embedding, head)
    if head in model.shapes:
        return bool(said) and are_equal(model, embedding, head)
    if says_headless(config):
        return None
    if said is False:
        raise InputError(
            f"{model.path} has no tensor {head}, and its {CONFIG_FILE} says tie_word_embeddings false: the head was "
            "lost when the model was saved; save it with its head, or set tie_word_embeddings true if it is tied"
        )
    return True


def are_equal(model: Checkpoint, one: str, other: str) -> bool:
    """Whether two matrices of a model are equal number for number; a piece of each is in memory at a time."""
    if one not in model.rows or model.shapes[one] != model.shapes[other]:
        return False
    a, b = model.rows[one], model.rows[other]
    for begin in range(0, a.shape[0], ROWS):
        with opened(a.file) as first, opened(b.file) as second:
            piece = slice(begin, begin + ROWS)
            if not torch.equal(first.get_slice(a.stored)[piece], second.get_slice(b.stored)[piece]):
                return False
    return True


def open_experts(
    base: Checkpoint,
    paths: Mapping[str, Path],
    names: Callable[[str], str | None],
    vocabulary: tuple[str, ...] = (),
    arch: str = "",
    turned: Collection[str] | None = None,
) -> dict[str, Checkpoint]:
    """The experts of a base, whole or adapters, such that all models have the same heads.

    There is no head where all are tied; else each has one, which is the embedding where a model is tied.

    Args:
        base: The base, which is given the same head.
        paths: {task: the expert's place}.
        names: From a stored name to the family's.
        vocabulary: Names of the embedding and the head; of other tensors none are tied.
        arch: The base's config, if there is no file of it.
        turned: Names of the matrices that are (inputs, outputs).
    Raises:
        InputError: if an expert does not belong to the base, or some models have a head and some have none.
    """
    if len(vocabulary) != 2:
        return {task: open_checkpoint(path, base.path, names, None, turned) for task, path in paths.items()}
    config = declared_config(base.path, arch)
    state = is_tied(base, vocabulary, config)
    experts = {
        task: open_checkpoint(path, base.path, names, vocabulary if state else None, turned)
        for task, path in paths.items()
    }
    states = [(base, state)]
    for expert in experts.values():
        if is_adapter(expert.path):
            states.append((expert, vocabulary[1] not in expert.shapes if state is not None else None))
        else:
            states.append((expert, is_tied(expert, vocabulary, declared_config(expert.path) or config)))
    require_one_kind(vocabulary[1], states)
    parted = any(state is False for _, state in states)
    for model, state in states:
        give_head(model, vocabulary, state, parted)
    return experts


def leave_to_heads(before_head: str, base: Checkpoint, experts: Iterable[Checkpoint]) -> None:
    """Let nothing that begins with `before_head` be merged, unless all models have it and none a head behind it."""
    models = [base, *experts]
    if not before_head or not any(model.names(before_head) for model in models):
        return
    whole = all(model.names(before_head) == base.names(before_head) for model in models)
    headless = not any(model.left_out for model in models)
    if whole and headless:
        return
    if headless:
        part = next(model for model in models if model.names(before_head) != base.names(before_head))
        warn(f"{before_head}… is not merged, for {part.path} and {base.path} do not have the same tensors there")
    for model in models:
        for name in model.names(before_head):
            model.drop(name)


def require_one_kind(head: str, states: Sequence[tuple[Checkpoint, bool | None]]) -> None:
    """InputError if some models have a head, their own or the embedding, and some have none."""
    without = next((model for model, state in states if state is None), None)
    having = next((model for model, state in states if state is not None), None)
    if without and having:
        kind = says_headless(declared_config(without.path))
        raise InputError(
            f"{without.path} has no head {head}: {CONFIG_FILE} calls it {kind}; {having.path} has one; models that are "
            "merged must be of one kind, the base too"
        )


def give_head(model: Checkpoint, vocabulary: tuple[str, ...], tied: bool | None, parted: bool) -> None:
    """Let a tied model have its embedding as a head if heads are `parted` from embeddings, else no head."""
    embedding, head = vocabulary
    if tied and parted:
        model.alias(head, embedding)
    elif tied:
        model.drop(head)


def open_like(
    base: Checkpoint, path: Path, names: Callable[[str], str | None], vocabulary: tuple[str, ...]
) -> Checkpoint:
    """A whole model with the same head as a base that `open_experts` has seen to."""
    model = Checkpoint(path, names)
    if len(vocabulary) == 2 and vocabulary[0] in base.shapes:
        config = declared_config(path) or declared_config(base.path)
        give_head(model, vocabulary, is_tied(model, vocabulary, config), vocabulary[1] in base.shapes)
    return model
