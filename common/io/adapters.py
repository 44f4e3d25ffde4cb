"""The files of a LoRA adapter as peft writes them: what each key says, and which settings are plain LoRA.

Format: huggingface.co/docs/peft, "PEFT checkpoint format", and what peft 0.21 writes. adapter_config.json has the
settings. adapter_model.safetensors has, behind base_model.model.,
    <module>.lora_A.weight (r, in) and .lora_B.weight (out, r)      for a matrix W (out, in), or a convolution
    <module>.lora_embedding_A (r, V) and .lora_embedding_B (D, r)   for an embedding W (V, D)
    <module>.weight, .bias, or <module>.modules_to_save.weight      of modules trained whole, modules_to_save
    <module>.base_layer.weight, .original_module.weight             what the base had there when it got more rows
    <attention>.base_layer.out_proj.lora_A.weight                   of torch's MultiheadAttention, see `Entry.times`
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.core.errors import InputError, in_short
from common.core.notices import warn
from common.io.checkpoints import Checkpoint
from common.io.json_files import read_object
from common.io.model_files import INDEX_FILE, WEIGHT_FILES

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILE = "adapter_model.safetensors"

# The settings under which an expert is W + s B A of the base it was trained from, and nothing else.
PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change W beforehand
} | dict.fromkeys(
    (
        "use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "target_parameters",
        "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
    ),
    (None, False, [], {}),
)  # fmt: skip

# Settings that change how the factors are found, not what they add to W, or that are looked at elsewhere.
HARMLESS = frozenset(
    (
        "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config",
        "modules_to_save", "rank_pattern", "alpha_pattern", "runtime_config", "target_modules", "use_rslora",
        "velora_config",
    )
)  # fmt: skip


class Part(Enum):
    """What a tensor of an adapter is to the tensor of the base that it belongs to."""

    A = "the factor that sees the input"
    B = "the factor that makes the output"
    SAVED = "the whole tensor as it was trained"
    GIVEN = "the whole tensor that the base had in training"
    PLAIN = "the whole tensor under its own name: trained if its module is saved, else given"


# Kinds of adapters that add inputs to a model, or weigh what they learned by each input: peft makes weights of none.
BESIDE = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
    "LILY", "POLY", "SHADOW", "XLORA",
)  # fmt: skip
# Settings of LoRA of which peft makes no weights of the base's layers either: factors chosen by the input, layers that
# are used several times, each with factors of its own.
UNMERGEABLE = ("alora_invocation_tokens", "arrow_config", "layer_replication")
LEFT_OUT = "what it learned cannot become a part of the model's weights, so leave this expert out"
MERGED_FIRST = "let peft merge the adapter into its base, merge_and_unload, and give what it saves as the expert"
PREFIX = ("base_model", "model")
FACTORS: dict[tuple[str, ...], tuple[Part, bool]] = {  # the end of a key: which factor, and whether of an embedding
    ("lora_A", "weight"): (Part.A, False),
    ("lora_B", "weight"): (Part.B, False),
    ("lora_embedding_A",): (Part.A, True),
    ("lora_embedding_B",): (Part.B, True),
}
WRAPPERS = {"base_layer": Part.GIVEN, "original_module": Part.GIVEN, "modules_to_save": Part.SAVED}
ADAPTER_NAME = "default"  # which peft takes out of the keys, some trainers do not


@dataclass(frozen=True)
class Entry:
    """A key taken apart.

    module: the module's place in the base's model. tensor: the tensor's name in it; "weight" for factors.
    embedding: whether its factors are those of an embedding. within: the attention that peft wrapped around it, if any.
    """

    key: str
    module: str
    tensor: str
    part: Part
    embedding: bool = False
    within: str = ""

    @property
    def adapted(self) -> str:
        """The module that peft was told to adapt, by whose name patterns of ranks are looked up."""
        return self.within or self.module

    @property
    def times(self) -> int:
        """How often peft adds s B A: twice to the output projection inside a MultiheadAttention, else once.

        Its layer adds it to the weight, then has the projection's own layer add it again, in training as in merging
        (peft 0.21, lora/layer.py, MultiheadAttention.merge).
        """
        return 2 if self.within else 1


def taken_apart(key: str) -> Entry | None:
    """What a key of an adapter's file says; None if it has not the form that peft gives them."""
    path = key.split(".")
    if tuple(path[:2]) != PREFIX or len(path) < 4:
        return None
    path = [word for before, word in pairwise(path[1:]) if (before, word) not in NAMED]
    for ending, (part, embedding) in FACTORS.items():
        if tuple(path[-len(ending) :]) == ending:
            names = path[: -len(ending)]
            outer = names[: names.index("base_layer")] if "base_layer" in names else []
            module = ".".join(word for word in names if word not in WRAPPERS)
            return Entry(key, module, "weight", part, embedding, ".".join(outer))
    *names, tensor = path
    parts = {WRAPPERS[word] for word in names if word in WRAPPERS}
    part = Part.SAVED if Part.SAVED in parts else Part.GIVEN if parts else Part.PLAIN
    return Entry(key, ".".join(word for word in names if word not in WRAPPERS), tensor, part)


NAMED = {(word, ADAPTER_NAME) for word in (*WRAPPERS, *(ending[0] for ending in FACTORS))}


def is_adapter(path: Path) -> bool:
    """Whether a path is a folder as peft writes it."""
    return (path / CONFIG_FILE).is_file()


def open_adapter(folder: Path) -> tuple[dict[str, Any], Checkpoint]:
    """The settings of an adapter and its own tensors; InputError if it is not a plain LoRA.

    The base that it names is neither looked for nor opened: the experiment says which base there is.
    """
    file = folder / CONFIG_FILE
    settings = read_object(file, "adapter config, JSON with peft_type, r and lora_alpha")
    try:
        plain = all(settings[name] > 0 for name in ("r", "lora_alpha")) if settings["peft_type"] == "LORA" else True
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no adapter config, JSON with peft_type, r and lora_alpha ({error!r})") from error
    for name, values in PLAIN.items():
        if name in settings and settings[name] not in values:
            step = LEFT_OUT if name in UNMERGEABLE or settings[name] in BESIDE else MERGED_FIRST
            said = f"{name} is {settings[name]!r}"
            raise InputError(f"{file}: {said}; only plain LoRA, W + s B A, can be an expert: {step}")
    for name, value in settings.items():
        switched_on = value is True or (value and isinstance(value, dict | list))
        if switched_on and name not in PLAIN and name not in HARMLESS:
            raise InputError(
                f"{file}: {name} is {value!r}, a setting unknown here, which may make the expert more than W + s B A; "
                f"take it out if it does not, else {MERGED_FIRST}"
            )
    if not plain:
        raise InputError(f"{file}: r and lora_alpha must be above zero")
    if not (folder / WEIGHT_FILE).is_file() and (folder / "adapter_model.bin").is_file():
        raise InputError(f"{folder} has its adapter in adapter_model.bin, a pickle; save it as {WEIGHT_FILE} with peft")
    if whole := [name for name in (*WEIGHT_FILES, INDEX_FILE) if (folder / name).is_file()]:
        warn(f"{folder} holds an adapter and a whole model, {whole[0]}: the adapter is taken, added to model.base")
    return settings, Checkpoint(folder / WEIGHT_FILE)


def check_targets(
    folder: Path, settings: Mapping[str, Any], base: Mapping[str, tuple[int, ...]], changed: Iterable[str]
) -> None:
    """Compare target_modules, if it is a list, with what the file of an adapter changes.

    A name that the base has no module of means nothing: many list those of several architectures. Modules of such a
    name that the file leaves as they are, which peft would begin anew, are a warning.

    Args:
        base: {tensor: shape} of the base.
        changed: Names of its tensors that the adapter has a part in.
    Raises: InputError if it changes none of the modules that are named: the file is another adapter's.
    """
    named, changed = settings.get("target_modules"), set(changed)
    ends = tuple(f".{name}.weight" for name in named) if isinstance(named, list) else ()
    meant = [tensor for tensor, shape in base.items() if len(shape) == 2 and f".{tensor}".endswith(ends)]
    left = [tensor.removesuffix(".weight") for tensor in meant if tensor not in changed]
    said = f"has nothing of {', '.join(in_short(left))}, which target_modules of {CONFIG_FILE} names"
    if left and len(left) == len(meant):
        raise InputError(f"{folder / WEIGHT_FILE} {said}: one of both is another adapter's; save them anew with peft")
    if left and all(settings.get(name) in (None, []) for name in ("exclude_modules", "layers_to_transform")):
        warn(f"{folder / WEIGHT_FILE} {said}: there the expert is the base")


def is_saved(module: str, saved: Sequence[str] | None) -> bool:
    """Whether a module is, or lies in, one that was trained whole: peft takes every module whose name ends so."""
    names = module.split(".")
    around = [".".join(names[:count]) for count in range(1, len(names) + 1)]
    return any(name.endswith(tuple(saved or ())) for name in around)


def first_match(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name is or, behind a dot, ends with."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
