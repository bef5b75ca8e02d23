"""Is the final answer right? math-verify decides, for formulas too; where it is not installed, equal numbers or equal texts.

The answer is looked for in the last message only: the last \\boxed{...}, else after the last "####", "Answer:" or "answer is".
"""

import re
from fractions import Fraction
from importlib.util import find_spec

BOX = "\\boxed{"
_MARK = re.compile(r"(?:####|answer\s*(?:is|:))\s*:?\s*\$?([^\n$]+)", re.IGNORECASE)
TIMEOUT_S = 20.0
"""For a comparison in math-verify's processes; its own limits are 5 s for each of its parts."""
MAX_ANSWER = 500
"""Characters: no answer of these data sets is longer, and a parser's time grows with it."""


def final_answer(solution: str) -> str | None:
    """The answer of the last message, as it stands there; None without one."""
    message = solution.rpartition("</tool_response>")[2]
    start = message.rfind(BOX)
    if start >= 0:
        depth = 1
        for i, letter in enumerate(message[start + len(BOX) :], start + len(BOX)):
            depth += (letter == "{") - (letter == "}")
            if depth == 0:
                return message[start + len(BOX) : i].strip()[:MAX_ANSWER]
        return None
    marked = _MARK.findall(message)
    return marked[-1].strip().rstrip(".").strip("* ")[:MAX_ANSWER] if marked else None


def plain(text: str) -> str:
    """A text without what does not change its value: spaces, dollar signs, thousands separators, units in \\text{}."""
    text = re.sub(r"\\text\s*\{[^}]*\}|\\[,;!]|[\s$%]|\\%", "", text)
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.replace("\\dfrac", "\\frac").replace("\\left", "").replace("\\right", ""))


def number(text: str) -> Fraction | None:
    """The rational number that a plain text is: 3, -0.5, 3/4, \\frac{3}{4}; None for anything else."""
    text = re.sub(r"^(-?)\\frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    try:
        return Fraction(text) if len(text) <= 50 and re.fullmatch(r"-?[\d.]+(/\d+)?", text) else None
    except (ValueError, ZeroDivisionError):
        return None


def same(answer: str, truth: str) -> bool:
    """Whether two answers are the same number or, failing that, the same text."""
    left, right = plain(answer), plain(truth)
    if left == right:
        return True
    return number(left) is not None and number(left) == number(right)


def grade(solution: str, truth: str) -> float:
    """1.0 for the right final answer, else 0.0. Never raises for what a model says."""
    answer = final_answer(solution)
    if answer is None:
        return 0.0
    if same(answer, truth):
        return 1.0
    two_numbers = number(plain(answer)) is not None and number(plain(truth)) is not None
    if two_numbers or find_spec("math_verify") is None:
        return 0.0
    from verl.utils.reward_score import math_verify  # runs math-verify in processes of its own, which it needs for its time limits

    return float(math_verify.compute_score(f"\\boxed{{{answer}}}", truth, timeout=TIMEOUT_S))
