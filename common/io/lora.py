"""Experts given as LoRA adapters in peft's folders: the base's tensors plus s B A, formed as they are read."""

import math
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import Params
from common.io.adapters import (
    CONFIG_FILE,
    WEIGHT_FILE,
    Entry,
    Part,
    check_targets,
    first_match,
    is_adapter,
    is_saved,
    open_adapter,
    taken_apart,
)
from common.io.checkpoints import Checkpoint, surroundings
from common.io.hashes import file_hash, identity
from common.io.json_files import interpreted
from common.io.tensors import of_shape

FUSED = "in_proj_weight"  # what an adapter of torch's MultiheadAttention is added to, beside its output projection


@dataclass(frozen=True)
class Factors:
    """Keys of B and A of one tensor, s, and whether W has the shape of (B A)ᵀ."""

    b: str
    a: str
    scale: float
    transposed: bool


class LoraCheckpoint(Checkpoint):
    """What a base becomes with an adapter: reads like any checkpoint, and holds no more memory than what was read last.

    Opening reads headers only. InputError names the file and the setting or key that is anything but a plain LoRA of
    this base.

    Args:
        path: Folder of the adapter.
        base: Folder or file of the base.
        names: From a stored name to the family's, as for any checkpoint.
        tied: Names of the embedding and of the output head, if the base has one tensor for both.
        turned: The family's names of the matrices that are (inputs, outputs), whose change is (B A)ᵀ. Without it what
            fan_in_fan_out says holds for all; peft writes that of the module adapted last, and itself goes by each.
    """

    def __init__(
        self,
        path: Path | str,
        base: Path,
        names: Callable[[str], str | None] = str,
        tied: tuple[str, ...] | None = None,
        turned: Collection[str] | None = None,
    ):
        self.path = Path(path)
        self.settings, self.adapter = open_adapter(self.path)
        self.base, self.family_name, self.turned = Checkpoint(base, names), names, turned
        if tied:
            kept = tied[0] if tied[0] in self.base.shapes else tied[1]
            self.base.alias(tied[0], kept)
            self.base.alias(tied[1], kept)
        self.shapes, self.left_out = dict(self.base.shapes), list(self.base.left_out)
        self.given: dict[str, str] = {}  # {tensor: key} of what the base had in training
        self.saved: dict[str, str] = {}  # {tensor: key} of what was trained whole
        self.factors: dict[str, Factors] = {}
        entries = [taken_apart(key) or self.no_place_for(key) for key in self.adapter.names()]
        if not entries:
            raise InputError(
                f"{self.path / WEIGHT_FILE} holds no tensor: save the adapter anew with peft, once trained"
            )
        self.halves = {(e.module, e.part, e.embedding): e for e in entries if e.part in (Part.A, Part.B)}
        for entry in entries:
            self.take(entry)
        check_targets(self.path, self.settings, self.base.shapes, self.changed)
        if tied:
            self.tie(*tied)
        for name, key in (self.given | self.saved).items():
            self.shapes[name] = self.adapter.shapes[key]
        for name, factors in self.factors.items():
            self.check(name, factors)

    # ---- what the keys say -------------------------------------------------------------------------------------------

    def take(self, entry: Entry) -> None:
        """Put one tensor of the adapter where it belongs; InputError if it belongs nowhere."""
        name, stored = self.place_of(entry)
        trained = entry.part is Part.SAVED or (entry.part is Part.PLAIN and is_saved(entry.module, self.saved_modules))
        if entry.part is Part.B:
            self.half(entry, Part.A)
        elif entry.part is Part.A and name in self.base.shapes:
            self.factors[name] = self.factors_of(entry, name)
        elif name is None:  # a task's own, as in any checkpoint
            self.left_out.append(stored)
            if entry.part is Part.A and not self.base_has(stored):
                self.no_place_for(entry.key)
        elif trained and entry.part is not Part.A:
            self.saved[name] = entry.key
        elif name in self.base.shapes:
            self.given[name] = entry.key
        else:
            self.no_place_for(entry.key)

    def place_of(self, entry: Entry) -> tuple[str | None, str]:
        """The family's name of the tensor that an entry belongs to, None if it is left out; and its name in the base.

        Factors of an attention belong to its fused projection where the base has no weight of the attention's name.
        """
        stored = [f"{entry.module}.{entry.tensor}"]
        if entry.part in (Part.A, Part.B):
            stored.append(f"{entry.module}.{FUSED}")
        named = [(self.family_name(each), each) for each in stored]
        return next((pair for pair in named if pair[0] in self.base.shapes), named[0])

    @property
    def saved_modules(self) -> list[str]:
        """Ends of the names of the modules that were trained whole."""
        saved = self.settings.get("modules_to_save") or []
        with self.settings_read():
            return [saved] if isinstance(saved, str) else list(saved)

    def settings_read(self) -> AbstractContextManager[None]:
        """InputError naming the config in place of what an ill-typed setting raises within."""
        return interpreted(self.path / CONFIG_FILE, "adapter config with a rank and an alpha for every matrix")

    def factors_of(self, entry: Entry, name: str) -> Factors:
        """The factors of a tensor that an A begins, and their scale: alpha / r, or alpha / √r with use_rslora."""
        a, b = entry.key, self.half(entry, Part.B).key
        with self.settings_read():
            rank = first_match(self.settings.get("rank_pattern"), entry.adapted, self.settings["r"])
            alpha = first_match(self.settings.get("alpha_pattern"), entry.adapted, self.settings["lora_alpha"])
        shapes = self.adapter.shapes[a], self.adapter.shapes[b]
        if min(map(len, shapes)) < 2:
            raise InputError(f"{self.path / WEIGHT_FILE}: {a} and B have the shapes {shapes}, which are no matrices")
        found = (shapes[0][0], shapes[1][1])
        if found != (rank, rank):
            raise InputError(f"{self.path / WEIGHT_FILE}: {a} and B have ranks {found}, {CONFIG_FILE} says {rank}")
        with self.settings_read():
            scale = entry.times * alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)
            if not math.isfinite(scale):
                raise ValueError(f"alpha {alpha} over rank {rank} is no finite scale")
        turned = bool(self.settings.get("fan_in_fan_out")) if self.turned is None else name in self.turned
        return Factors(b, a, scale, entry.embedding or turned)

    def half(self, entry: Entry, part: Part) -> Entry:
        """The other factor of the same module; InputError naming both if the adapter lacks it."""
        other = self.halves.get((entry.module, part, entry.embedding))
        if other is None:
            begin, _, end = entry.key.rpartition(f"_{entry.part.name}")
            raise InputError(f"{self.path / WEIGHT_FILE} has {entry.key}, but lacks {begin}_{part.name}{end}")
        return other

    def tie(self, embedding: str, head: str) -> None:
        """What peft makes of an embedding and a head that are one tensor in the base.

        What the base had is given to both. What was trained changes its own module alone, so the two part, unless
        ensure_weight_tying had them trained as one. The head stays without a name of its own while they are one.
        """
        trained = [name for name in (embedding, head) if name in self.saved or name in self.factors]
        given = self.given.get(embedding, self.given.get(head))
        if given:
            self.given[embedding] = self.given[head] = given
        if trained and not self.settings.get("ensure_weight_tying"):
            return
        if trained == [head]:
            raise InputError(
                f"{self.path / WEIGHT_FILE} trains {head} alone, but {CONFIG_FILE} has ensure_weight_tying, with which "
                f"peft trains {embedding}; set it to false if the head alone was trained"
            )
        self.drop(head)

    def alias(self, name: str, of: str) -> None:
        """From now on `name` is another name of the tensor `of`, the adapter's part in it included."""
        self.base.alias(name, of)
        parts: list[dict[str, Any]] = [self.shapes, self.given, self.saved, self.factors]
        for part in parts:
            if of in part:
                part[name] = part[of]

    def drop(self, name: str) -> None:
        """From now on there is no tensor of that name."""
        for part in (self.shapes, self.given, self.saved, self.factors):
            part.pop(name, None)

    def check(self, name: str, factors: Factors) -> None:
        """InputError if the factors make a tensor of another shape than the one that they are added to."""
        shape = (self.adapter.shapes[factors.b][0], *self.adapter.shapes[factors.a][1:])
        shape = shape[::-1] if factors.transposed else shape
        if shape != self.shapes[name]:
            raise InputError(
                f"{self.path / WEIGHT_FILE}: {factors.a} is for {shape}, {name} is {self.shapes[name]} in "
                f"{self.base.path}; {self.trained_from()}"
            )

    def base_has(self, stored: str) -> bool:
        """Whether the base's files have a tensor, be it with or without the prefix of a bare model."""
        names = Checkpoint(self.base.path).names()
        return any(f".{name}".endswith(f".{stored}") or f".{stored}".endswith(f".{name}") for name in names)

    def no_place_for(self, key: str) -> NoReturn:
        """InputError for a key that is no part of a LoRA of the base."""
        raise InputError(
            f"{self.path / WEIGHT_FILE}: {key} matches no tensor of the base {self.base.path}; {self.trained_from()}; "
            "if it is, transformers takes that tensor out of a longer one: merge the adapter into it with peft"
        )

    def trained_from(self) -> str:
        """The next step where an adapter and a base do not belong together."""
        named = self.settings.get("base_model_name_or_path")
        return f"model.base must be the model it was trained from{f', {named}' if named else ''}"

    # ---- tensors -----------------------------------------------------------------------------------------------------

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that the adapter has a part in, in order."""
        return sorted(self.given.keys() | self.saved.keys() | self.factors.keys())

    def touches(self, prefix: str) -> bool:
        """Whether the adapter has a part in a tensor whose name begins so."""
        return any(name.startswith(prefix) for name in self.changed)

    def read(self, names: Iterable[str]) -> Params:
        """The named tensors in float32: the base's, or the adapter's where it has a whole one, plus s B A."""
        names = list(names)
        whole = {name: key for name, key in (self.given | self.saved).items() if name in names}
        tensors = dict(self.base.read(name for name in names if name not in whole))
        adapter = self.adapter.read(set(whole.values()))
        tensors |= {name: adapter[key].clone() if name in self.factors else adapter[key] for name, key in whole.items()}
        return {name: self.formed(name, tensors[name]) for name in names}

    def formed(self, name: str, tensor: Tensor) -> Tensor:
        """W + s B A, in W's place, in the shape that is asked for."""
        if name in self.factors:
            factors = self.factors[name]
            b, a = self.adapter.read([factors.b, factors.a]).values()
            b, a = (a.T, b.T) if factors.transposed else (b.flatten(1), a.flatten(1))
            tensor.flatten(1).addmm_(b, a, alpha=factors.scale)
        return of_shape(tensor, self.shapes[name])

    def read_at(self, name: str, index: int) -> Tensor:
        """One of many things that are stacked in a tensor; all of them are in memory for it."""
        return self.read([name])[name][index].clone()

    def fingerprint(self) -> str:
        """Identifies adapter and base."""
        files = [self.path / CONFIG_FILE, self.path / WEIGHT_FILE, *surroundings(self.path)]
        return identity([*([file.name, file_hash(file)] for file in files), ["base", self.base.fingerprint()]])


def open_checkpoint(
    path: Path,
    base: Path,
    names: Callable[[str], str | None] = str,
    tied: tuple[str, ...] | None = None,
    turned: Collection[str] | None = None,
) -> Checkpoint:
    """What lies at a path: the tensors of one model, or a LoRA adapter of the base, whose embedding may be `tied` and
    some of whose matrices `turned`."""
    return LoraCheckpoint(path, base, names, tied, turned) if is_adapter(path) else Checkpoint(path, names)
