"""Shaping around any placement policy in the simulator, with the same `Groups` as in a real cluster.

Law: the inner policy places turns. When a trajectory ends, its group selects: rejected trajectories are cancelled (`Cancel`), and those it
may still keep are limited (`StopAt`), as the engines of a real cluster do with `Verdict.limits`. The batch has as many trajectories per
prompt as the plan says; `started` picks them. Rewards and truncation (`meta.truncated`) come from the trajectories.
Cost: that of `Groups`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from verl_heddle.fleet import Replica
from verl_heddle.shape.groups import Groups, Verdict
from verl_heddle.shape.plan import StepPlan
from verl_heddle.shape.select import Fate
from verl_heddle.shape.shaper import Shaper
from verl_heddle.simulate.policy import Action, Cancel, Policy, StopAt
from verl_heddle.trajectory import Decision, Outcome, Trajectory, TrajectoryEnd, TurnEnd, TurnStart


def started(plan: StepPlan, prompts: Sequence[str], pool: Mapping[str, Sequence[Trajectory]]) -> list[Trajectory]:
    """The first samples of each prompt's pool, as many as the plan assigns to it, prompt by prompt as verl submits them.

    Raises:
        ValueError: a pool has fewer samples than planned.
    """
    for prompt, share in zip(prompts, plan.shares, strict=True):
        if len(pool[prompt]) < share.samples:
            raise ValueError(f"prompt {prompt!r}: {share.samples} samples planned, the pool has {len(pool[prompt])}")
    return [item for prompt, share in zip(prompts, plan.shares, strict=True) for item in pool[prompt][: share.samples]]


class Shaped:
    """A `Policy`: `inner` places turns, and `groups` select trajectories by the shaper's plan. `kept`: rows of each closed group by uid."""

    def __init__(self, inner: Policy, shaper: Shaper, plan: StepPlan, prompts: Sequence[str], batch: Sequence[Trajectory], step: int = 0):
        self.inner, self.groups = inner, Groups(shaper.size)
        self.kept: dict[str, list[str]] = defaultdict(list)
        self._trajectories: dict[str, Trajectory] = {}
        keys: dict[str, list[str]] = defaultdict(list)
        for item in batch:
            key = f"{step}:{item.prompt_id}_{item.trial}"
            keys[item.prompt_id].append(key)
            self._trajectories[key] = item
        for prompt, share in zip(prompts, plan.shares, strict=True):
            self.groups.opened(f"{step}:{prompt}", prompt, share, keys[prompt])
        for name in ("tool_started", "admitted", "reprioritised"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def __getattr__(self, name: str) -> Any:
        """Forward the optional methods of the inner policy."""
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined."""
        self.inner.replicas_added(replicas)

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left."""
        self.inner.replicas_removed(names)

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """Forward to the inner policy."""
        return self.inner.turn_started(turn, now)

    def turn_finished(self, turn: TurnEnd, now: float) -> Iterable[Action] | None:
        """Forward to the inner policy."""
        return self.inner.turn_finished(turn, now)

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> list[Action]:
        """Update the group, and cancel or limit trajectories as it decides."""
        actions = list(self.inner.trajectory_ended(end, now) or ())
        key, item = end.trajectory.key, self._trajectories[end.trajectory.key]
        if end.outcome is Outcome.CANCELLED:
            verdict = self.groups.progress(key, end.output_tokens)  # the trajectory reached its limit
            self.groups.stopped(key, end.output_tokens)
            return actions + self._actions(end.trajectory.uid, verdict)
        fate = Fate.USELESS if end.outcome is Outcome.FAILED else Fate.CUT if item.meta.get("truncated") else Fate.VALID
        return actions + self._actions(end.trajectory.uid, self.groups.finished(key, end.output_tokens, fate, item.reward))

    def _actions(self, uid: str, verdict: Verdict) -> list[Action]:
        self.kept[uid] += verdict.keep
        actions: list[Action] = [Cancel(key) for key in verdict.stop]
        return actions + [StopAt(key, tokens) for key, tokens in verdict.limits.items()]
