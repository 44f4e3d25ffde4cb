"""Test sets of language models: how an example becomes a prompt, and when the completion is right."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from common.config import Config, Model
from common.core.errors import InputError
from common.domain import Scored
from common.evaluation.answers import scored
from common.io.adapters import is_adapter
from common.io.bytes_of import files_in
from common.io.checkpoints import Checkpoint, write_text
from common.io.examples import first, load_records, validation_cut
from common.io.heads import open_experts
from common.io.model_config import CONFIG_FILE
from common.io.tokenizer_files import TOKENIZER_FILES, has_tokenizer
from common.io.yaml_files import read_rows
from common.run.device import gpus_of
from NLG.answers import is_right_expression, is_right_number, is_right_text
from NLG.decoders import architecture, config_text, reading
from NLG.generation import complete, open_tokenizer
from NLG.harness import TASKS_FOLDER, check_backend, judged_by_harness
from NLG.openers import opener_of
from NLG.programs import program_in, runs

if TYPE_CHECKING:  # an import of a second, which commands that read no examples go without
    import datasets

LONG_TESTS = {493: "calculate_polygons(startx, starty, endx, endy, radius)"}  # MBPP: the asserts are pages long
Example = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A test set; see the head of tasks.yaml."""

    rule: str
    prompt: str
    max_new_tokens: int
    stop: list[str] = field(default_factory=list)
    hub: str = ""
    hub_configs: list[str | None] = field(default_factory=lambda: [None])
    split: str = "test"
    train_split: str | None = None


@dataclass(frozen=True)
class Rule:
    """How an example is put to a model, and when the completion is right; `columns` must be there."""

    columns: tuple[str, ...]
    problem: Callable[[Example], str]
    is_right: Callable[[str, Example], bool]
    runs_code: bool = False


def with_tabs(text: str) -> str:
    """Four spaces as a tab, as the code expert was prompted."""
    return text.replace(" " * 4, "\t")


def asserts_problem(example: Example) -> str:
    """The text of an MBPP problem and the asserts that will test it."""
    tests = LONG_TESTS.get(example.get("task_id"), "\n".join(example["test_list"]))
    return with_tabs(f"\n{example['text']}\nTest examples:\n{tests}")


def passes_asserts(completion: str, example: Example) -> bool:
    """MBPP: the program runs, and its asserts behind it."""
    return runs("\n".join([program_in(completion), *example["test_list"]]))


def passes_check(completion: str, example: Example) -> bool:
    """HumanEval: prompt and completion run, and the check of the function that they define."""
    program = example["prompt"] + program_in(completion)
    return runs(f"{program}\n{example['test']}\ncheck({example['entry_point']})\n")


RULES = {
    "number": Rule(
        ("question", "answer"), lambda e: e["question"], lambda completion, e: is_right_number(completion, e["answer"])
    ),
    "expression": Rule(
        ("problem", "solution"),
        lambda e: e["problem"],
        lambda completion, e: is_right_expression(completion, e["solution"]),
    ),
    "check": Rule(("prompt", "test", "entry_point"), lambda e: with_tabs(e["prompt"]), passes_check, runs_code=True),
    "asserts": Rule(("text", "test_list"), asserts_problem, passes_asserts, runs_code=True),
    "function": Rule(("text", "test_list"), lambda e: e["text"], passes_asserts, runs_code=True),
    "answer": Rule(
        ("question", "answer"), lambda e: e["question"], lambda completion, e: is_right_text(completion, e["answer"])
    ),
}


def metric(test: str) -> str:
    """Name of the number that a test set reports."""
    return "pass@1" if RULES[TASKS[test].rule].runs_code else "accuracy"


def scorer(config: Config, test: str) -> dict[str, Any]:
    """What decides a score besides model and examples: the row of tasks.yaml, who generates in which type, and the
    tokenizer, that of the expert or else of the base."""
    folders = [config.model.path(which, config.tests[test]) for which in ("expert", "base")]
    tokenizer = next((files_in(f, (CONFIG_FILE, *TOKENIZER_FILES)) for f in folders if has_tokenizer(f)), None)
    said = {"task": asdict(TASKS[test]), "backend": config.eval.backend, "dtype": type_said(config)}
    if config.eval.backend != "transformers":
        said["harness"] = files_in(TASKS_FOLDER, ["*.yaml"])
    return said | {"tokenizer": tokenizer}


def type_said(config: Config) -> str:
    """The type that models are scored in as their rows' scorer has it: eval.dtype, and where that is empty also where
    transformers scores them as stored."""
    device = torch.device("cuda" if gpus_of(config.run.device) else "cpu")
    as_stored = config.eval.backend == "transformers" and scored_type(config.eval.dtype, device) == "auto"
    return "as stored" if as_stored else config.eval.dtype


def score(
    config: Config, test: str, checkpoints: Mapping[str, Path], device: torch.device
) -> Iterator[tuple[str, Scored]]:
    """Part of right completions in [0, 1] and number of examples for several models, one in memory at a time.

    The completions are kept in completions/<test>/ of the run.
    """
    options = config.eval
    if RULES[TASKS[test].rule].runs_code and not options.allow_code_execution:
        raise InputError(f"{test} runs what the models write; --eval.allow_code_execution true lets it")
    if options.backend != "transformers":
        check_backend(options.backend, test)
        for path in filter(is_adapter, checkpoints.values()):
            raise InputError(
                f"eval.backend {options.backend} needs whole models, {path} is an adapter; use transformers"
            )
    tokenizer = open_tokenizer(config.model, config.tests[test])
    examples = list(examples_of(options.data, test, options.limit, options.split == "validation_cut"))
    base = config.model.path("base")
    for name, path in checkpoints.items():
        if options.backend == "transformers":
            dtype = scored_type(options.dtype, device)
            judged = judge(path, tokenizer, test, examples, options.batch_size, device, name, base, dtype)
        else:
            judged = judged_by_harness(
                path,
                tokenizer,
                test,
                backend=options.backend,
                data=options.data,
                limit=options.limit,
                dtype=options.dtype,
                batch_size=options.batch_size,
                device=str(device),
            )
        lines = [
            {"prompt": prompt, "completion": completion, "right": right}
            for prompt, (completion, right) in zip(prompts_of(test, examples), judged, strict=True)
        ]
        file = config.run.dir / "completions" / test / f"{path.parent.name}-{path.name}.jsonl"
        write_text(file, "".join(json.dumps(line) + "\n" for line in lines))
        yield name, scored([right for _, right in judged])


def judge(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    test: str,
    examples: Sequence[Example],
    batch_size: int,
    device: torch.device,
    name: str,
    base: Path | None = None,
    dtype: str | torch.dtype = torch.float32,
) -> list[tuple[str, bool]]:
    """What a model answers to each example, and whether that is right; `base` is whose adapter `path` may be."""
    row = TASKS[test]
    completions = complete(
        open_model(path, base or path, dtype).to(device),
        tokenizer,
        prompts_of(test, examples),
        max_new_tokens=row.max_new_tokens,
        stop=row.stop,
        batch_size=batch_size,
        name=f"{test}: {name}",
    )
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(zip(completions, pool.map(RULES[row.rule].is_right, completions, examples), strict=True))


def scored_type(name: str, device: torch.device) -> str | torch.dtype:
    """The type that models are scored in: the one that is asked for, else as stored on a GPU and float32 on a CPU."""
    return getattr(torch, name) if name else "auto" if device.type == "cuda" else torch.float32


def open_model(path: Path, base: Path, dtype: str | torch.dtype) -> PreTrainedModel:
    """The model in a folder, or the base with the tensors that the LoRA adapter in the folder changes."""
    disable_progress_bar()  # of the loading of weights, a line for each model
    if not is_adapter(path):
        return stock_model(path, dtype)
    names, vocabulary = (of := reading(Model(base=str(base)))).names, of.vocabulary
    expert = open_experts(Checkpoint(base, names), {"expert": path}, names, vocabulary, turned=of.turned)["expert"]
    head = vocabulary[1]
    own_head = {} if head not in expert.shapes else {"tie_word_embeddings": False}
    model = stock_model(base, dtype, **own_head)
    changed = {name for name in expert.names() if expert.touches(name) or name == head}  # a tied base stores no head
    rows = max(expert.shapes[name][0] for name in vocabulary if name in expert.shapes)
    if rows != model.get_input_embeddings().num_embeddings:  # the adapter's tokens are more than the base's
        model.resize_token_embeddings(rows, mean_resizing=False)
    weights = {names(name): tensor for name, tensor in model.state_dict().items()}
    apart = next((name for name in changed if name not in weights), "")
    if apart:
        raise InputError(
            f"{path} changes {apart}, which transformers stacks with others: merge the adapter to score it"
        )
    resized = {name: tuple(weights[name].shape) for name, s in expert.shapes.items() if s != weights[name].shape}
    expert.resize(resized)
    for name in {*changed, *resized}:
        weights[name].copy_(expert.read([name])[name])
    return model


def stock_model(folder: Path, dtype: str | torch.dtype, **fields: Any) -> PreTrainedModel:
    """The model in a folder as transformers opens it, which would not see through prefixes of training tools.

    fields: of its config.json, with other values.
    """
    renamings = Checkpoint(folder).unwrapped.renamings()
    model = Model(base=str(folder))
    opener = opener_of(architecture(model), config_text(model)[1])
    return opener.from_pretrained(folder, dtype=dtype, key_mapping=renamings or None, **fields)


def examples_of(data: str, test: str, limit: int | None = None, cut: bool = False) -> "datasets.Dataset":
    """The first examples of a test set or its validation cut, from the folder of its name under `data` or the hub."""
    from datasets import concatenate_datasets

    row, root = TASKS[test], Path(data)
    split = row.train_split if cut else row.split
    assert split  # check_tests refuses the cut of a test set that has no training set
    configs = [None] if (root.expanduser() / test).is_dir() else row.hub_configs
    parts = [load_records(root, test, row.hub, c, split, RULES[row.rule].columns) for c in configs]
    records = concatenate_datasets(parts)
    return first(validation_cut(records) if cut else records, limit)


def prompts_of(test: str, examples: Sequence[Example]) -> list[str]:
    """What a model is given for each example."""
    row = TASKS[test]
    return [row.prompt.replace("{problem}", RULES[row.rule].problem(example)) for example in examples]


def read_tasks(file: Path) -> dict[str, Task]:
    """The rows of a tasks.yaml; InputError naming the task of whose fields one is wrong."""
    tasks = read_rows(file, Task)
    for name, task in tasks.items():
        if task.rule not in RULES:
            raise InputError(f"{file}: task {name}: unknown rule {task.rule!r}; choose from {', '.join(RULES)}")
    return tasks


TASKS = read_tasks(Path(__file__).parent / "tasks.yaml")
