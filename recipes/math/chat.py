"""What the tiny policy of the math recipe learns to say.

The reference conversation of a task of difficulty 2, as the model sees it (the system message holds the tool; <|im_start|> and
<|im_end|> left out):

    user       Simplify 3+4-2.
    assistant  <tool_call>{"name": "simplify", "arguments": {"expression": "3+4-2"}}</tool_call>
    user       <tool_response>7-2</tool_response>
    assistant  <tool_call>{"name": "simplify", "arguments": {"expression": "7-2"}}</tool_call>
    user       <tool_response>5</tool_response>
    assistant  The answer is 5.

The one skill is to copy the latest tool response into the next call, until it is a plain number.
"""

import itertools
import random
from pathlib import Path
from typing import Any

from verl.tools.function_tool import load_function_tools_from_path

from recipes.math import tasks
from recipes.tiny.chat import Lesson, Message, tool_call

CORPUS_CONVERSATIONS = 50


def tool_schemas() -> list[Any]:
    """The schemas of tools.py as verl's agent loop puts them into the prompt."""
    tools = load_function_tools_from_path(str(Path(__file__).with_name("tools.py")))
    return [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in tools]


def conversation(expression: str) -> list[Message]:
    """The reference episode for a well-formed `expression` of k operations: 1 user, k + 1 assistant and k tool messages."""
    path = tasks.steps(expression)
    messages: list[Message] = [{"role": "user", "content": tasks.prompt_of(expression)}]
    for before, after in itertools.pairwise(path):
        messages += [tool_call("simplify", expression=before), {"role": "tool", "content": after}]
    return [*messages, {"role": "assistant", "content": f"The answer is {path[-1]}."}]


def lesson() -> Lesson:
    """For `recipes.tiny.model.build`."""
    corpus = [conversation(e) for e in tasks.draw_tasks(CORPUS_CONVERSATIONS, random.Random(0))]
    return Lesson(tool_schemas(), corpus, lambda rng: conversation(tasks.draw_expression(rng.randint(1, tasks.MAX_DIFFICULTY), rng)))
