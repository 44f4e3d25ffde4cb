"""Experts given as LoRA adapters in peft's folders: the base's tensors plus s B A, formed as they are read.

Format: huggingface.co/docs/peft, "PEFT checkpoint format", and what peft 0.21 writes. adapter_config.json has the
settings. adapter_model.safetensors has, behind base_model.model.,
    <module>.lora_A.weight (r, in) and .lora_B.weight (out, r)      for a matrix W (out, in)
    <module>.lora_embedding_A (r, V) and .lora_embedding_B (D, r)   for an embedding W (V, D)
    <module>.weight, .bias                                          of modules trained whole, modules_to_save
    <module>.base_layer.weight                                      of an embedding that got more rows
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import Params
from common.io.checkpoints import Checkpoint, surroundings, with_rows
from common.io.hashes import file_hash, identity

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTORS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")

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


@dataclass(frozen=True)
class Factors:
    """Where B and A of one tensor are in the adapter's file, s, and whether W has the shape of (B A)ᵀ."""

    b: str
    a: str
    scale: float
    transposed: bool


class LoraCheckpoint(Checkpoint):
    """What a base becomes with an adapter: reads like any checkpoint, and holds no more memory than what was read last.

    Opening reads headers only. InputError names the file and the setting or key that is anything but a plain LoRA of
    this base.
    """

    def __init__(self, path: Path | str, base: Path, names: Callable[[str], str | None] = str):
        self.path = Path(path)
        self.settings, self.adapter = open_adapter(self.path)
        self.base = Checkpoint(base, names)
        self.shapes = dict(self.base.shapes)
        self.whole: dict[str, str] = {}
        self.factors: dict[str, Factors] = {}
        for key in self.adapter.names():
            module, ending = taken_apart(key)
            stored = module.removeprefix(PREFIX) + (".weight" if ending else "")
            if not module.startswith(PREFIX) or ("lora_" in key and not ending):
                raise self.no_place_for(key)
            name = names(stored)
            if name is None:  # a task's own, as in any checkpoint
                if ending and not self.base_has(stored):
                    raise self.no_place_for(key)
            elif ending in FACTORS:
                self.factors[name] = self.factors_of(module, ending)
            elif ending:
                self.find(module + next(a for a, b in FACTORS.items() if b == ending), key)
            elif name in self.base.shapes or self.is_saved(module):
                self.whole[name], self.shapes[name] = key, self.adapter.shapes[key]
            else:
                raise self.no_place_for(key)
        for name, factors in self.factors.items():
            self.check(name, factors)

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that the adapter has a part in, in order."""
        return sorted(self.whole.keys() | self.factors.keys())

    def read(self, names: Iterable[str]) -> Params:
        """The named tensors in float32: the base's, or the adapter's where it has a whole one, plus s B A."""
        names = list(names)
        whole = {name: self.whole[name] for name in names if name in self.whole}
        tensors = dict(self.base.read(name for name in names if name not in whole))
        adapter = self.adapter.read(whole.values())
        tensors |= {name: adapter[key] for name, key in whole.items()}
        return {name: self.formed(name, tensor) for name, tensor in tensors.items()}

    def formed(self, name: str, tensor: Tensor) -> Tensor:
        """W + s B A, in W's place, with as many rows as are asked for."""
        if name in self.factors:
            factors = self.factors[name]
            b, a = self.adapter.read([factors.b, factors.a]).values()
            b, a = (a.T, b.T) if factors.transposed else (b, a)
            tensor.addmm_(b, a, alpha=factors.scale)
        return with_rows(tensor, self.shapes[name][0]) if tensor.ndim == 2 else tensor

    def fingerprint(self) -> str:
        """Identifies adapter and base."""
        files = [self.path / CONFIG_FILE, self.path / WEIGHT_FILE, *surroundings(self.path)]
        return identity([*([file.name, file_hash(file)] for file in files), ["base", self.base.fingerprint()]])

    def factors_of(self, module: str, ending: str) -> Factors:
        """The factors of a module and their scale: alpha / r, or alpha / √r with use_rslora."""
        a = module + ending
        b = self.find(module + FACTORS[ending], a)
        within = module.removeprefix(PREFIX)
        rank = first_match(self.settings.get("rank_pattern"), within, self.settings["r"])
        alpha = first_match(self.settings.get("alpha_pattern"), within, self.settings["lora_alpha"])
        found = (self.adapter.shapes[a][0], self.adapter.shapes[b][-1])
        if found != (rank, rank):
            raise InputError(f"{self.path / WEIGHT_FILE}: {a} and B have ranks {found}, {CONFIG_FILE} says {rank}")
        scale = alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)
        return Factors(b, a, scale, "embedding" in ending or bool(self.settings.get("fan_in_fan_out")))

    def find(self, key: str, partner: str) -> str:
        """The key, if the adapter has it; InputError naming the one it belongs to if not."""
        if key not in self.adapter.shapes:
            raise InputError(f"{self.path / WEIGHT_FILE} has {partner}, but lacks {key}")
        return key

    def check(self, name: str, factors: Factors) -> None:
        """InputError if there is no tensor of the base to add the factors to, or it has another shape."""
        if name not in self.shapes:
            raise self.no_place_for(factors.a)
        shape = (self.adapter.shapes[factors.b][0], self.adapter.shapes[factors.a][1])
        shape = shape[::-1] if factors.transposed else shape
        if shape != self.shapes[name]:
            raise InputError(f"{self.path / WEIGHT_FILE}: {factors.a} is for {shape}, {name} is {self.shapes[name]}")

    def base_has(self, stored: str) -> bool:
        """Whether the base's files have a tensor, be it with or without the prefix of a bare model."""
        names = Checkpoint(self.base.path).names()
        return any(f".{name}".endswith(f".{stored}") or f".{stored}".endswith(f".{name}") for name in names)

    def is_saved(self, module: str) -> bool:
        """Whether a tensor is of a module that was trained whole."""
        return any(f".{saved}." in f".{module}" for saved in self.settings.get("modules_to_save") or [])

    def no_place_for(self, key: str) -> InputError:
        """For a key that is no part of a LoRA of the base."""
        return InputError(f"{self.path / WEIGHT_FILE}: {key} matches no tensor of the base {self.base.path}")


def open_checkpoint(path: Path, base: Path, names: Callable[[str], str | None] = str) -> Checkpoint:
    """What lies at a path: the tensors of one model, or a LoRA adapter of the base."""
    return LoraCheckpoint(path, base, names) if is_adapter(path) else Checkpoint(path, names)


def is_adapter(path: Path) -> bool:
    """Whether a path is a folder as peft writes it."""
    return (path / CONFIG_FILE).is_file()


def open_adapter(folder: Path) -> tuple[dict[str, Any], Checkpoint]:
    """The settings of an adapter and its own tensors; InputError if it is not a plain LoRA.

    The base that it names is neither looked for nor opened: the experiment says which base there is.
    """
    file = folder / CONFIG_FILE
    try:
        settings = json.loads(file.read_text())
        plain = all(settings[name] > 0 for name in ("r", "lora_alpha")) if settings["peft_type"] == "LORA" else True
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no adapter config, JSON with peft_type, r and lora_alpha ({error!r})") from error
    for name, values in PLAIN.items():
        if name in settings and settings[name] not in values:
            raise InputError(f"{file}: {name} is {settings[name]!r}; only plain LoRA, W + s B A, can be an expert")
    if not plain:
        raise InputError(f"{file}: r and lora_alpha must be above zero")
    if not (folder / WEIGHT_FILE).is_file() and (folder / "adapter_model.bin").is_file():
        raise InputError(f"{folder} has its adapter in adapter_model.bin, a pickle; save it as {WEIGHT_FILE} with peft")
    return settings, Checkpoint(folder / WEIGHT_FILE)


def taken_apart(key: str) -> tuple[str, str]:
    """A key as module and ending of a factor, or as the name of a whole tensor and ""."""
    for ending in (*FACTORS, *FACTORS.values()):
        if key.endswith(ending):
            return key.removesuffix(ending), ending
    return WRAPPERS.sub("", key), ""


def first_match(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name is or, behind a dot, ends with."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
