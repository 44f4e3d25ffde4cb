"""What an experiment can choose. One YAML serves both stages; the command line overrides it field by field."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from common.core.places import for_task, path_of

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "configs" / "presets"
PRETRAINED = "pretrained"  # the start that is no merge


@dataclass(frozen=True)
class Model:
    """The checkpoints to merge.

    Args:
        base: Checkpoint of the pretrained model: a .safetensors file, a folder as open_clip or Hugging Face save it, a
            place on the hub, hf://org/name[@revision][/path]; so may every path here be, and anchors.source.
        expert: The same for the expert of one task; {task} is its name, {slug} that in a-z and 0-9 (SST-2: sst2).
        experts: {task: path} of experts that are not where `expert` says.
        root: Folder that the other paths are relative to.
        arch: Architecture: an open_clip model name; NLG: a config.json's text, read where the base is not there yet.
            Empty: the config file beside the base's weights tells.
        family: The architecture, as the base's config names it. auto: whatever that says.
        text: Vision only: checkpoint with the text tower (zero-shot heads, merged checkpoint), if the base has none.
        head: Vision only: file of a task's zero-shot head; else it is built from the text tower.
        heads: NLU only: tasks that get heads/<task>, a classifier of that expert's head and a link to the encoder.
        vocabulary: NLG only: what becomes of tokens that the base lacks; rows are matched by token, by number where a
            tokenizer.json is missing. refuse: none has more rows than the base; pad: the base's missing rows begin as
            the mean of its own; base: they are left out; union: every token of any model gets a row, which begins as
            the mean over the experts that have it, and the merged tokenizer is written.
        dtype: NLG only: type of the merged weights. Empty: the base's.
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
    vocabulary: Literal["refuse", "pad", "base", "union"] = "refuse"
    dtype: Literal["", "float32", "float16", "bfloat16"] = ""
    tokenizers: tuple[str, ...] = ()

    def __hash__(self) -> int:  # a key of what is made once for each model
        return hash(repr(self))

    def path(self, name: Literal["base", "expert", "text", "head"], task: str = "") -> Path:
        """One of the paths, relative to `root`, "~" expanded."""
        return path_of(self.named(name, task), self.root)

    def named(self, name: Literal["base", "expert", "text", "head"], task: str = "") -> str:
        """One of the paths as the config writes it, for a task."""
        own = self.experts.get(task) if name == "expert" else None
        return for_task(own or getattr(self, name), task)


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
        optimizer: Of the anchors. muon reaches the same loss in a sixth of the steps, with lr 0.3 to 0.6, linear.
        lr: Its learning rate.
        schedule: Of the learning rate over the steps: constant, or linear down to zero.
        steps: Its steps.
        stop_loss: End a unit when its mean matching loss is this or less; looked at every 20 steps. Unset: never.
        patience: End a unit after so many steps without getting 1 % better. Unset: never.
        together: Optimise the tasks of a block in one go, all in memory, which small blocks on a GPU gain from: eager,
            or compiled by that backend of torch.compile. The result is the same to rounding.
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
    together: Literal["no", "eager", "inductor", "cudagraphs"] = "no"
    skip_null_gradients: bool = True
    position_embeddings: bool = False
    source: str = ""

    def path(self, task: str) -> Path:
        """Folder of the anchors of one task under `source`."""
        return path_of(for_task(self.source if "{" in self.source else f"{self.source}/{{task}}", task))


@dataclass(frozen=True)
class Start:
    """The model that adaptation starts from.

    Args:
        method: pretrained, or a merge method.
        checkpoint: A merged checkpoint made elsewhere, to take instead; `method` then just names it.
        hyper: Hyperparameters of each method, as in {ta: {scale: 0.3}}.
    """

    method: str = "pretrained"
    checkpoint: str = ""
    hyper: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where the checkpoint is."""
        return path_of(self.checkpoint)


@dataclass(frozen=True)
class Adapt:
    """How the merged blocks are trained on the anchors (paper box 2).

    Args:
        rest: Where tensors outside the blocks come from: the pretrained model (paper) or the start.
        per_task: From ta: a coefficient for each weight of each task vector (paper Eq. 6). False: for each
            weight of their sum, as from any other start.
        distance: Between the merged block's outputs and the expert's.
        lr: Learning rate of Adam.
        epochs: Passes over the anchors of all tasks.
        speedup: Divides the epochs and multiplies the learning rate, with Adam's moments shorter to match. 1: the
            paper's.
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
    speedup: float = 1
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
        dtype: NLG only: type that models are scored in. Empty: as stored, but float32 by transformers on a CPU.
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
    dtype: Literal["", "float32", "float16", "bfloat16"] = ""
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
        inits: Initialisations of the anchors. Empty: the starts alone, without anchors.
        seeds: Each is a complete run of its own in seed_<s> of the run's folder, with run.seed s; merges that draw at
            random take it too, unless start.hyper sets theirs. The tables give mean ± deviation. Empty: run.seed alone.
        search: Hyperparameters of starts to be chosen on the validation cut, as in {ta: {scale: [0.1, 0.2, 0.3]}};
            several lists are a grid. The choice comes before start.hyper, and is written to search.json.
    """

    starts: list[str] = field(default_factory=lambda: ["pretrained", "ta", "tsv", "wudi"])
    inits: list[Literal["weight", "gauss"]] = field(default_factory=lambda: ["weight", "gauss"])
    seeds: list[int] = field(default_factory=list)
    search: dict[str, dict[str, list[Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """Where and how the work is done; nothing here changes a result but seed and precision.

    Args:
        name: Folder of the results, under `root`, the folder of all runs.
        device: auto, cpu, cuda or cuda:N.
        precision: Of the matrix products while anchors are optimised. tf32 is for CUDA. bf16 takes the linear maps
            alone, rounds how two blocks differ, not what each answers, and is fast on new CPUs too, where blocks are
            large; a CPU that would have to emulate it takes float32. The loss that chooses the best anchors, and
            adaptation, are always float32.
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

    def at_start(self, method: str) -> "Config":
        """The config of one of compare.starts alone; start.checkpoint is that of start.method only."""
        checkpoint = self.start.checkpoint if method == self.start.method else ""
        return replace(
            self,
            start=replace(self.start, method=method, checkpoint=checkpoint),
            adapt=replace(self.adapt, by_start={s: c for s, c in self.adapt.by_start.items() if s == method}),
            compare=replace(self.compare, starts=[method]),
        )


def as_dict(config: Any) -> dict[str, Any]:
    """The resolved config as plain data."""
    return asdict(config)
