"""Mathematical answers: what a completion says the answer is, and whether it is the right one.

The rules are those of the paper's evaluation (MergeLM's, after WizardLM), without the faults of the released scorer.
Deviation: it called an answer right that its normalisation stumbled over (x/2, km/h); here normalising never fails.
Deviation: it read 1,234,567 as 1234; here it is the whole number.
"""

import math
import re

from common.core.errors import InputError

MARKER = "The answer is: "
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+(?:\.\d+)?)?")


def stated_answer(completion: str) -> str | None:
    """What follows the last "The answer is: ", or None."""
    _, marker, tail = completion.rpartition(MARKER)
    return tail if marker else None


def stated_number(completion: str) -> float | None:
    """The first number of the stated answer, rounded to an integer; a fraction is worked out before."""
    number = NUMBER.search(stated_answer(completion) or "")
    if number is None:
        return None
    above, _, below = number[0].replace(",", "").partition("/")
    value = float(above) / (float(below or 1) or math.nan)
    return round(value) if math.isfinite(value) else None


def is_right_number(completion: str, solution: str) -> bool:
    """GSM8K: the stated number equals what stands behind #### in the solution."""
    try:
        right = float(solution.rpartition("#### ")[2].replace(",", ""))
    except ValueError as error:
        raise InputError(f"the solution {solution!r} does not end in #### and a number") from error
    return stated_number(completion) == right


def is_right_expression(completion: str, solution: str) -> bool:
    """MATH: the stated answer equals the content of the last \\boxed of the solution, both normalised as strings."""
    stated = stated_answer(completion)
    if stated is None:
        return False
    stated = stated.split(".\n")[0].strip().removesuffix(".")
    return normalised(stated) == normalised(boxed(solution))


def is_right_text(completion: str, answer: str) -> bool:
    """A short answer: the first line of the completion is it, but for case, spaces and a full stop."""
    line, _, _ = completion.strip().partition("\n")
    return " ".join(line.lower().removesuffix(".").split()) == answer.lower()


def boxed(solution: str) -> str:
    """Content of the last \\boxed{…}; InputError if there is none."""
    _, found, tail = solution.rpartition("\\boxed")
    if found and not tail.startswith("{"):  # \boxed 5
        return tail.split("$")[0].strip()
    depth = 0
    for end, character in enumerate(tail if found else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return tail[1:end]
    raise InputError(f"the solution {solution!r} has no \\boxed answer whose braces close")


def normalised(answer: str) -> str:
    """One spelling for LaTeX that means the same, by the rules of the MATH data set (Hendrycks et al. 2021)."""
    for old, new in (
        ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""),
        ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
    ):  # fmt: skip
        answer = answer.replace(old, new)
    answer = answer.split("\\text{ ")[0]  # units stand behind
    answer = answer.replace("\\%", "").replace("%", "")
    answer = re.sub(r"(^|[ {])\.", r"\g<1>0.", answer)
    left, _, right = answer.partition("=")
    if right and "=" not in right and len(left.strip()) <= 2:  # k = 5
        answer = right
    answer = re.sub(r"\\sqrt\s*([^\s{\[\\])", r"\\sqrt{\1}", answer).replace(" ", "")
    answer = re.sub(r"\\frac([^{\\])", r"\\frac{\1}", answer)
    answer = re.sub(r"(\\frac\{[^{}]*\})([^{\\])", r"\1{\2}", answer)
    if answer == "0.5":
        return "\\frac{1}{2}"
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", answer)
