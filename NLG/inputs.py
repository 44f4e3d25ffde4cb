"""What is compared of language models before any weight is looked at: configs, heads, and how each ends its answers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto as classes

from common.config import Config, Model
from common.core.errors import InputError, in_short
from common.core.notices import warn
from common.domain import other_models
from common.io.adapters import is_adapter
from common.io.checkpoints import plain_names
from common.io.lineage import compare_models
from common.io.model_config import ModelConfig, config_file, parse, read_config, require_family, resolve
from common.io.model_files import GENERATION_FILE, folder_of
from common.io.skeleton import computing, stored_shapes
from common.io.tokenizer_rules import warn_of_reading, warn_of_templates
from NLG.decoders import body, config_text, reading, skeleton

# The tensors of a head other than a language model's, and what transformers calls a model that has these.
LANGUAGE = [classes.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, classes.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
CLASSES = {
    frozenset({"score.weight"}): classes.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    frozenset({"score.weight", "score.bias"}): classes.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    frozenset({"qa_outputs.weight", "qa_outputs.bias"}): classes.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    frozenset(): classes.MODEL_MAPPING_NAMES,
}


def base_config(model: Model) -> ModelConfig:
    """The base's config, resolved; InputError if model.family names another architecture."""
    text, where = config_text(model)
    fields = parse(text, where)
    require_family(fields, where, model.family)
    return resolve(fields, where)


def check_inputs(config: Config) -> None:
    """Compare the base with every expert, and with a start made elsewhere, by what lies beside and around the weights.

    Raises: InputError if one of them is another function of equal weights, or of another class.
    """
    base, path = base_config(config.model), config.model.path("base")
    others = other_models(config)
    compare_models(path, base, others, computing(skeleton(config.model)))
    for other in others.values():
        if not is_adapter(other):
            check_head(config.model, base, other)
    check_ends(config.model, others)
    experts = {task: other for task, other in others.items() if task in config.tasks}
    warn_of_templates(path, experts, config.model.tokenizers)
    warn_of_reading(path, experts, config.model.tokenizers, "model.tokenizers")


def head_of(model: Model, path: Path) -> frozenset[str]:
    """Names of the tensors outside the body of the model at a path."""
    return outside(model, filter(None, map(reading(model).names, plain_names(path))))


def outside(model: Model, names: Iterable[str]) -> frozenset[str]:
    """Those of the names that are of a head: outside the body, and not of weights that the class leaves aside."""
    inside, unread = body(model), reading(model).unread
    return frozenset(name for name in names if not name.startswith(inside) and not unread(name))


def is_bare(model: Model, path: Path) -> bool:
    """Whether a model is saved without any head, so that its tensors lack the prefix of its body."""
    return not any(name.startswith(body(model)) for name in plain_names(path))


def class_names(model: Model, config: ModelConfig, head: frozenset[str]) -> list[str]:
    """What transformers calls a model with such a head, the likeliest first; none if it knows no such head.

    A causal model that is tied has no head of its own, and neither has a bare one.
    """
    causal = language_head(model)
    tied = not head and config.resolved.get("tie_word_embeddings")
    kinds = LANGUAGE if head == causal or tied else []
    found = (kind.get(config.model_type) for kind in (*kinds, CLASSES.get(head, {})))
    return [name if isinstance(name, str) else name[0] for name in found if name]


def language_head(model: Model) -> frozenset[str]:
    """Names of the tensors of a language model's head."""
    return outside(model, stored_shapes(skeleton(model))) | {reading(model).vocabulary[1]}


def check_head(model: Model, config: ModelConfig, other: Path) -> None:
    """InputError if another model is of another class than the base: a reward model is no language model.

    Whether a causal model keeps its head or has the embedding for it is compared with the vocabularies.
    """
    base = model.path("base")
    mine, theirs, file = head_of(model, base), head_of(model, other), config_file(other)
    own = resolve(read_config(file), str(file)) if file else config
    tied = any(each.resolved.get("tie_word_embeddings") for each in (config, own))
    only_the_head = mine ^ theirs == {reading(model).vocabulary[1]}
    if mine == theirs or (only_the_head and (tied or not (is_bare(model, base) or is_bare(model, other)))):
        return
    said = [
        f"{path} is a {(class_names(model, each, head) or ['model of an unknown class'])[0]}, with "
        f"{', '.join(in_short(sorted(head))) or 'no tensor'} outside its body"
        for path, each, head in ((other, own, theirs), (base, config, mine))
    ]
    raise InputError(f"{said[0]}; the base {said[1]}: they do not merge; take a base of the experts' class")


def check_ends(model: Model, others: dict[str, Path]) -> None:
    """Warn of models that end their answers with other tokens than the base, which the merged model does not know."""
    ours = ends_of(model.path("base"))
    for task, path in others.items():
        theirs = ends_of(path)
        if theirs is not None and as_set(theirs) != as_set(ours):
            after = f"in its folder {task} as {task}" if task in model.tokenizers else "nowhere as this"
            said = f"the base with {ours}" if ours is not None else "the base's files name none"
            warn(
                f"{task} ends its answers with eos_token_id {theirs}, {said}: the merged model ends as "
                f"the base, {after}; model.tokenizers says for which tasks there is such a folder"
            )


def ends_of(path: Path) -> Any:
    """The tokens that end an answer, as generation_config.json or else config.json says; None if neither does."""
    for file in (folder_of(path) / GENERATION_FILE, config_file(path)):
        if file and file.is_file():
            found = read_config(file).get("eos_token_id")
            if found is not None:
                return found
    return None


def as_set(tokens: Any) -> set:
    """Token ids, which are one or a list."""
    return set(map(str, tokens if isinstance(tokens, list) else [tokens]))
