"""Short words for telling a predictor what happens; shared by the tests of this folder."""

from __future__ import annotations

import numpy as np

from verl_heddle.predict.predictor import Predictor
from verl_heddle.predict.quantities import Estimate
from verl_heddle.trajectory import Outcome, ToolStart, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart

FINISHED = Outcome.FINISHED


class Run:
    """A predictor and the trajectories told to it, by a name of the test's choice."""

    def __init__(self, cap_tokens: int | None = None) -> None:
        self.predictor = Predictor(cap_tokens)
        self.ids: dict[str, TrajectoryId] = {}
        self.tokens: dict[str, list[int]] = {}

    def key(self, name: str) -> str:
        return self.ids[name].key

    def start(
        self, name: str, prompt: str | None = None, step: int = 0, prompt_tokens: int = 100, validate: bool = False, text: str | None = None
    ) -> None:
        prompt = prompt or name
        identity = self.ids[name] = TrajectoryId(prompt, f"{step}:{prompt}", name, step, validate)
        self.tokens[name] = []
        self.predictor.turn_started(TurnStart(identity, identity.key, 0, prompt_tokens, 0, text=text))

    def turn(self, name: str, tokens: int, called: tuple[str, ...] = (), tool_s: float | None = None, completed: bool = True) -> None:
        done = self.tokens[name]
        if done:
            start = TurnStart(self.ids[name], self.ids[name].key, len(done), 100 + sum(done), sum(done), tool_s)
            self.predictor.turn_started(start)
        self.predictor.turn_finished(TurnEnd(self.ids[name], self.ids[name].key, "r", len(done), tokens, completed))
        for tool in called:
            self.predictor.tool_started(ToolStart(self.ids[name], tool))
        if completed:
            done.append(tokens)

    def end(self, name: str, outcome: Outcome = FINISHED, truncated: bool = False) -> None:
        identity = self.ids.get(name) or TrajectoryId(name, name, name, 0)
        done = self.tokens.get(name, [])
        self.predictor.trajectory_ended(TrajectoryEnd(identity, outcome, sum(done), len(done), truncated))

    def whole(
        self, prompt: str, name: str, turns: list[int], tools: tuple[str, ...] = ("bash",), outcome: Outcome = FINISHED, **more
    ) -> None:
        self.start(name, prompt=prompt, **more)
        for tokens in turns:
            self.turn(name, tokens, tools, tool_s=0.5)
        self.end(name, outcome)

    def predict(self, name: str) -> Estimate:
        estimate = self.predictor.predict(self.key(name))
        assert estimate is not None
        return estimate


def rollouts(prompts: int, samples: int, seed: int) -> Run:
    """A run over log-normal lengths: every prompt once, in steps of ten prompts."""
    rng = np.random.default_rng(seed)
    run = Run()
    for number in range(prompts):
        usual = rng.normal(6, 1)
        for sample in range(samples):
            turns = np.exp(rng.normal(usual, 0.5, size=int(rng.integers(1, 8)))).astype(int) + 1
            run.whole(f"p{number}", f"p{number}-{sample}", turns.tolist(), step=number // 10)
    return run
