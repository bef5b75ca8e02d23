"""An agent loop of verl's that plays trajectories of given lengths: any model says as much as is asked, a tool is a sleep.

Row and sample name the trajectory; which it is stands in the trace file that `loops.yaml` names (`bench/modes/real.py` writes both).
"""

from __future__ import annotations

import asyncio
import time
from functools import cache
from random import Random
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput

from verl_heddle.traces import read
from verl_heddle.trajectory import Trajectory

FIRST_WORD, WORDS = 16, 200
"""Token ids that are no special tokens in any tokenizer of the recipes."""


def words(key: str, number: int) -> list[int]:
    """Token ids that depend on the key only."""
    return Random(key).choices(range(FIRST_WORD, WORDS), k=number)


@cache
def trajectories(path: str) -> dict[tuple[str, int], Trajectory]:
    """By prompt and sample."""
    return {(item.prompt_id, int(item.trial)): item for item in read(path)}


class ReplayLoop(AgentLoopBase):
    """`path`: of the trace file."""

    def __init__(self, *args: Any, path: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._path = path

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """One trajectory, turn by turn."""
        prompt, sample = kwargs["raw_prompt"][0]["content"], int(kwargs["session_id"])
        item = trajectories(self._path)[prompt, sample]
        context = words(prompt, item.prompt_tokens or 1)
        prompt_ids, response, mask, logprobs = list(context), [], [], []
        extra: dict[str, Any] = {}
        request, spoke_s, tool_s = uuid4().hex, 0.0, 0.0
        for index, turn in enumerate(item.steps):
            heard = words(f"{prompt} {sample} {index}", turn.input_tokens or 0)
            began = time.monotonic()
            asked = {**sampling_params, "ignore_eos": True, "max_tokens": turn.output_tokens or 1}
            context += heard
            output = await self.server_manager.generate(request_id=request, prompt_ids=list(context), sampling_params=asked)
            spoke_s += time.monotonic() - began
            said = list(output.token_ids)
            context += said
            response += heard + said
            mask += [0] * len(heard) + [1] * len(said)
            logprobs += [0.0] * len(heard) + list(output.log_probs or [])
            extra = {**output.extra_fields, **{key: extra[key] for key in ("min_global_steps",) if key in extra}}
            if turn.tool_latency_s:
                await asyncio.sleep(turn.tool_latency_s)
                tool_s += turn.tool_latency_s
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=response,
            response_mask=mask,
            response_logprobs=logprobs if len(logprobs) == len(response) else None,
            num_turns=2 * len(item.steps),
            metrics={"generate_sequences": spoke_s, "tool_calls": tool_s},
            extra_fields={**extra, "turn_scores": [], "tool_rewards": []},
        )


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None) -> float:
    """Not all the same, so that there is something to train on; what it is does not matter."""
    return float(len(solution_str) % 2)
