"""The tool of the math recipe: `simplify`, one step of arithmetic per call.

One step per call is the point: a task of k operations takes k calls and k + 1 assistant turns, so the length of an episode is set
by its task, and the spread of task difficulty becomes the spread of trajectory lengths that a scheduler has to cope with.

verl loads this file by path (`actor_rollout_ref.rollout.multi_turn.function_tool_path`) and derives the tool schema in the
prompt from the type hints and the docstring of `simplify`. Keep that docstring short: every prompt carries it.

Environment: `HEDDLE_TOOL_DELAY_S` (seconds, default 0) makes every call take at least that long, to stand in for a slow tool. The
wait is `asyncio.sleep`: verl awaits coroutine tools on the event loop of the agent-loop worker, and a blocking wait there would stop
every other trajectory of that worker. Read once at import; a value that is not a number >= 0 raises ValueError there.
"""

import asyncio
import math
import os
import re

from verl.tools.function_tool import function_tool

# Longer input is refused: a policy that loops can send thousands of digits, and Python's int() refuses more than 4300 of them.
MAX_CHARS = 200

_EXPRESSION = re.compile(r"\s*-?[0-9]+(?:\s*[+-]\s*[0-9]+)*\s*")
_FIRST_OPERATION = re.compile(r"(-?[0-9]+)([+-])([0-9]+)")


def delay_seconds(setting: str) -> float:
    """Parse `HEDDLE_TOOL_DELAY_S`, in seconds. Raises ValueError unless it is a finite number >= 0."""
    seconds = float(setting)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"HEDDLE_TOOL_DELAY_S must be a number of seconds >= 0, got {setting!r}")
    return seconds


DELAY_S = delay_seconds(os.environ.get("HEDDLE_TOOL_DELAY_S", "0"))


def first_step(expression: object) -> str:
    """Evaluate the first operation: "3+4-2+5" -> "7-2+5"; a lone integer comes back as it is ("07" as "7").

    Spaces around numbers and signs are dropped. Intermediate results may be negative: "3-5+4" -> "-2+4" -> "2". Anything else than
    a chain of integers under + and - returns a text that starts with "error:"; nothing raises.
    """
    if not isinstance(expression, str):
        return f"error: expression must be text, got {type(expression).__name__}"
    if len(expression) > MAX_CHARS:
        return f"error: expression longer than {MAX_CHARS} characters"
    if not _EXPRESSION.fullmatch(expression):
        return "error: expected integers joined by + and -"
    compact = "".join(expression.split())
    operation = _FIRST_OPERATION.match(compact)
    if operation is None:
        return str(int(compact))
    left, sign, right = operation.groups()
    value = int(left) + int(right) if sign == "+" else int(left) - int(right)
    return f"{value}{compact[operation.end() :]}"


@function_tool
async def simplify(expression: str) -> str:
    """Do the first operation of a sum and return the shorter sum.

    Args:
        expression: integers joined by + and -, such as 3+4-2
    """
    if DELAY_S:
        await asyncio.sleep(DELAY_S)
    return first_step(expression)
