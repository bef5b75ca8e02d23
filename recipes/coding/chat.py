"""What the tiny policy of the coding recipe learns to say.

The reference conversation of a task of difficulty 2, as the model sees it (the system message holds the tools; <|im_start|> and <|im_end|>
left out; \\n is an escaped newline in JSON):

    user       Tabulate 0:'+3'
    assistant  <tool_call>{"name": "test", "arguments": {"code": "t={0:'+3'}\nx=int(..."}}</tool_call>
    user       <tool_response>1 of 2 passed. Add 8:'*4'</tool_response>
    assistant  <tool_call>{"name": "test", "arguments": {"code": "t={0:'+3',8:'*4'}\nx=int(..."}}</tool_call>
    user       <tool_response>All tests passed.</tool_response>
    assistant  Done.

The skill is to copy one's last program and to add what the failure asks for.
"""

import json
import random
from pathlib import Path
from typing import Any

import yaml

from recipes.coding import tasks
from recipes.coding.judge import Verdict
from recipes.tiny.chat import Lesson, Message, tool_call

CORPUS_CONVERSATIONS = 60
TRAINING = {"steps": 700, "batch_tokens": 1500}
"""Longer than for arithmetic: copying an entry of a table is learned later. It stops while long tasks still fail often."""


def tool_schemas() -> list[Any]:
    """The schemas of tools.yaml as verl's agent loop puts them into the prompt."""
    return [tool["tool_schema"] for tool in yaml.safe_load(Path(__file__).with_name("tools.yaml").read_text())["tools"]]


def verdict_of(task: tasks.Task, known: int, shown: list[tasks.Test]) -> Verdict:
    """What the judge says of the reference program for the first `known` rules, without running it (a test compares the two)."""
    if known == len(task):
        return Verdict(known, known, "")
    right = sum(task[min(i, known - 1)].apply(int(test["input"])) == int(test["output"]) for i, test in enumerate(shown))
    return Verdict(right, len(shown), shown[known]["note"])  # the first one that can fail, and it does: see tasks.tests


def conversation(task: tasks.Task, seed: str = "") -> list[Message]:
    """The reference episode for k rules: 1 user, k + 1 assistant and k tool messages."""
    shown, _ = tasks.tests(task, seed)
    messages: list[Message] = [{"role": "user", "content": tasks.prompt_of(task)}]
    for known in range(1, len(task) + 1):
        verdict = verdict_of(task, known, shown)
        messages.append(tool_call("test", code=tasks.program(task, known)))
        text = f"{verdict.passed} of {verdict.total} passed. {verdict.why}" if verdict.why else "All tests passed."
        messages.append({"role": "tool", "content": text})
    return [*messages, {"role": "assistant", "content": "Done."}]


def lesson() -> Lesson:
    """For `recipes.tiny.model.build`."""

    def example(rng: random.Random) -> list[Message]:
        return conversation(tasks.draw_task(rng.randint(1, tasks.MAX_DIFFICULTY), rng), str(rng.random()))

    rng = random.Random(0)
    inside = json.dumps(tasks.PROGRAM_END)[1:-1]  # as it stands in the JSON of a call
    phrases = ['{"name": "test", "arguments": {"code": "' + tasks.PROGRAM_START, inside + '"}}']
    return Lesson(tool_schemas(), [example(rng) for _ in range(CORPUS_CONVERSATIONS)], example, phrases, TRAINING)
