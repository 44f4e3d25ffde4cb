"""Scoring by lm-eval (extra `nlg`), with transformers or vLLM. Prompts, rules and data are those of NLG/scoring.py.

The tasks also serve lm-eval's own command, on any model that it can load; data lie in data/<test set>/ or come from the
hub (--metadata '{"root": DIR}': in DIR/<test set>/), and code is run only if it is told to:

    lm_eval --include_path NLG/lm_eval_tasks --tasks fda_gsm8k --model vllm --model_args pretrained=MODEL
    lm_eval --include_path NLG/lm_eval_tasks --tasks fda_mbpp --confirm_run_unsafe_code ...
"""

import tempfile
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common.core.errors import InputError

TASKS_FOLDER = Path(__file__).parent / "lm_eval_tasks"
MODELS = {"lm-eval-hf": "hf", "lm-eval-vllm": "vllm"}  # eval.backend -> lm-eval's name for it
NEEDS = {"lm_eval": "pip install '.[nlg]'", "vllm": "pip install 'lm-eval[vllm]', on a machine with a GPU"}


def check_backend(backend: str, test: str) -> None:
    """InputError if what a backend needs is not installed, or lm-eval has no task of ours for a test set."""
    for part in ("lm_eval", MODELS[backend]):
        if part in NEEDS and not find_spec(part):
            raise InputError(f"eval.backend {backend} needs {part}: {NEEDS[part]}")
    if not (TASKS_FOLDER / f"{test.lower()}.yaml").is_file():
        known = ", ".join(sorted(file.stem for file in TASKS_FOLDER.glob("[!_]*.yaml")))
        raise InputError(f"eval.backend {backend} has no task for {test}, only for {known}; transformers has all")


def judged_by_harness(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    test: str,
    *,
    backend: str,
    data: str,
    limit: int | None,
    dtype: str,
    **options,
) -> list[tuple[str, bool]]:
    """What a model answers to each example of a test set, and whether that is right. `options` go to lm-eval."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    task = f"fda_{test.lower()}"
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        results = simple_evaluate(
            model=MODELS[backend],
            model_args={"pretrained": str(path), "tokenizer": folder, "dtype": dtype or "auto"},
            tasks=[task],
            task_manager=TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata={"root": data}),
            limit=limit,
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,  # eval.allow_code_execution has been asked before
            **options,
        )
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [(sample["resps"][0][0], bool(sample["right"])) for sample in samples]
