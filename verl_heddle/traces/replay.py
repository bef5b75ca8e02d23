"""Prepare recorded or public trajectories as simulator input.

A recorded trajectory holds token counts, tool times, and the timings of one particular cluster. A simulator needs the first two to be
complete and must not inherit the third: `replayable` ensures both. `episodes` first cuts a long conversation with a person into pieces
that resemble RL episodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median

from verl_heddle.traces.schema import PSEUDO_TOOLS, TraceError
from verl_heddle.trajectory import Trajectory, Turn

ASSUMED_PROMPT_TOKENS = 1024
"""Prompt length for sources without one: between the terminal (724) and the bare-agent (2,155) medians of the public traces."""

MAX_TOOL_S = 600.0
"""Cap on one tool call. Longer gaps in the public traces are absent people, not tools."""


def replayable(
    trajectory: Trajectory,
    *,
    prompt_tokens: int = ASSUMED_PROMPT_TOKENS,
    tool_time: Callable[[str], float] | None = None,
    max_tool_s: float = MAX_TOOL_S,
) -> Trajectory:
    """Return `trajectory` with every number a simulator needs, and without the timings of the cluster it ran on.

    In the result `prompt_tokens` and each turn's `input_tokens`, `output_tokens` (at least 1), `ctx_tokens` and `tool_latency_s` are
    known. All other numbers of a turn are removed, including `gen_s`, which the cost model supplies. Rules, in this order:

    1. Pseudo-tools (`PSEUDO_TOOLS`) become no tool and 0 s: a person's pause costs the cluster nothing, unlike a tool.
    2. Tool time: as recorded, at most `max_tool_s`. If unknown: `tool_time(tool)`, or 0 without that function (mock tools). Without a
       tool: as recorded, or 0.
    3. Output, if unknown: the median of the trajectory's known turns. A turn of 0 tokens generates 1: an engine emits at least the
       end token.
    4. Prompt, if unknown: the first turn's context, else the argument `prompt_tokens`. Prompt and contexts are at least 1.
    5. Context: as recorded, since reasoning may have been dropped from it. If unknown: the previous turn's context and output plus the
       new input, starting from the prompt.
    6. New input, if unknown: the growth of the context beyond the last output, at least 0; 0 if the context is unknown too.

    `meta.assumed` lists the guessed fields: `prompt_tokens`, `output_tokens`, `input_tokens`, `tool_latency_s`. The recorded part counts
    as complete: exclude trajectories whose `meta.outcome` is `cancelled` if their real length matters.

    Raises:
        TraceError: there are turns, but none has a known number of output tokens.
    """
    known = [turn.output_tokens for turn in trajectory.steps if turn.output_tokens is not None]
    if trajectory.steps and not known:
        name = f"{trajectory.prompt_id} trial {trajectory.trial}"
        raise TraceError(f"no turn of {name} has a known length", allowed="at least one number", field="output_tokens")
    usual = round(median(known)) if known else 0
    assumed: set[str] = set()
    prompt = trajectory.prompt_tokens
    if prompt is None and trajectory.steps:
        prompt = trajectory.steps[0].ctx_tokens
    if prompt is None:
        prompt = prompt_tokens
        assumed.add("prompt_tokens")
    prompt = max(1, prompt)

    turns: list[Turn] = []
    before = prompt  # context plus output of the previous turn: the next context minus its new input
    for index, turn in enumerate(trajectory.steps):
        output, fresh, context = turn.output_tokens, turn.input_tokens, turn.ctx_tokens
        if output is None:
            output = usual
            assumed.add("output_tokens")
        if fresh is None:
            fresh = 0 if index == 0 or context is None else max(0, context - before)
            if index and context is None:
                assumed.add("input_tokens")
        if context is None:
            context = before + fresh
        context = max(1, context)
        tool = None if turn.tool in PSEUDO_TOOLS else turn.tool
        seconds = 0.0 if turn.tool in PSEUDO_TOOLS else turn.tool_latency_s
        if seconds is None and tool is not None:
            seconds = tool_time(tool) if tool_time else 0.0
            assumed.add("tool_latency_s")
        output = max(1, output)
        seconds = min(seconds or 0.0, max_tool_s)
        turns.append(Turn(fresh, output, tool, seconds, ctx_tokens=context, ctx_reset=turn.ctx_reset, output_est=turn.output_est))
        before = context + output
    meta = {**trajectory.meta, "assumed": sorted(assumed)} if assumed else dict(trajectory.meta)
    return replace(trajectory, prompt_tokens=prompt, steps=tuple(turns), meta=meta)


def episodes(trajectory: Trajectory, tool: str = "human") -> list[Trajectory]:
    """Cut `trajectory` after every turn that led to `tool`: an episode is the agent's work between two messages of a person.

    Episode k has `prompt_id` `<prompt_id>#<k>`, its first turn's context as prompt (None if not recorded) and no new input in its first
    turn; the call of `tool` itself is removed. A trajectory without such a turn becomes a single episode, numbered 0.
    """
    runs: list[list[Turn]] = [[]]
    for turn in trajectory.steps:
        runs[-1].append(replace(turn, tool=None, tool_latency_s=None) if turn.tool == tool else turn)
        if turn.tool == tool:
            runs.append([])
    pieces = [run for run in runs if run]
    result = []
    for index, run in enumerate(pieces):
        first = run[0]
        prompt = trajectory.prompt_tokens if index == 0 else first.ctx_tokens
        steps = (first if index == 0 else replace(first, input_tokens=0, ctx_reset=False), *run[1:])
        result.append(replace(trajectory, prompt_id=f"{trajectory.prompt_id}#{index}", prompt_tokens=prompt, steps=steps))
    return result
