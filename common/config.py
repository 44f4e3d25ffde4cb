"""What an experiment can choose. One YAML serves both stages; the command line overrides it field by field."""

import argparse
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from common.errors import InputError

PRESETS = Path(__file__).resolve().parent.parent / "configs" / "presets"


def for_task(template: str, task: str) -> str:
    """A path with {task} replaced by the name of a task, {slug} by its letters and digits in lower case."""
    return template.replace("{task}", task).replace("{slug}", "".join(filter(str.isalnum, task.lower())))


@dataclass(frozen=True)
class Model:
    """The checkpoints to merge.

    Args:
        base: Checkpoint of the pretrained model: a .safetensors file, or a folder as open_clip or Hugging Face save it.
        expert: The same for the expert of one task; {task} is its name, {slug} that in a-z and 0-9 (SST-2: sst2).
        root: Folder that the other paths are relative to.
        arch: Architecture: an open_clip model name; NLG: a config.json's text, read where the base is not there yet.
            Empty: the config file beside the base's weights tells.
        family: How the architecture is taken apart into blocks; a key of FAMILIES in the domain.
        text: Vision only: checkpoint with the text tower (zero-shot heads, merged checkpoint), if the base has none.
        head: Vision only: file of a task's zero-shot head. Where there is none it is built from the text tower.
        heads: NLU only: tasks for which the merged encoder gets a folder heads/<task>: a complete classifier with that
            expert's head and a link to the encoder.
        vocabulary: NLG only: where base and experts have unlike numbers of tokens, pad fills missing rows with the mean
            of those that are there, base cuts to the base's tokens, refuse stops.
        dtype: NLG only: type of the merged weights. Empty: the base's.
        tokenizers: NLG only: tasks for which the merged model gets a folder of its own, with that expert's tokenizer
            and links to the weights. The model's own folder has the base's tokenizer.
    """

    base: str = ""
    expert: str = ""
    root: str = "."
    arch: str = ""
    family: str = ""
    text: str = ""
    head: str = ""
    heads: tuple[str, ...] = ()
    vocabulary: Literal["refuse", "pad", "base"] = "refuse"
    dtype: Literal["", "float32", "float16", "bfloat16"] = ""
    tokenizers: tuple[str, ...] = ()

    def path(self, name: Literal["base", "expert", "text", "head"], task: str = "") -> Path:
        """One of the paths, relative to `root`, "~" expanded."""
        return Path(self.root).expanduser() / for_task(getattr(self, name), task)


@dataclass(frozen=True)
class Anchors:
    """How anchors are made (paper section 3, box 1).

    Args:
        init: Where the anchors start: rows of the expert's weights, or scaled Gaussian noise.
        number: Anchors per task and block.
        chunk: Anchors in memory at once. Unset: all; the result is the same to rounding.
        tokens: Tokens per anchor. Unset: what the architecture sees.
        scale: Factor on the initial anchors. Unset: the paper's, 1 for weight and 0.01 for gauss.
        distance: Between the outputs of the base block and the expert's.
        optimizer: Of the anchors. muon reaches the same loss in a fraction of the steps, with lr around 0.3, linear.
        lr: Its learning rate.
        schedule: Of the learning rate over the steps: constant, or linear down to zero.
        steps: Its steps.
        stop_loss: End a unit when its mean matching loss is this or less; looked at every 20 steps. Unset: never.
        patience: End a unit after so many steps without getting 1 % better. Unset: never.
        skip_null_gradients: Leave out of the loss what no input can move (the key bias).
        position_embeddings: Add the first rows of the expert's position embeddings to what a block sees of an anchor.
        source: Folder of anchors made elsewhere, in the released layout <task>/dual_anchors_layer_<n>.npy; with {task}
            or {slug} in it, the folder of one task.
    """

    init: Literal["weight", "gauss"] = "weight"
    number: int = 64
    chunk: int | None = None
    tokens: int | None = None
    scale: float | None = None
    distance: Literal["cos", "mse", "l1"] = "cos"
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-2
    schedule: Literal["constant", "linear"] = "constant"
    steps: int = 1200
    stop_loss: float | None = None
    patience: int | None = None
    skip_null_gradients: bool = True
    position_embeddings: bool = False
    source: str = ""

    def path(self, task: str) -> Path:
        """Folder of the anchors of one task under `source`, "~" expanded."""
        template = self.source if "{" in self.source else f"{self.source}/{{task}}"
        return Path(for_task(template, task)).expanduser()


@dataclass(frozen=True)
class Start:
    """The model that adaptation starts from.

    Args:
        method: pretrained, or a merge method.
        checkpoint: A merged checkpoint made elsewhere to take instead of making one; `method` then just names it.
        hyper: Hyperparameters of each method, as in {ta: {scale: 0.3}}.
    """

    method: str = "pretrained"
    checkpoint: str = ""
    hyper: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapt:
    """How the merged blocks are trained on the anchors (paper box 2).

    Args:
        rest: Where tensors outside the blocks come from: the pretrained model (paper) or the start.
        per_task: From ta: a coefficient for each weight of each task vector (paper Eq. 6). False: for each weight of
            their sum, as from any other start.
        distance: Between the merged block's outputs and the expert's.
        lr: Learning rate of Adam: on the weights (start pretrained) or on one coefficient a weight (others).
        epochs: Passes over the anchors of all tasks.
        batch_size: Anchors per step.
        warm_start: regmean begins at the least-squares mean of the experts' linear maps on their anchors, a closed form
            that saves most epochs; with epochs 0 it is a merge of its own. none begins at the start as it is.
        label: Put behind the name of the result, to keep several side by side.
        by_start: What differs for one start, as in {wudi: {epochs: 25}}. The command line comes before it.
    """

    rest: Literal["pretrained", "start"] = "pretrained"
    per_task: bool = True
    distance: Literal["cos", "mse", "l1"] = "cos"
    lr: float = 1e-2
    epochs: int = 100
    batch_size: int = 128
    warm_start: Literal["none", "regmean"] = "none"
    label: str = ""
    by_start: dict[str, dict[str, Any]] = field(default_factory=dict)

    def for_start(self, method: str) -> "Adapt":
        """These settings with what differs for one start put in."""
        return replace(self, by_start={}, **self.by_start.get(method, {}))


@dataclass(frozen=True)
class Eval:
    """How models are scored.

    Args:
        data: Folder with one folder per task, in any layout that `datasets` reads. Tasks without one come from the hub.
        batch_size: Examples per step.
        backend: NLG only: who generates. transformers: a loop of ours. lm-eval-hf, lm-eval-vllm: lm-eval (extra nlg).
        tests: Test sets of a task that is not scored on the one of its own name, as in {math: [GSM8K, MATH]}.
        split: Score on the test sets, or on the last tenth of a fixed permutation of the training sets: for choices,
            such as the epochs, that the test sets shall not see.
        limit: Use only the first examples of each set. Unset: all.
        allow_code_execution: NLG only: run the programs that models write, each in a process with little time and
            memory. That is no sandbox: what they can reach, they can harm.
        workers: Processes that decode examples; 0 decodes in this one.
        paper_table: Table of configs/paper_results.yaml to print beside the results.
    """

    data: str = "data"
    batch_size: int = 256
    backend: Literal["transformers", "lm-eval-hf", "lm-eval-vllm"] = "transformers"
    tests: dict[str, list[str]] = field(default_factory=dict)
    split: Literal["test", "validation_cut"] = "test"
    limit: int | None = None
    allow_code_execution: bool = False
    workers: int = 0
    paper_table: str = ""


@dataclass(frozen=True)
class Compare:
    """What scripts/compare.py runs through.

    Args:
        starts: Starts of the adaptation, keys as start.method takes them.
        inits: Initialisations of the anchors.
    """

    starts: list[str] = field(default_factory=lambda: ["pretrained", "ta", "tsv", "wudi"])
    inits: list[Literal["weight", "gauss"]] = field(default_factory=lambda: ["weight", "gauss"])


@dataclass(frozen=True)
class Run:
    """Where and how the work is done; nothing here changes a result but seed and precision.

    Args:
        name: Folder of the results, under `root`.
        root: Folder of all runs.
        device: auto, cpu, cuda or cuda:N.
        precision: Of the matrix products while anchors are optimised; tf32 is for CUDA, bf16 fast on new CPUs too. The
            loss that chooses the best anchors, and adaptation, are always float32.
        seed: Every draw derives from it, the task and the block.
        blocks: Work on these blocks only (0 is the first); the others may run elsewhere. Unset: all.
        score: Score the merged model at the end of adapt.
    """

    name: str = "demo"
    root: str = "runs"
    device: str = "auto"
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    seed: int = 0
    blocks: list[int] | None = None
    score: bool = True

    @property
    def dir(self) -> Path:
        """Folder of everything this run writes."""
        return Path(self.root).expanduser() / self.name


@dataclass(frozen=True)
class Config:
    """An experiment: which checkpoints, which anchors, which start, which adaptation."""

    domain: Literal["vision", "nlu", "nlg"]
    model: Model
    tasks: list[str]
    anchors: Anchors
    start: Start
    adapt: Adapt
    eval: Eval
    compare: Compare
    run: Run
    dry_run: bool = False

    @property
    def tests(self) -> dict[str, str]:
        """Every test set, and the task whose expert it asks."""
        return {test: task for task in self.tasks for test in self.eval.tests.get(task, [task])}


def parse(description: str, argv: list[str] | None = None) -> Config:
    """Read the command line and the YAML it names. Errors name the key and the choices, and exit with status 2."""
    parser = ArgumentParser(
        prog=Path(sys.argv[0]).name,
        usage="%(prog)s --config FILE [--preset NAME] [--section.field VALUE ...]",
        description=description,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML of the experiment; --preset fast is laid over it")
    parser.add_argument("--domain", type=Literal["vision", "nlu", "nlg"], required=True, help="What is merged")
    parser.add_class_arguments(Model, "model")
    parser.add_argument("--tasks", type=list[str], required=True, help="Tasks to merge, keys of TASKS in the domain")
    for section in (Anchors, Start, Adapt, Eval, Compare, Run):
        parser.add_class_arguments(section, section.__name__.lower())
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="Say what would be read, made and needed; read headers only"
    )
    argv = files_first(sys.argv[1:] if argv is None else argv)
    parsed = parser.instantiate(parser.parse_args(argv))
    config = Config(**{f.name: parsed[f.name] for f in fields(Config)})
    typed = {a.removeprefix("--adapt.").split("=")[0] for a in argv if a.startswith("--adapt.")}
    return replace(config, adapt=prefer_typed(config.adapt, typed))


def files_first(argv: list[str]) -> list[str]:
    """The command line with its YAML files in front, so that what is typed overrides them; the last is the file of
    configs/presets/ that --preset names."""
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", action="append", default=[])
    files.add_argument("--preset")
    named, others = files.parse_known_args(argv)
    presets = {file.stem: str(file) for file in sorted(PRESETS.glob("*.yaml"))}
    if named.preset is not None and named.preset not in presets:
        raise InputError(f"unknown preset {named.preset!r}; choose from {', '.join(presets)}")
    chosen = [*named.config, *([presets[named.preset]] if named.preset else [])]
    return [f"--config={file}" for file in chosen] + others


def prefer_typed(adapt: Adapt, typed: set[str]) -> Adapt:
    """Check `by_start` and drop from it the fields given on the command line, which come first."""
    known = {f.name for f in fields(Adapt)} - {"by_start"}
    for start, changes in adapt.by_start.items():
        for key in changes:
            if key not in known:
                raise InputError(f"adapt.by_start.{start} has no field {key!r}; choose from {', '.join(sorted(known))}")
    return replace(
        adapt, by_start={s: {k: v for k, v in c.items() if k not in typed} for s, c in adapt.by_start.items()}
    )


def as_dict(config: Any) -> dict[str, Any]:
    """The resolved config as plain data."""
    return asdict(config)
