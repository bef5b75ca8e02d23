"""Reward of the coding recipe: the share of hidden tests that the last program passes, and 0.2 more when it passes all.

verl loads this file by path (`reward.custom_reward_function.path`) and calls `compute_score` with the whole response, tool responses
included, decoded without special tokens. The program is the last ```python block of the last message if there is one, else the `code` of
the last tool call. The hidden tests check what the tool's tests check, on other inputs; they run in the same kind of sandbox.

A program that a sandbox could not run is worth 0, and said so on the console: a broken sandbox must not look like a bad policy.
"""

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.coding.judge import Judge

ALL = 0.2
SOLVED = 1.0 + ALL
"""The reward of a right program."""

JUDGE = Judge()
log = logging.getLogger(__name__)

_BLOCK = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def last_program(solution: str) -> str | None:
    """The program an episode ended with; None if it never wrote one."""
    blocks = _BLOCK.findall(solution.rpartition("</tool_response>")[2])
    if blocks:
        return blocks[-1]
    for call in reversed(_CALL.findall(solution)):
        try:
            code = json.loads(call)["arguments"]["code"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(code, str):
            return code
    return None


async def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> float:
    """Reward of one episode, in [0, 1.2]; a coroutine, so that verl judges episodes side by side.

    Raises ValueError when `ground_truth` is not a JSON list of tests.
    """
    code, tests = last_program(solution_str), json.loads(ground_truth)
    if not code or not tests:
        return 0.0
    verdict = await JUDGE.ajudge(code, tests)
    if not verdict.judged:
        log.error("a program could not be judged: %s", verdict.why)
    return verdict.passed / verdict.total + (ALL if verdict.passed == verdict.total else 0.0)
