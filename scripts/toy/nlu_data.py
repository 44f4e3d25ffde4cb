"""The texts of the NLU toy: English prose that ships with Python, and the tasks made from its manual.

The tasks draw on the manual's topics (pydoc_data), the base model reads the docstrings of the standard library as well.
Both are documentation of Python, copyright Python Software Foundation, under the PSF licence; the topics' prose is kept
beside this file, since it differs a little from version to version. An example follows from (task, split, the prose).
"""

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from common.io.examples import cut_order
from common.io.yaml_files import read_yaml_file

Passage = list[str]  # the words of a paragraph
Generator = np.random.RandomState  # its streams are frozen, those of numpy's newer generators are not

NAMES = ["topic", "acceptability", "consecutive", "paraphrase", "similarity", "contains", "blank"]
ROWS = read_yaml_file(Path(__file__).parents[2] / "NLU" / "tasks.yaml")
TASKS = {name: ROWS[name] for name in NAMES}  # columns, number of labels and metric, as the pipeline reads them
SPLITS = {"train": 16000, "validation": 600}
CUT = "validation_cut"  # the tenth of the training set on which coefficients are chosen
TWELFTHS = {CUT: range(1), "validation": range(1, 3), "held out": range(3), "train": range(3, 12)}  # of the paragraphs
SECTIONS = {
    "objects": "types specialnames attribute-access customization objects",
    "strings": "strings formatstrings string-methods",
    "containers": "typesseq typesseq-mutable typesmapping sequence-types dict subscriptions slicings",
    "statements": "compound assignment try import raise with for naming class function",
    "debugger": "debugger",
}
SECTION_OF = {topic: section for section, names in SECTIONS.items() for topic in names.split()}
BLANK = "__"
FILLERS = ["the", "of", "is", "to", "and"]
NO_PROSE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data", "turtledemo"}


def generator(*key: object) -> Generator:
    """A generator seeded by a stable hash of `key`."""
    return Generator(np.frombuffer(hashlib.sha256(repr(key).encode()).digest(), "<u4"))


# ---- prose -----------------------------------------------------------------------------------------------------------


def paragraphs(text: str) -> list[str]:
    """The paragraphs that are sentences, each in one line; code, grammar, tables and headings are not."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        line = re.sub(r'[“”"*`]', "", " ".join(block.split())).replace("’", "'").replace("‘", "'")
        words = line.split()
        plain = sum(word.strip(".,;:()").isalpha() for word in words)
        if len(words) >= 8 and plain > 0.65 * len(words) and line[-1] in ".:!?)" and not CODE.search(line):
            found.append(line)
    return found


CODE = re.compile(r">>>|::=|\+--|==|---|\||\\")


def manual() -> list[list[str]]:
    """The manual's prose as [topic, paragraph]; a paragraph of several topics counts to the shortest."""
    found: dict[str, str] = {}
    for topic in sorted(topics, key=lambda name: (len(topics[name]), name)):
        for line in paragraphs(topics[topic]):
            found.setdefault(line, topic)
    return sorted([topic, line] for line, topic in found.items())


def docstrings() -> list[str]:
    """The prose in the docstrings of the standard library."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), {}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(root.rglob("*.py")):
        if NO_PROSE & set(file.relative_to(root).parts):
            continue
        with warnings.catch_warnings(action="ignore"):
            nodes = [node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, documented)]
        for node in nodes:
            found |= dict.fromkeys(paragraphs(ast.get_docstring(node) or ""))
    return list(found)


def split_manual(prose: list[list[str]], split: str) -> list[list[str]]:
    """The paragraphs of a split, one of TWELFTHS: "held out" are those of validation and of the validation cut."""
    rank = generator("paragraphs").permutation(len(prose))
    return [row for row, r in zip(prose, rank, strict=True) if 12 * r // len(prose) in TWELFTHS[split]]


# ---- pieces of an example --------------------------------------------------------------------------------------------


def window(rng: Generator, passages: list[Passage], low: int, high: int) -> Passage:
    """Between low and high words in a row of one passage, or all that it has."""
    words = passages[rng.randint(len(passages))]
    n = min(rng.randint(low, high + 1), len(words))
    start = rng.randint(len(words) - n + 1)
    return words[start : start + n]


def halves(rng: Generator, passages: list[Passage]) -> tuple[Passage, Passage]:
    words = window(rng, passages, 16, 36)
    return words[: len(words) // 2], words[len(words) // 2 :]


def thinned(rng: Generator, words: Passage, part: float) -> Passage:
    """A random part of the words, in order."""
    return [words[i] for i in sorted(rng.permutation(len(words))[: round(part * len(words))])]


def text(*pieces: Passage) -> tuple[str, ...]:
    return tuple(" ".join(words) for words in pieces)


# ---- tasks: (rng, label, passages by section) -> texts, label --------------------------------------------------------


def topic(rng: Generator, label: int, source: dict[str, list[Passage]]) -> tuple:
    """Which section of the manual is this from?"""
    return *text(window(rng, source[list(SECTIONS)[label]], 16, 36)), label


def acceptability(rng: Generator, label: int, source: dict[str, list[Passage]]) -> tuple:
    """Are the words in their order (1) or shuffled (0)?"""
    words = window(rng, source["all"], 8, 20)
    return *text(words if label else [words[i] for i in rng.permutation(len(words))]), label


def consecutive(rng: Generator, label: int, source: dict[str, list[Passage]]) -> tuple:
    """Does the second text follow the first (1), or is it from elsewhere (0)?"""
    first, second = halves(rng, source["all"])
    return *text(first, second if label else halves(rng, source["all"])[1]), label


def paraphrase(rng: Generator, label: int, source: dict[str, list[Passage]]) -> tuple:
    """Is the second text the first with words left out (1), or another one (0)?"""
    words = window(rng, source["all"], 6, 10)
    other = words if label else window(rng, source["all"], 6, 10)
    return *text(words, thinned(rng, other, 0.6)), label


def similarity(rng: Generator, label: int, source: dict[str, list[Passage]]) -> tuple:
    """Five times the part of the first text's words that the second one kept; the others come from elsewhere."""
    n = rng.randint(5, 10)
    words, other = (window(rng, source["all"], n, n) for _ in "12")
    n = min(len(words), len(other))
    keep = set(rng.permutation(n)[: rng.randint(n + 1)].tolist())
    second = [words[i] if i in keep else other[i] for i in range(n)]
    return *text(words[:n], second), round(5 * len(keep) / n, 2)


def contains(rng: Generator, label: int, source: dict[str, list[Passage]]) -> tuple:
    """Is the word in the text (1) or not (0)?"""
    while True:
        words, other = window(rng, source["all"], 6, 10), window(rng, source["all"], 6, 10)
        new = [w for w in (words if label else set(other) - set(words)) if w.isalpha() and len(w) > 3]
        if new:
            return *text([sorted(new)[rng.randint(len(new))]], words), label


def blank(rng: Generator, label: int, source: dict[str, list[Passage]]) -> tuple:
    """Which word belongs in the blank?"""
    while True:
        words = window(rng, source["all"], 10, 24)
        places = [i for i, word in enumerate(words) if word == FILLERS[label]]
        if places:
            i = places[rng.randint(len(places))]
            return *text([*words[:i], BLANK, *words[i + 1 :]]), label


MAKERS = {f.__name__: f for f in (topic, acceptability, consecutive, paraphrase, similarity, contains, blank)}
LABELS = {"topic": list(SECTIONS), "blank": FILLERS}  # their names; in the other tasks: no, yes


def task_split(
    prose: list[list[str]], task: str, split: str, paragraphs: str | None = None
) -> tuple[list[tuple[str, ...]], list]:
    """Texts (a tuple of one or two for each example) and labels; every class equally often. Experts are trained on the
    whole of "train". `paragraphs`: those of another split than the one whose seed draws the examples.
    """
    source: dict[str, list[Passage]] = {section: [] for section in (*SECTIONS, "all")}
    for name, line in split_manual(prose, paragraphs or split):
        words = line.split()
        for section in {SECTION_OF.get(name, "all"), "all"}:
            source[section] += [words] * (len(words) // 8)  # long ones are drawn more often
    rng = generator(task, split)
    count = len(cut_order(SPLITS["train"])[1]) if split == CUT else SPLITS[split]
    rows = [MAKERS[task](rng, i % TASKS[task]["labels"], source) for i in range(count)]
    return [row[:-1] for row in rows], [row[-1] for row in rows]


def stored_split(prose: list[list[str]], task: str, split: str) -> tuple[list[tuple[str, ...]], list]:
    """The same as the data set has it: in its training set, what will be the validation cut is of paragraphs that no
    expert was trained on."""
    texts, labels = task_split(prose, task, split)
    if split == "train":
        for place, of_cut, label in zip(cut_order(len(texts))[1], *task_split(prose, task, CUT), strict=True):
            texts[place], labels[place] = of_cut, label
    return texts, labels


def write_splits(folder: Path, prose: list[list[str]], task: str) -> None:
    """Parquet files that `datasets.load_dataset(folder)` reads: sentence(s) and label, as in GLUE."""
    from datasets import ClassLabel, Dataset, Features, Value

    kinds = {column: Value("string") for column in TASKS[task]["text"]}
    names = LABELS.get(task, ["no", "yes"])
    kinds["label"] = ClassLabel(names=names) if TASKS[task]["labels"] > 1 else Value("float32")
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        texts, labels = stored_split(prose, task, split)
        rows = dict(zip(kinds, [*zip(*texts, strict=True), labels], strict=True))
        path = folder / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict(rows, features=Features(kinds)).to_parquet(f"{path}.part")
        os.replace(f"{path}.part", path)
