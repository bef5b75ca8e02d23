"""Teaches a predictor from trajectories that are over: an epoch before, a recorded trace.

Law: each trajectory is told from its first turn to its end, one after the other, as if it had been alone; so later samples of a prompt
find their siblings finished. Cost: about 0.3 ms per turn.
"""

from __future__ import annotations

from collections.abc import Iterable

from verl_heddle.predict.predictor import Predictor
from verl_heddle.predict.tools import names
from verl_heddle.trajectory import Outcome, ToolStart, Trajectory, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart


def recall(predictor: Predictor, trajectories: Iterable[Trajectory], step: int) -> None:
    """Tell `predictor` the trajectories as those of training step `step`."""
    for item in trajectories:
        who = TrajectoryId(item.prompt_id, f"{step}:{item.prompt_id}", item.trial, step)
        context, generated = item.prompt_tokens or 0, 0
        tool_s: float | None = None
        for number, turn in enumerate(item.steps):
            context = turn.ctx_tokens if turn.ctx_tokens is not None else context + (turn.input_tokens or 0)
            predictor.turn_started(TurnStart(who, who.key, number, context, generated, tool_s))
            tokens = turn.output_tokens or 0
            predictor.turn_finished(TurnEnd(who, who.key, "", number, tokens))
            for tool in names(turn.tool):
                predictor.tool_started(ToolStart(who, tool))
            tool_s, context, generated = turn.tool_latency_s, context + tokens, generated + tokens
        truncated = bool(item.meta.get("truncated", False))
        outcome = Outcome(item.meta.get("outcome", Outcome.FINISHED))
        predictor.trajectory_ended(TrajectoryEnd(who, outcome, generated, len(item.steps), truncated))
