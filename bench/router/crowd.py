"""Trajectories without engines: a fixed number under way for ever, each turn as the client would tell the router of it.

A trajectory that ends is replaced by the next sample of its group, or by the first of a new group; prompts come back every epoch. Numbers
only decide how much the predictor has to do, so they are plain: log-normal turns, a geometric number of them, one tool call after each.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from random import Random

from verl_heddle.trajectory import Outcome, ToolStart, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart

SAMPLES, PROMPTS = 8, 5000
"""Samples of a prompt; prompts of an epoch."""

STEP = 10_000
"""Trajectories of a training step."""

TURNS = 8.0
"""Mean turns of a trajectory."""

TURN_TOKENS, INPUT_TOKENS, PROMPT_TOKENS = 300.0, 200, 800
CAP_TOKENS = 40_000
TOOLS = ("python", "search", "shell")


@dataclass(slots=True)
class Life:
    """One trajectory under way."""

    who: TrajectoryId
    weight: float
    """Its turns are so much longer than others'."""
    turn: int = 0
    context: int = PROMPT_TOKENS
    generated: int = 0
    last: TurnStart | None = None


class Crowd:
    """`live` trajectories, in the order in which they want their next turn.

    Args:
        name: prefix of their ids, so that several crowds share a router.
    """

    def __init__(self, name: str, live: int, seed: int = 0) -> None:
        self._name, self._rng = name, Random(f"{name} {seed}")
        self._made = 0
        self.ended = 0
        self._ready: deque[Life] = deque(self._new() for _ in range(live))

    @property
    def ready(self) -> int:
        """Trajectories that no turn of is open."""
        return len(self._ready)

    @property
    def step(self) -> int:
        """Training step of the newest trajectory."""
        return self._made // STEP

    def start(self) -> Life:
        """The next turn: of who has waited longest; `Life.last` is what to tell.

        Raises:
            IndexError: everybody has an open turn.
        """
        life = self._ready.popleft()
        text = f"problem {life.who.prompt} of the bench, in some words that a prompt may have" if not life.turn else None
        tool_s = 1.0 + self._rng.random() if life.turn else None
        life.last = TurnStart(life.who, life.who.key, life.turn, life.context, life.generated, tool_s, text)
        return life

    def finish(self, life: Life, replica: str) -> tuple[TurnEnd, ToolStart | TrajectoryEnd]:
        """The turn is over: what to tell, and in which order."""
        tokens = 1 + int(self._rng.lognormvariate(0.0, 0.6) * TURN_TOKENS * life.weight)
        end = TurnEnd(life.who, life.who.key, replica, life.turn, tokens, True, tokens * 0.02)
        life.turn += 1
        life.generated += tokens
        life.context += tokens + INPUT_TOKENS
        if self._rng.random() < 1.0 / TURNS or life.generated > CAP_TOKENS:
            self.ended += 1
            self._ready.append(self._new())
            return end, TrajectoryEnd(life.who, Outcome.FINISHED, life.generated, life.turn, life.generated > CAP_TOKENS)
        self._ready.append(life)
        return end, ToolStart(life.who, self._rng.choice(TOOLS))

    def _new(self) -> Life:
        group, sample = divmod(self._made, SAMPLES)
        self._made += 1
        prompt = f"{self._name} {group % PROMPTS}"
        weight = Random(prompt).lognormvariate(0.0, 0.7)
        return Life(TrajectoryId(prompt, f"{self._name}-{group}", sample, self.step), weight)
