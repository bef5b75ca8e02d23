"""Arithmetic tasks of graded difficulty, in verl's RL data format.

A task is a chain of + and - on non-negative integers, such as "3+4-2+5", worked off from left to right; its difficulty is its number
of operations, 1 to 8. Difficulty k has probability proportional to k ** -1.2, a truncated power law:

    k             1     2     3     4     5     6     7     8
    probability   0.43  0.19  0.11  0.08  0.06  0.05  0.04  0.04

An episode of difficulty k has k + 1 assistant turns when all goes well, so turns have median 3 and maximum 9. Tokens spread more,
because a call repeats what is left of the expression. Difficulties are drawn by systematic sampling (one draw per 1/rows of
probability), which keeps the tail in small sets: each difficulty appears within one row of rows * probability.

Pure functions of their arguments: same rows and random state, same tasks.
"""

import random
import re
from collections.abc import Collection
from typing import Any

MAX_DIFFICULTY = 8
TAIL_EXPONENT = 1.2  # median 2 and about 4 % at the maximum: a tail of a few rows in a set of 64
MAX_OPERAND = 50  # large enough for about 8000 distinct tasks, of which the shortest are the scarce ones
MAX_VALUE = 99  # bound on every intermediate result, hence on the tokens of an episode
ATTEMPTS_PER_TASK = 200  # consecutive duplicates that mean "no distinct task left", not bad luck

DATA_SOURCE = "heddle_math"


def difficulty_probabilities(hardest: int = MAX_DIFFICULTY) -> list[float]:
    """Probability of difficulty 1, 2, ..., `hardest`; sums to 1."""
    weights = [k**-TAIL_EXPONENT for k in range(1, hardest + 1)]
    return [w / sum(weights) for w in weights]


def draw_difficulties(rows: int, rng: random.Random, hardest: int = MAX_DIFFICULTY) -> list[int]:
    """`rows` difficulties in random order, by systematic sampling from `difficulty_probabilities`."""
    if rows == 0:
        return []
    probabilities = difficulty_probabilities(hardest)
    offset = rng.random()
    drawn, difficulty, cumulative = [], 1, probabilities[0]
    for row in range(rows):
        while difficulty < hardest and (row + offset) / rows > cumulative:
            cumulative += probabilities[difficulty]
            difficulty += 1
        drawn.append(difficulty)
    rng.shuffle(drawn)
    return drawn


def draw_expression(difficulty: int, rng: random.Random) -> str:
    """A chain of `difficulty` operations whose operands are 1..MAX_OPERAND and whose intermediate results are 0..MAX_VALUE."""
    value = rng.randint(1, MAX_OPERAND)
    text = str(value)
    for _ in range(difficulty):
        room = {"+": min(MAX_OPERAND, MAX_VALUE - value), "-": min(MAX_OPERAND, value)}
        sign = rng.choice([s for s in "+-" if room[s] >= 1])
        operand = rng.randint(1, room[sign])
        value += operand if sign == "+" else -operand
        text += f"{sign}{operand}"
    return text


def steps(expression: str) -> list[str]:
    """What is left of a well-formed `expression` after 0, 1, ..., all operations: "3+4-2" -> ["3+4-2", "7-2", "5"]."""
    terms = re.findall(r"[+-]?[0-9]+", expression)
    value, left = int(terms[0]), [expression]
    for done, term in enumerate(terms[1:], start=2):
        value += int(term)
        left.append(str(value) + "".join(terms[done:]))
    return left


def draw_tasks(rows: int, rng: random.Random, exclude: Collection[str] = (), hardest: int = MAX_DIFFICULTY) -> list[str]:
    """`rows` distinct expressions of difficulty 1 to `hardest`, none of them in `exclude`.

    Raises ValueError when no distinct expression of a drawn difficulty is left (difficulty 1 is the first to run out, at about
    8000 rows).
    """
    taken = set(exclude)
    tasks: list[str] = []
    for difficulty in draw_difficulties(rows, rng, hardest):
        for _ in range(ATTEMPTS_PER_TASK):
            expression = draw_expression(difficulty, rng)
            if expression not in taken:
                break
        else:
            raise ValueError(f"no distinct task of difficulty {difficulty} left after {len(tasks)} of {rows} rows: ask for fewer rows")
        taken.add(expression)
        tasks.append(expression)
    return tasks


def prompt_of(expression: str) -> str:
    """What the user says."""
    return f"Simplify {expression}."


def to_row(expression: str, index: int, split: str) -> dict[str, Any]:
    """One row of verl's RL data: `prompt` is a chat, `reward_model.ground_truth` the value of the expression as text."""
    path = steps(expression)
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": prompt_of(expression)}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": path[-1]},
        "extra_info": {"index": index, "split": split, "difficulty": len(path) - 1, "expression": expression},
        "agent_name": "tool_agent",  # verl picks the agent loop by this column
    }
