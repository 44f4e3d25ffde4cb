"""How a merged language model is written: as stock transformers opens it, with the tokenizers that are asked for."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.config import Model
from common.core.errors import InputError
from common.core.task_vectors import LazyTensor
from common.io.checkpoints import Checkpoint
from common.io.model_config import config_file, dtype_field, parse, read_config, read_text
from common.io.model_files import CONFIG_FILE, GENERATION_FILE, folder_of
from common.io.shards import publish_shards, stage_shards
from common.io.stored_types import as_stored, output_type
from common.io.surroundings import copy_surroundings, copy_tokenizer, write_edited
from common.io.tokenizer_files import VOCABULARIES, has_tokenizer
from common.io.unstacked import stacked
from NLG.decoders import architecture, config_text, reading, skeleton
from NLG.inputs import base_config, class_names, outside

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKEN_FIELDS = (*TOKENS, "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "tokenizer_class")


def check_export(model: Model) -> None:
    """InputError if a merged model could not be written, or not with the tokenizers asked for."""
    architecture(model)
    for task in model.tokenizers:
        folder = folder_of(model.path("expert", task))
        if not has_tokenizer(folder):
            raise InputError(f"model.tokenizers names {task}, but {folder} holds none of {', '.join(VOCABULARIES)}")


def export(model: Model, tensors: Mapping[str, LazyTensor], folder: Path) -> None:
    """Write a merged model that stock transformers opens, a shard at a time; its index is written last.

    The folder has what surrounds the base's weights. For each of model.tokenizers a folder within it has that expert's
    tokenizer, special tokens and generation config, and links to the weights: the paper saves the same weights once
    with each tokenizer.
    """
    base, (embedding, head) = Checkpoint(model.path("base"), reading(model).names), reading(model).vocabulary
    text, where = config_text(model)
    fields = parse(text, where)
    dtype = output_type(base, fields, model.dtype)
    whole = stacked(tensors, reading(model).stored(skeleton(model)), reading(model).pieces)
    stage_shards(as_stored(whole, dtype, base, bool(model.dtype)), folder)
    shapes = {name: tensor.shape for name, tensor in whole.items()}
    changes = dtype_field(fields, str(dtype).removeprefix("torch.")) | class_field(model, fields, shapes)
    changes |= vocabulary_field(model, fields, shapes[embedding][0])
    if head in shapes and getattr(architecture(model), "tie_word_embeddings", False):
        changes["tie_word_embeddings"] = False  # an expert's head can differ from its embedding
    write_edited(text, folder / CONFIG_FILE, changes)
    write_generation(base.folder, folder, {})
    copy_surroundings(base.folder, folder)
    for task in model.tokenizers:
        write_expert_surroundings(model, task, text, changes, folder / task)
    publish_shards(folder)
    for task in model.tokenizers:
        link_weights(folder, folder / task)


def vocabulary_field(model: Model, fields: dict[str, Any], rows: int) -> dict[str, Any]:
    """The field vocab_size, where an embedding of so many rows is not of the config's size. Some classes have rows
    besides those of the vocabulary, which the field does not count."""
    more = rows - skeleton(model).get_input_embeddings().weight.shape[0]
    size = {"vocab_size": architecture(model).get_text_config().vocab_size + more}
    if not more:
        return {}
    return {"text_config": fields["text_config"] | size} if "text_config" in fields else size


def class_field(model: Model, fields: dict[str, Any], shapes: Iterable[str]) -> dict[str, Any]:
    """The field architectures, where it names a class that the written weights are not."""
    right, said = class_names(model, base_config(model), outside(model, shapes)), fields.get("architectures")
    return {"architectures": right[:1]} if said and right and said[:1] not in [[name] for name in right] else {}


def write_expert_surroundings(model: Model, task: str, text: str, changes: dict[str, Any], place: Path) -> None:
    """The base's config with the special tokens of an expert, its generation config and its tokenizer.

    An expert without a config, as an adapter is, has the special tokens that its tokenizer has.
    """
    expert, base = (folder_of(model.path(which, task)) for which in ("expert", "base"))
    file = config_file(expert)
    if file:
        own = read_config(file)
        tokens = {name: own[name] for name in TOKEN_FIELDS if name in own}
        dropped = tuple(name for name in TOKEN_FIELDS if name not in own)
        write_edited(text, place / CONFIG_FILE, changes | tokens, dropped)
        write_generation(expert, place, {})
    else:
        tokens = other_tokens(base, expert)
        write_edited(text, place / CONFIG_FILE, changes | tokens)
        source = expert if (expert / GENERATION_FILE).is_file() else base
        write_generation(source, place, tokens if source != expert else {})
    copy_tokenizer(expert, place)


def write_generation(source: Path, place: Path, changes: dict[str, Any]) -> None:
    """The generation config that lies in `source`, with some fields changed; none where there is none."""
    if (source / GENERATION_FILE).is_file():
        write_edited(read_text(source / GENERATION_FILE), place / GENERATION_FILE, changes)
    else:
        (place / GENERATION_FILE).unlink(missing_ok=True)


def other_tokens(base: Path, expert: Path) -> dict[str, int]:
    """The special tokens of an expert's tokenizer that are not those of the base's."""
    ours = special_tokens(base) if has_tokenizer(base) else {}
    return {name: token for name, token in special_tokens(expert).items() if token not in (None, ours.get(name))}


def special_tokens(folder: Path) -> dict[str, int | None]:
    """The numbers of the special tokens of the tokenizer in a folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return {name: getattr(tokenizer, name) for name in TOKENS}


def link_weights(folder: Path, place: Path) -> None:
    """Relative links from a folder within `folder` to its weights, in place of what was linked before.

    An index that points to the folder above would do for transformers, but other loaders look for the files themselves.
    """
    for link in place.glob("model*safetensors*"):
        link.unlink()
    for file in sorted(folder.glob("model*safetensors*")):
        try:
            (place / file.name).symlink_to(Path("..") / file.name)
        except OSError as error:
            raise InputError(f"cannot link {place / file.name} to the weights, model.tokenizers: {error}") from error
