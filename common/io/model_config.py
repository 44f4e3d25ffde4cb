"""The config.json beside a model's weights: which of its fields change what the model computes, and how it is kept.

Equal shapes do not make two models the same function: another rope_theta, head count or activation does not show in
any tensor. Configs are compared as transformers resolves them, so that a default that is written out in one file and
left out in another, or rope_theta in its old and its new place, are no difference.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.core.errors import InputError, in_short
from common.core.notices import warn
from common.io.config_fields import COMPUTING, ENDLESS, HARMLESS, SYNONYMS, computes, flat, is_off, tells, unwritten
from common.io.json_files import parse_object, read_object
from common.io.model_files import CONFIG_FILE, MODEL_FILE, folder_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AUTO = "auto"  # model.family: whatever the config says
WHAT = "config file, JSON with a model_type"


@dataclass(frozen=True)
class ModelConfig:
    """The fields of a config.json as they are written, and resolved: {"rope_parameters.rope_theta": 10000.0}."""

    file: str
    written: Mapping[str, Any]
    resolved: Mapping[str, Any]

    @property
    def model_type(self) -> str | None:
        """The architecture that it names."""
        return self.written.get("model_type")

    def value(self, field: str) -> Any:
        """What a resolved field says, or stands for where it is not there; None where that is off."""
        return self.resolved.get(field, unwritten(field))

    def spelling(self, field: str) -> str:
        """The name that a resolved field has in the file: rope_theta lay outside before it was in rope_parameters."""
        last = field.removeprefix("rope_parameters.")
        if last == field or "rope_parameters" in self.written:
            return field
        return f"rope_scaling.{last}" if last in (self.written.get("rope_scaling") or {}) else last


def config_file(path: Path) -> Path | None:
    """The config.json of the model at a path: in the folder, or beside the file that transformers saves, none other."""
    file = folder_of(path, (MODEL_FILE,)) / CONFIG_FILE
    return file if file.is_file() else None


def read_text(file: Path) -> str:
    """A text file; InputError if it cannot be read or is no text."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as text: {error}") from error


def read_config(file: Path) -> dict[str, Any]:
    """The fields of a config file; InputError if it is none."""
    return typed(read_object(file, WHAT), str(file))


def parse(text: str, file: str) -> dict[str, Any]:
    """The fields of a JSON text; InputError naming the file if it is none."""
    return typed(parse_object(text, file, WHAT), file)


def typed(fields: dict[str, Any], file: str) -> dict[str, Any]:
    """The fields; InputError if those that name the model are no names, or tie_word_embeddings is no truth value."""
    classes, kind, tied = (fields.get(name) for name in ("architectures", "model_type", "tie_word_embeddings"))
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise InputError(f"{file} is no {WHAT}: architectures is {shown(classes)}, but should be a list of names")
    if not isinstance(kind, str | None):
        raise InputError(f"{file} is no {WHAT}: model_type is {shown(kind)}, but should be a name")
    if not isinstance(tied, bool | None):
        raise InputError(f"{file} is no {WHAT}: tie_word_embeddings is {shown(tied)}, but should be true or false")
    return fields


def shown(value: object) -> str:
    """A JSON value for a sentence, cut where it is long."""
    return json.dumps(value)[:40]


def require_family(fields: Mapping[str, Any], file: str, family: str) -> None:
    """InputError if a config is of another architecture than model.family names, or names none."""
    found = fields.get("model_type")
    if found is None:
        raise InputError(f"{file} names no model_type, by which transformers knows an architecture")
    if family not in (AUTO, found):
        raise InputError(f"{file} has model type {found!r}, model.family is {family!r}")


def known_config(written: Mapping[str, Any], file: str) -> "PretrainedConfig":
    """A config as transformers has it, with all defaults of its architecture; no code that it names is run.

    Raises: InputError if transformers knows no such architecture or refuses one of the values.
    """
    from transformers import AutoConfig

    try:
        own = json.loads(json.dumps(written), object_hook=special_float)  # a copy: it writes into what it is given
        return AutoConfig.for_model(**own)
    except Exception as error:  # whatever the class of an architecture makes of any value
        raise InputError(f"{file} is no config of a model that transformers knows: {one_line(error)}") from error


def special_float(fields: dict[str, Any]) -> Any:
    """A number that JSON has no word for, as transformers writes it: {"__float__": "Infinity"}."""
    return float(fields["__float__"]) if fields.keys() == {"__float__"} else fields


def resolve(written: Mapping[str, Any], file: str) -> ModelConfig:
    """A config with the fields in which two files of one function agree, however each of them says it."""
    fields = known_config(written, file).to_dict()
    resolved = {name: SYNONYMS.get(value, value) for name, value in flat(fields) if not is_off(name, value)}
    for name in [name for name in resolved if name.endswith(".rope_type")]:
        resolved.pop(name.removesuffix("rope_type") + "type", None)  # how it was called before
    return ModelConfig(file, written, resolved)


def one_line(error: Exception) -> str:
    """The first sentence of an error: some list all architectures that there are."""
    return re.split(r"\. Should contain|\n", " ".join(str(error).split()) or repr(error))[0]


def differences(base: ModelConfig, other: ModelConfig, computing: frozenset[str] = frozenset()) -> tuple[dict, dict]:
    """{field: (the other's value, the base's)} of fields that change what is computed, and of those that do not.

    computing: fields that count for this architecture though they do not for others.
    """
    counted, harmless = {}, {}
    computing |= COMPUTING.get(base.model_type or "", frozenset())
    known_not_to = HARMLESS - computing | endless(base, other)
    for field in dict.fromkeys((*base.resolved, *other.resolved)):
        values = other.value(field), base.value(field)
        if values[0] != values[1] and tells(field):
            (counted if computes(field, values, known_not_to) else harmless)[field] = values
    return counted, harmless


def endless(*configs: ModelConfig) -> frozenset[str]:
    """The field of the greatest length, if positions are rotary and no angle depends on it."""
    kinds = [
        [value for name, value in config.resolved.items() if name.endswith("rope_type")] or ["none"]
        for config in configs
    ]
    free = all(kind in ENDLESS for each in kinds for kind in each)
    return frozenset({"max_position_embeddings"} if free else ())


def require_same_function(base: ModelConfig, other: ModelConfig, computing: frozenset[str] = frozenset()) -> set[str]:
    """InputError naming the fields in which another model's config makes another function of equal weights.

    Returns: names of the fields that differ and do not matter.
    """
    if other.model_type != base.model_type:
        raise InputError(f"{other.file} has model type {other.model_type!r}, {base.file} has {base.model_type!r}")
    counted, harmless = differences(base, other, computing)
    if counted:
        said = [f"{other.spelling(field)} is {one!r}, the base's is {two!r}" for field, (one, two) in counted.items()]
        raise InputError(
            f"{other.file}: {'; '.join(in_short(said))} ({base.file}): the merged model computes with the base's, "
            "for which these weights are not made; merge models of one base, or correct the file that is wrong"
        )
    return {field.split(".")[0] for field in harmless}


def compare_configs(base: ModelConfig, others: Mapping[str, Path], computing: frozenset[str] = frozenset()) -> None:
    """Compare the base's config with that of every other model that has one.

    Args:
        base: Its config.
        others: Path of each other model, under the name of its task.
        computing: Fields that count for this architecture though they do not for others.
    Raises: InputError at the first model whose config makes another function of its weights.
    """
    found: dict[str, list[str]] = {}
    for task, path in others.items():
        file = config_file(path)
        if file:
            written = read_config(file)
            if written.get("model_type") != base.model_type:
                require_same_function(base, ModelConfig(str(file), written, {}))
            for field in sorted(require_same_function(base, resolve(written, str(file)), computing)):
                found.setdefault(field, []).append(task)
    if found:
        said = ", ".join(f"{field} ({', '.join(tasks)})" for field, tasks in found.items())
        warn(f"{CONFIG_FILE} differs from the base's in what changes no weight's work, and the base's is kept: {said}")


def edited(text: str, changes: Mapping[str, Any], dropped: tuple[str, ...] = ()) -> str:
    """A JSON text with some fields changed or dropped; the text itself if it says all that already."""
    fields = json.loads(text)
    wanted = {name: value for name, value in (fields | changes).items() if name not in dropped}
    if wanted == fields:
        return text
    indent = re.search(r"\n([ \t]+)\"", text)
    return json.dumps(wanted, indent=indent[1] if indent else None, ensure_ascii=False) + "\n"


def dtype_field(fields: Mapping[str, Any], dtype: str) -> dict[str, str]:
    """The field in which a config names the type of its weights, as it spells it, for another type."""
    return {name: dtype for name in ("dtype", "torch_dtype") if name in fields}
