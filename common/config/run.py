"""The sections `eval`, `compare` and `run`: how models are scored, what is compared, where the work is done."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


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
            such as the epochs, that must not be chosen on the test sets.
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
            random take it too, unless start.hyper sets theirs, and others are made once. The tables give mean ±
            deviation. Empty: run.seed alone.
        search: Hyperparameters of starts to be chosen on the validation cut, as in {ta: {scale: [0.1, 0.2, 0.3]}};
            several lists are a grid. The choice comes before start.hyper, and is written to search.json. Under fda:
            fields of adapt, chosen for each start and initialisation by itself; blend 0, the start, is always tried.
            {ta: {scale: {map: {low: 0, high: 0.6, samples: 60}}}}: a number for each task, by MAP: so many random ones
            between the two are scored, and the best mean is looked for on the Pareto front of their quadratic fits.
    """

    starts: list[str] = field(default_factory=lambda: ["pretrained", "ta", "tsv", "wudi"])
    inits: list[Literal["weight", "gauss"]] = field(default_factory=lambda: ["weight", "gauss"])
    seeds: list[int] = field(default_factory=list)
    search: dict[str, dict[str, Any]] = field(default_factory=dict)


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
        engine: Who works on the units, a task and a block each: processes of this machine, or of a Ray cluster (extra
            cluster). Either gives the same bytes.
        workers: How many units are worked on at once. Unset: on a CPU one process a core where matrix products are too
            small for threads and there is enough to do, on a GPU one a GPU, on a cluster as many as it has room for.
        gpus_per_unit: ray only: share of a GPU that a unit takes. Unset: what its memory needs, of 1, 1/2, 1/3 or 1/4.
        address: ray only: the cluster's head, host:port, or auto on one of its machines. Empty: this machine.
        blocks: Work on these blocks only (0 is the first); the others may run elsewhere. Unset: all.
        score: Score the merged model at the end of adapt.
        log: File that a line for each unit, stage and warning is added to; batch systems that show no terminal get the
            same lines in place of bars.
        report: Keep a page of the run, report.html in its folder, and measure the task vectors for it unless there are
            more than 4 billion weights to read. full: whatever there is to read. no: no page.
    """

    name: str = "demo"
    root: str = "runs"
    device: str = "auto"
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    seed: int = 0
    engine: Literal["local", "ray"] = "local"
    workers: int | None = None
    gpus_per_unit: float | None = None
    address: str = ""
    blocks: list[int] | None = None
    score: bool = True
    log: str = ""
    report: Literal["auto", "full", "no"] = "auto"

    @property
    def dir(self) -> Path:
        """Folder of everything this run writes."""
        return Path(self.root).expanduser() / self.name
