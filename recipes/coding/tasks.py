"""Programming tasks of graded difficulty, in verl's RL data format. What is asked for is found out by testing.

A task is a function of one integer x given by k rules, k = 1 to 8, each from some point on: x+3 from 0, x*4 from 20. The user tells only
the first; a test suite knows them all, and a failing test names the rule it checks. Writing, testing, reading the failure and fixing k
times is the way through, so an episode of difficulty k has k + 1 assistant turns when all goes well.
Difficulties follow the truncated power law of the math recipe.

The tests that the tool runs (`shown`) and those that the reward runs (`hidden`) check the same rules on different numbers: a program that
only repeats expected outputs earns nothing.

Pure functions of their arguments: same rows and random state, same tasks.
"""

import json
import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

MAX_DIFFICULTY = 8  # as in the math recipe
TAIL_EXPONENT = 1.2  # as in the math recipe: most tasks are short, a few per cent are at the maximum
MAX_VALUE = 99  # enough for about 300 distinct tasks of one rule, the scarce ones
SPAN = (4, 12)  # numbers that a rule holds for: room for two different tests
HIDDEN_PER_RULE = 2
ATTEMPTS_PER_TASK = 200  # consecutive duplicates that mean "no distinct task left", not bad luck

OPERATIONS = "+-*"
PROGRAM_START, PROGRAM_END = "t={", "}\nx=int(input())\nprint(eval('x'+t[max(k for k in t if k<=x)]))"
DATA_SOURCE = "heddle_coding"

Test = dict[str, str]
"""`input`, `output`, and, if the author of the test left one, `note`: what a failure says instead of the two."""


@dataclass(frozen=True)
class Rule:
    """From `start` on, the output is the input `operation` `value`."""

    start: int
    operation: str
    value: int

    def entry(self) -> str:
        """The rule as an entry of the program's table."""
        return f"{self.start}:'{self.operation}{self.value}'"

    def apply(self, number: int) -> int:
        return {"+": number + self.value, "-": number - self.value, "*": number * self.value}[self.operation]


Task = tuple[Rule, ...]


def draw_task(difficulty: int, rng: random.Random) -> Task:
    """`difficulty` rules; the first starts at 0, each ends where the next starts, and no two neighbours are the same function."""
    rules: list[Rule] = []
    start = 0
    for _ in range(difficulty):
        while True:
            rule = Rule(start, rng.choice(OPERATIONS), rng.randint(2, MAX_VALUE))
            if not rules or (rule.operation, rule.value) != (rules[-1].operation, rules[-1].value):
                break
        rules.append(rule)
        start += rng.randint(*SPAN)
    return tuple(rules)


def draw_tasks(rows: int, rng: random.Random, exclude: Collection[Task] = (), hardest: int = MAX_DIFFICULTY) -> list[Task]:
    """`rows` distinct tasks of difficulty 1 to `hardest`, none of them in `exclude`; systematic sampling keeps the tail in small sets.

    Raises ValueError when no distinct task of a drawn difficulty is left (one rule is the first to run out, at about
    600 rows).
    """
    weights = [k**-TAIL_EXPONENT for k in range(1, hardest + 1)]
    taken, drawn = set(exclude), []
    offset = rng.random()
    for row in range(rows):
        place, difficulty = (row + offset) / rows * sum(weights), 1
        while difficulty < hardest and place > sum(weights[:difficulty]):
            difficulty += 1
        for _ in range(ATTEMPTS_PER_TASK):
            task = draw_task(difficulty, rng)
            if task not in taken:
                break
        else:
            raise ValueError(f"no distinct task of difficulty {difficulty} left after {len(drawn)} of {rows} rows: ask for fewer rows")
        taken.add(task)
        drawn.append(task)
    rng.shuffle(drawn)
    return drawn


def program(task: Task, known: int) -> str:
    """The reference program for the first `known` rules, a table of them and a look-up, without a newline at the end.

    Dense on purpose: a tiny policy looks two tokens back, so what differs from rule to rule must stand close together.
    """
    return PROGRAM_START + ",".join(rule.entry() for rule in task[:known]) + PROGRAM_END


def tests(task: Task, seed: str) -> tuple[list[Test], list[Test]]:
    """(shown, hidden): one test per rule for the tool, `HIDDEN_PER_RULE` for the reward, without a number in common.

    No number on which a rule agrees with the one before is used: a program without the rule would pass.
    """
    rng = random.Random(seed)
    shown, hidden = [], []
    for before, rule, after in zip((None, *task), task, (*task[1:], None), strict=False):
        end = after.start if after else rule.start + SPAN[0]
        room = [n for n in range(rule.start, end) if before is None or before.apply(n) != rule.apply(n)]  # at least 3 of 4
        numbers = rng.sample(room, 1 + HIDDEN_PER_RULE)
        made = [{"input": str(n), "output": str(rule.apply(n)), "note": f"Add {rule.entry()}"} for n in numbers]
        shown.append(made[0])
        hidden += made[1:]
    return shown, hidden


def prompt_of(task: Task) -> str:
    """What the user says."""
    return f"Tabulate {task[0].entry()}"


def to_row(task: Task, index: int, split: str) -> dict[str, Any]:
    """One row of verl's RL data, tests included."""
    shown, hidden = tests(task, f"{index} {split}")
    row = make_row(DATA_SOURCE, prompt_of(task), shown, hidden, index, split)
    row["extra_info"]["difficulty"] = len(task)
    return row


def make_row(source: str, question: str, shown: list[Test], hidden: list[Test], index: int, split: str) -> dict[str, Any]:
    """A row of any programming task with standard input and output; tests travel as JSON text, whatever their shape."""
    given = {"create_kwargs": {"tests": json.dumps(shown)}}
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": question}],
        "ability": "code",
        "reward_model": {"style": "rule", "ground_truth": json.dumps(hidden)},
        "extra_info": {"index": index, "split": split, "need_tools_kwargs": True, "tools_kwargs": {"test": given}},
        "agent_name": "tool_agent",  # verl picks the agent loop by this column
    }
