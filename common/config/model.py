"""The section `model`: which checkpoints, and how they are read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.core.places import for_task, path_of, within


@dataclass(frozen=True)
class Model:
    """The checkpoints to merge.

    Args:
        base: Checkpoint of the pretrained model: a .safetensors file, a folder as open_clip or Hugging Face save it, a
            place on the hub, hf://org/name[@revision][/path]; so may every path here be, and anchors.source.
        expert: The same for the expert of one task; {task} is its name, {slug} that in a-z and 0-9 (SST-2: sst2).
        experts: {task: path} of experts that are not where `expert` says.
        root: Folder that the other paths are relative to, or a place on the hub.
        arch: Architecture: an open_clip model name; NLG: a config.json's text, read where the base is not there yet.
            Empty: the config file beside the base's weights tells.
        family: The architecture, as the base's config names it. auto: whatever that says.
        text: Vision only: checkpoint with the text tower (zero-shot heads, merged checkpoint), if the base has none.
        head: Vision only: file of a task's head; else a zero-shot head is built from the text tower, and a classifier's
            is its expert's.
        heads: Text encoders and image classifiers: tasks that get heads/<task>, a model of that expert's kind with its
            head and a link to the encoder.
        fuse_qkv: Whether the matching loss takes q, k and v of an attention as one tensor, as the paper's CLIPs keep
            them, where the checkpoint keeps them apart. It is a different loss: it has a term for each tensor.
        vocabulary: NLG only: what becomes of tokens that the base lacks; rows are matched by token, by number where a
            tokenizer.json is missing. refuse: none has more rows than the base; pad: the base's missing rows begin as
            the mean of its own; base: they are left out; union: every token of any model gets a row, which begins as
            the mean over the experts that have it, and the merged tokenizer is written.
        dtype: NLG only: type of the merged weights, but for those that the base keeps in a wider one than the rest.
            Empty: that of each in the base.
        tokenizers: NLG only: tasks that get a folder with that expert's tokenizer and links to the weights.
    """

    base: str = ""
    expert: str = ""
    experts: dict[str, str] = field(default_factory=dict)
    root: str = "."
    arch: str = ""
    family: str = "auto"
    text: str = ""
    head: str = ""
    heads: tuple[str, ...] = ()
    fuse_qkv: bool = False
    vocabulary: Literal["refuse", "pad", "base", "union"] = "refuse"
    dtype: Literal["", "float32", "float16", "bfloat16"] = ""
    tokenizers: tuple[str, ...] = ()

    def __hash__(self) -> int:  # a key of what is made once for each model
        return hash(repr(self))

    def path(self, name: Literal["base", "expert", "text", "head"], task: str = "") -> Path:
        """One of the paths, relative to `root`, "~" expanded."""
        return path_of(self.named(name, task), self.root)

    def named(self, name: Literal["base", "expert", "text", "head"], task: str = "") -> str:
        """One of the paths as the config writes it, for a task; with a root on the hub all of the place."""
        own = self.experts.get(task) if name == "expert" else None
        return within(for_task(own or getattr(self, name), task), self.root)
