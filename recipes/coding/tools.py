"""The tools of the coding recipe: `test` writes a program and runs the task's tests on it, `run` runs it on an input of one's own.

verl builds them from tools.yaml (`actor_rollout_ref.rollout.multi_turn.tool_config_path`). They are classes because `test` needs the task's
tests, which come with each row of data (`extra_info.tools_kwargs.test.create_kwargs.tests`, JSON text).
"""

import json
from typing import Any
from uuid import uuid4

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse

from recipes.coding.judge import Judge, shorten
from recipes.coding.tasks import Test

ALL_PASSED = "All tests passed."
MAX_ANSWER = 2000
"""Characters of output that `run` shows: what a model reads with profit."""

JUDGE = Judge()
"""One sandbox per process: tools and agent-loop workers share its places."""


def _text(parameters: dict[str, Any], name: str) -> str:
    """A parameter that must be text. Raises ValueError with a sentence for the model."""
    value = parameters.get(name) if isinstance(parameters, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text")
    return value


class TestTool(BaseTool):
    """`test(code)`."""

    __test__ = False  # not a pytest class

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema) -> None:
        super().__init__(config, tool_schema)
        self._tests: dict[str, list[Test]] = {}

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, ToolResponse]:
        """Take the task's tests. Raises KeyError or ValueError when the row has none: a mistake in the data."""
        instance = instance_id or uuid4().hex
        self._tests[instance] = json.loads(kwargs["create_kwargs"]["tests"])
        return instance, ToolResponse()

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> tuple[ToolResponse, float, dict[str, Any]]:
        """Judge the program on the tests that were taken; the answer says how the first failing one failed."""
        try:
            code = _text(parameters, "code")
        except ValueError as error:
            return ToolResponse(text=f"error: {error}"), 0.0, {}
        verdict = await JUDGE.ajudge(code, self._tests[instance_id])
        text = f"{verdict.passed} of {verdict.total} passed. {verdict.why}" if verdict.why else ALL_PASSED
        return ToolResponse(text=text), 0.0, {"passed": verdict.passed, "total": verdict.total}

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self._tests.pop(instance_id, None)


class RunTool(BaseTool):
    """`run(code, stdin)`."""

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> tuple[ToolResponse, float, dict[str, Any]]:
        """Run the program once; the answer is what it printed, and how it ended if not well."""
        try:
            code, given = _text(parameters, "code"), _text({"stdin": "", **parameters}, "stdin")
        except (ValueError, TypeError) as error:
            return ToolResponse(text=f"error: {error}"), 0.0, {}
        result = await JUDGE.sandbox.arun({"main.py": code}, stdin=given)
        text = shorten(result.stdout, MAX_ANSWER)
        if not result.ok:
            text = f"{text}\n{result.explain()}".strip()
        return ToolResponse(text=text or "(no output)"), 0.0, {}
