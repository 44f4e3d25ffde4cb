"""The texts of the NLG toy: word problems, small Python functions, and the mixture that the base model reads.

Everything follows from seeds of numpy's RandomState, whose streams are frozen. A hash of its prompt decides whether a
problem is one to train on or one of the test sets, so that no model has seen a problem of those.
"""

import hashlib
import os
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from NLG.scoring import TASKS, with_tabs

TESTS = {"math": "arithmetic", "code": "snippets"}
SIZE = 400  # of a test set
HELD_OUT = 1 / 8  # of all problems
INPUTS = 8  # that a program is tested with

NAMES = ["Tom", "Ann", "Ben", "Eva", "Max", "Mia", "Sam", "Lea", "Jim", "Kim", "Ida", "Leo"]
THINGS = ["nuts", "pens", "eggs", "books", "coins", "cards", "balls", "cups", "apples", "stones", "shells", "stamps"]
GAIN, LOSS = ["finds", "buys", "gets", "wins"], ["loses", "sells", "breaks", "gives away"]
# question, and the steps of the solution: the result of the first is d, that of the second e; the last is the answer
EASY_PROBLEMS = [
    ("{name} has {a} {things} and {gains} {b} more. How many now?", ["a+b"]),
    ("{name} has {a} {things} and {loses} {b}. How many are left?", ["a-b"]),
    ("{name} has {m} boxes of {n} {things}. How many {things}?", ["m*n"]),
]
PROBLEMS = [
    *EASY_PROBLEMS,
    ("{name} has {a} {things}, {gains} {b} and {loses} {c}. How many now?", ["a+b", "d-c"]),
    ("{name} has {a} {things}, {loses} {b} and {gains} {c}. How many now?", ["a-b", "d+c"]),
    ("{name} has {m} boxes of {n} {things} and {gains} {b}. How many now?", ["m*n", "d+b"]),
    ("{name} has {m} boxes of {n} {things} and {loses} {b}. How many are left?", ["m*n", "d-b"]),
    ("{name} has {b} {things}, {other} {c} more. How many have both?", ["b+c", "d+b"]),
    ("{name} and {other} {gain} {m} {things} a day. How many in {n} days?", ["m*n", "d+d"]),
]

FUNCTIONS = ["f", "g", "h", "run", "make", "solve"]
ARGUMENTS = {"number": ["x", "n", "a", "num"], "text": ["s", "t", "word", "name"], "list": ["v", "xs", "row", "items"]}
# what it is given, what it returns in words, and the body; k is in 2..30, j in 2..5, c and d are letters
EASY_SNIPPETS = [
    ("number", "{x} plus {k}", "{x} + {k}"),
    ("number", "{x} times {k}", "{x} * {k}"),
    ("number", "whether {x} is over {k}", "{x} > {k}"),
    ("text", "{x} reversed", "{x}[::-1]"),
    ("text", "{x} in upper case", "{x}.upper()"),
    ("text", "the first {j} letters of {x}", "{x}[:{j}]"),
    ("list", "the sum of {x}", "sum({x})"),
    ("list", "the first {j} items of {x}", "{x}[:{j}]"),
]
SNIPPETS = [
    *EASY_SNIPPETS,
    ("number", "{x} minus {k}, then times {j}", "({x} - {k}) * {j}"),
    ("number", "{x} plus {k}, then times {j}", "({x} + {k}) * {j}"),
    ("number", "{x} times {j}, then plus {k}", "{x} * {j} + {k}"),
    ("number", "the rest of {x} by {k}", "{x} % {k}"),
    ("number", "whether {k} divides {x}", "{x} % {k} == 0"),
    ("number", "{x}, but at most {k}", "min({x}, {k})"),
    ("number", "{x}, but at least {k}", "max({x}, {k})"),
    ("number", "{x} minus {k} if {x} is over {k}, else 0", "if {x} > {k}:\n    return {x} - {k}\nreturn 0"),
    ("number", "{x} times {j} if {x} is under {k}, else {x}", "if {x} < {k}:\n    return {x} * {j}\nreturn {x}"),
    ("text", "{x} reversed, in upper case", "{x}[::-1].upper()"),
    ("text", "the last {j} letters of {x}", "{x}[-{j}:]"),
    ("text", "the first {j} letters of {x}, in upper case", "{x}[:{j}].upper()"),
    ("text", "how many '{c}' are in {x}", "{x}.count('{c}')"),
    ("text", "{x} without '{c}'", "{x}.replace('{c}', '')"),
    ("text", "{x} with '{c}' made '{d}'", "{x}.replace('{c}', '{d}')"),
    ("text", "{x} {j} times", "{x} * {j}"),
    ("text", "'{c}' if {x} is empty, else {x}", "if not {x}:\n    return '{c}'\nreturn {x}"),
    ("list", "{x} sorted, without the first {j}", "sorted({x})[{j}:]"),
    ("list", "the largest of {x}, plus {k}", "max({x}) + {k}"),
    ("list", "the items of {x} over {k}", "[i for i in {x} if i > {k}]"),
    ("list", "the items of {x}, each times {j}", "[i * {j} for i in {x}]"),
    ("list", "the sum of the items of {x} under {k}", "sum(i for i in {x} if i < {k})"),
    ("list", "how many items of {x} are {k}", "{x}.count({k})"),
    ("list", "the sum of {x}, each times {j}", "total = 0\nfor i in {x}:\n    total += i * {j}\nreturn total"),
]


class Snippet(NamedTuple):
    """A programming problem: a function's head and comment, the body that solves it, and arguments to test it with."""

    prompt: str
    body: str
    inputs: list[Any]


# ---- problems --------------------------------------------------------------------------------------------------------


def pick(rng: np.random.RandomState, choices: list) -> Any:
    return choices[rng.randint(len(choices))]


def word_problem(rng: np.random.RandomState, easy: bool) -> tuple[str, str]:
    """A question, and its solution down to "The answer is: "; easy ones take one step."""
    question, steps = pick(rng, EASY_PROBLEMS if easy else PROBLEMS)
    value = {"a": rng.randint(50, 100), "b": rng.randint(2, 50), "c": rng.randint(2, 50)}
    value |= {"m": rng.randint(2, 10), "n": rng.randint(2, 10)}
    if "d-b" in steps:
        value["b"] = rng.randint(1, value["m"] * value["n"])
    first, second = rng.permutation(len(NAMES))[:2]
    words = {"name": NAMES[first], "other": NAMES[second], "things": pick(rng, THINGS)}
    words |= {"gains": pick(rng, GAIN), "loses": pick(rng, LOSS), "gain": pick(rng, ["find", "buy", "get", "win"])}
    lines = []
    for step, result in zip(steps, "de", strict=False):
        value[result] = calculate(value[step[0]], step[1], value[step[2]])
        lines.append(f"{value[step[0]]}{step[1]}{value[step[2]]}={value[result]}.")
    return question.format(**words, **value), f"{' '.join(lines)} The answer is: {value[result]}"


def calculate(left: int, operation: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operation]


def snippet(rng: np.random.RandomState, easy: bool) -> Snippet:
    """A function to write; its inputs lie where a wrong constant or comparison shows."""
    kind, words, body = pick(rng, EASY_SNIPPETS if easy else SNIPPETS)
    c, d = (string.ascii_lowercase[i] for i in rng.permutation(26)[:2])
    fill = {"x": pick(rng, ARGUMENTS[kind]), "k": rng.randint(2, 31), "j": rng.randint(2, 6), "c": c, "d": d}
    body = (body if "return" in body else f"return {body}").format(**fill)
    head = f"def {pick(rng, FUNCTIONS)}({fill['x']}):\n    # {words.format(**fill)}\n"
    inputs = [argument(rng, kind, fill) for _ in range(INPUTS - 1)]
    edge = {"number": fill["k"] + rng.randint(2), "text": "" if "empty" in words else c + "Ab" + c, "list": [7, 40, 1]}
    return Snippet(head, "".join(f"    {line}\n" for line in body.split("\n")), [edge[kind], *inputs])


def argument(rng: np.random.RandomState, kind: str, fill: dict) -> Any:
    """Something to call a function with."""
    if kind == "number":
        return int(rng.randint(0, 2 * fill["k"] + 5))
    size = rng.randint(4, 9)
    if kind == "text":
        return "".join(pick(rng, [*"aBcDeFgH", fill["c"]]) for _ in range(size))
    return [int(i) for i in rng.randint(0, 2 * fill["k"], size - 1)] + [int(fill["k"])]


def outcome(problem: Snippet, value: Any) -> Any:
    """What the reference solution returns."""
    scope: dict[str, Any] = {}
    exec(problem.prompt + problem.body, scope)
    return scope[entry_point(problem)](value)


def entry_point(problem: Snippet) -> str:
    return problem.prompt[len("def ") : problem.prompt.index("(")]


# ---- sets ------------------------------------------------------------------------------------------------------------


def is_held_out(prompt: str) -> bool:
    """Whether a problem belongs to the test sets."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 256 * HELD_OUT


def unseen(make: Callable[[], tuple]) -> tuple:
    """The first problem made that is not held out."""
    while is_held_out((problem := make())[0]):
        pass
    return problem


def math_text(rng: np.random.RandomState, easy: bool = False) -> tuple[str, str]:
    """What a model reads and what it is to write: a word problem, to train on."""
    question, solution = unseen(lambda: word_problem(rng, easy))
    return TASKS["arithmetic"].prompt.replace("{problem}", question), solution


def code_text(rng: np.random.RandomState, easy: bool = False) -> tuple[str, str]:
    """What a model reads and what it is to write: the head of a function and its body, to train on."""
    problem = unseen(lambda: snippet(rng, easy))
    return TASKS["snippets"].prompt.replace("{problem}", with_tabs(problem.prompt)), with_tabs(problem.body)


def equations(rng: np.random.RandomState) -> str:
    """Four sums, differences and products."""
    lines = []
    for operation in (pick(rng, ["+", "-", "*"]) for _ in range(4)):
        right = rng.randint(2, 10 if operation == "*" else 60)
        left = rng.randint(2, 10) if operation == "*" else rng.randint(right, 110)
        lines.append(f"{left}{operation}{right}={calculate(left, operation, right)}.")
    return " ".join(lines)


def counting(rng: np.random.RandomState) -> str:
    first = rng.randint(1, 90)
    return "Count: " + " ".join(map(str, range(first, first + 8)))


def copying(rng: np.random.RandomState) -> str:
    """A word made of letters, changed as it is told."""
    word = "".join(pick(rng, list(string.ascii_letters)) for _ in range(rng.randint(3, 8)))
    change, changed = pick(rng, [("copy", word), ("reverse", word[::-1]), ("upper", word.upper()), ("3", word[:3])])
    return f"{change} '{word}': '{changed}'"


def sentence(rng: np.random.RandomState) -> str:
    verb = pick(rng, [*GAIN, *LOSS, "likes", "wants", "has", "counts", "sorts"])
    colour = pick(rng, ["red", "blue", "green", "old", "new", "small"])
    return f"{pick(rng, NAMES)} {verb} {rng.randint(2, 100)} {colour} {pick(rng, THINGS)}."


def mixture(rng: np.random.RandomState) -> tuple[str, str]:
    """A text for the base model, all of it to be written."""
    plain = [equations] * 6 + [counting, copying, copying, copying, sentence, sentence]
    problems = [math_text] * 4 + [code_text] * 4
    kind = pick(rng, [*plain, *problems])
    return ("", "".join(kind(rng, easy=True)) if kind in problems else kind(rng))


KINDS = {"base": mixture, "math": math_text, "code": code_text}


def texts(name: str, size: int) -> list[tuple[str, str]]:
    """What the base or an expert is trained on: pairs of a prompt and what is to be written behind it."""
    rng = np.random.RandomState(sorted(KINDS).index(name))
    return [KINDS[name](rng) for _ in range(size)]


def test_rows(test: str) -> list[dict[str, str]]:
    """A test set in the columns of GSM8K (arithmetic) or HumanEval (snippets), no problem twice."""
    rng = np.random.RandomState(100 + sorted(TESTS.values()).index(test))
    make = word_problem if test == "arithmetic" else snippet
    found: dict[str, tuple] = {}
    while len(found) < SIZE:
        problem = make(rng, False)
        if is_held_out(problem[0]):
            found.setdefault(problem[0], problem)
    return [number_row(p) if test == "arithmetic" else check_row(p) for p in found.values()]


def number_row(problem: tuple[str, str]) -> dict[str, str]:
    question, solution = problem
    return {"question": question, "answer": solution.replace("The answer is:", "####")}


def check_row(problem: Snippet) -> dict[str, str]:
    asserts = [f"    assert candidate({value!r}) == {outcome(problem, value)!r}\n" for value in problem.inputs]
    return {
        "prompt": problem.prompt,
        "canonical_solution": problem.body,
        "test": "def check(candidate):\n" + "".join(asserts),
        "entry_point": entry_point(problem),
    }


def write_test(folder: Path, test: str) -> None:
    """One parquet file that `datasets.load_dataset(folder, split="test")` reads."""
    datasets.disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "test-00000-of-00001.parquet"
    datasets.Dataset.from_list(test_rows(test)).to_parquet(f"{path}.part")
    os.replace(f"{path}.part", path)
