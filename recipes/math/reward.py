"""Reward of the math recipe: 1 for the right final answer, plus at most 0.2 for how the episode went.

verl loads this file by path (`reward.custom_reward_function.path`) and calls `compute_score` with the whole response, tool responses
included, decoded without special tokens. An episode of two turns therefore reads

    <tool_call>{"name": "simplify", "arguments": {"expression": "3+4"}}</tool_call>
    user
    <tool_response>7</tool_response>
    assistant
    The answer is 7.

The answer is read from the last assistant message only: what follows the last tool response.

The shaping is dense because a GRPO group whose members all score the same teaches nothing. It is the sum of
    0.10 * progress    share of the task's running values that the tool responses went through, in order
    0.05 * economy     those values per tool response: failed, repeated and wrong calls lower it
    0.05 * closeness   1 / (1 + |answer - truth|); 0 without an answer
so a wrong episode earns more the later it went wrong, and always less than a right one. The running values of "3+4-2" are 7 and 5; a
tool response has one when it starts with it ("7-2"). Without `extra_info["expression"]` progress and economy are 0.
"""

import itertools
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.math import answers, hub

CORRECT = 1.0
PROGRESS, ECONOMY, CLOSENESS = 0.10, 0.05, 0.05

# 18 digits: far beyond any task, and short enough for int(), which refuses thousands of digits.
_INTEGER = r"-?[0-9]{1,18}(?![0-9])"
_FIRST_INTEGER = re.compile(rf"\s*({_INTEGER})")
_TERM = re.compile(r"[+-]?[0-9]+")
_TOOL_RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
# "The answer is 7.", "the answer is: **7**"; neither 7.5 nor a number of more than 18 digits.
_ANSWER = re.compile(rf"answer is[^0-9\n-]{{0,8}}({_INTEGER})(?!\.[0-9])", re.IGNORECASE)


def final_answer(solution: str) -> int | None:
    """The last "answer is N" of the last assistant message; None without one, or when that message still calls a tool."""
    last_message = solution.rpartition("</tool_response>")[2]
    if "<tool_response>" in last_message or "<tool_call>" in last_message:
        return None
    answers = _ANSWER.findall(last_message)
    return int(answers[-1]) if answers else None


def values_met(responses: list[str], expression: str) -> tuple[int, int]:
    """(running values of `expression` that `responses` start with, in order; running values in all)."""
    values = list(itertools.accumulate(int(term) for term in _TERM.findall(expression)))[1:]
    met = 0
    for response in responses:
        first = _FIRST_INTEGER.match(response)
        if met < len(values) and first and int(first[1]) == values[met]:
            met += 1
    return met, len(values)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any) -> float:
    """Reward of one episode, in [0, 1.2]; at least 1 exactly when the final answer is `ground_truth`. Other data sources: 1 or 0.

    Any `solution_str` is fine. Raises ValueError when `ground_truth` is not an integer in a task of ours.
    """
    if data_source in hub.SETS:
        return answers.grade(solution_str, ground_truth)
    truth = int(ground_truth)
    answer = final_answer(solution_str)
    responses = _TOOL_RESPONSE.findall(solution_str)
    met, total = values_met(responses, (extra_info or {}).get("expression") or "")
    shaping = CLOSENESS / (1 + abs(answer - truth)) if answer is not None else 0.0
    if responses and total:
        shaping += PROGRESS * met / total + ECONOMY * met / len(responses)
    return (CORRECT if answer == truth else 0.0) + min(shaping, PROGRESS + ECONOMY + CLOSENESS)
