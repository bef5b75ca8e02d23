"""Plays trajectories through a predictor in time order, and writes down what everybody would have said at every look.

The clock: `TOKENS_PER_S` for every trajectory, tools as recorded (people and mock tools 0 s). A trajectory takes a slot when one is free; a
sibling counts as finished only from its simulated end on. Nobody sees a trajectory's future but the oracle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np

from verl_heddle.predict.predictor import Predictor
from verl_heddle.predict.tools import names
from verl_heddle.traces import PSEUDO_TOOLS
from verl_heddle.trajectory import Outcome, ToolStart, Trajectory, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart

TOKENS_PER_S = 50.0
"""Decode speed of one request on a busy engine; only the order of ends depends on it."""

LOOKS = (0, 1, 2, 5)
"""Turns after which a trajectory is looked at, if it goes on."""


class Look(NamedTuple):
    """One trajectory after `turns` turns: the truth, what is known, and what each method says remains (tokens)."""

    group: str
    turns: int
    left: float
    upper: float
    prompt_tokens: float
    tokens: float
    says: dict[str, float]


@dataclass
class Notebook:
    """Plain counts that the simple baselines live on; separate from the predictor so that an error there cannot flatter us."""

    history: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    siblings: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    every: list[tuple[float, int]] = field(default_factory=list)

    def ended(self, item: Trajectory, uid: str) -> None:
        self.siblings[uid].append(item.output_tokens)
        self.every.append((item.output_tokens, len(item.steps)))

    def visit_over(self, items: Sequence[Trajectory]) -> None:
        for item in items:
            self.history[item.prompt_id].append((item.output_tokens, len(item.steps)))

    def says(self, item: Trajectory, uid: str, tokens: float, turns: int) -> dict[str, float]:
        pooled = np.array(self.every or [(1000.0, 4)]).mean(axis=0)
        own = np.array(self.history[item.prompt_id]).mean(axis=0) if self.history.get(item.prompt_id) else pooled
        finished = self.siblings.get(uid)
        per_turn = tokens / turns if turns else own[0] / own[1]
        return {
            "history": max(1.0, own[0] - tokens),
            "siblings": max(1.0, (np.mean(finished) if finished else own[0]) - tokens),
            "turn_count": max(1.0, own[1] - turns) * per_turn,
        }


def play(
    predictor: Predictor,
    notebook: Notebook,
    items: Sequence[Trajectory],
    step: int,
    slots: int | None = None,
    group_of: dict[str, str] | None = None,
    cancelled: frozenset[int] = frozenset(),
) -> list[Look]:
    """One training step over `items`, in the given order of submission.

    `group_of` (prompt -> split group) asks for looks; the items with the numbers `cancelled` do not finish, they are stopped.
    """
    looks: list[Look] = []
    slots = len(items) if slots is None else slots
    queue: list[tuple[float, int, int]] = [(0.0, index, 0) for index in range(min(slots, len(items)))]
    heapify(queue)
    next_up = len(queue)
    tokens = [0] * len(items)
    context = [item.prompt_tokens or 0 for item in items]
    while queue:
        now, index, phase = heappop(queue)
        item, turn = items[index], phase // 2
        identity = TrajectoryId(item.prompt_id, f"{step}:{item.prompt_id}", str(item.trial), step)
        if phase % 2 == 0:  # a turn starts
            before = item.steps[turn - 1] if turn else None
            seconds = None if before is None or before.tool in PSEUDO_TOOLS else before.tool_latency_s
            if item.steps[turn].ctx_tokens is not None:
                context[index] = item.steps[turn].ctx_tokens or 0
            else:
                context[index] += item.steps[turn].input_tokens or 0
            predictor.turn_started(TurnStart(identity, identity.key, turn, context[index], tokens[index], seconds))
            if turn == 0 and group_of is not None:
                looks.append(_look(predictor, notebook, item, identity, 0, 0, group_of))
            heappush(queue, (now + (item.steps[turn].output_tokens or 0) / TOKENS_PER_S, index, phase + 1))
            continue
        this = item.steps[turn]
        tokens[index] += this.output_tokens or 0
        context[index] += this.output_tokens or 0
        last = turn + 1 == len(item.steps)
        predictor.turn_finished(TurnEnd(identity, identity.key, "", turn, this.output_tokens or 0))
        for tool in names(this.tool):
            predictor.tool_started(ToolStart(identity, tool))
        if not last:
            if group_of is not None and turn + 1 in LOOKS and item.output_tokens > tokens[index]:
                looks.append(_look(predictor, notebook, item, identity, turn + 1, tokens[index], group_of))
            pause = 0.0 if this.tool in PSEUDO_TOOLS else min(this.tool_latency_s or 0.0, 600.0)
            heappush(queue, (now + pause, index, phase + 1))
            continue
        outcome = Outcome.CANCELLED if index in cancelled else Outcome.FINISHED
        predictor.trajectory_ended(TrajectoryEnd(identity, outcome, tokens[index], turn + 1))
        notebook.ended(item, identity.uid)
        if next_up < len(items):
            heappush(queue, (now, next_up, 0))
            next_up += 1
    notebook.visit_over(items)
    return looks


def _look(
    predictor: Predictor, notebook: Notebook, item: Trajectory, who: TrajectoryId, turns: int, tokens: int, groups: dict[str, str]
) -> Look:
    model, predictor.model = predictor.model, None
    bayes = predictor.predict(who.key)
    predictor.model = model
    full = predictor.predict(who.key)
    assert bayes is not None and full is not None
    left = float(max(1, item.output_tokens - tokens))
    says = notebook.says(item, who.uid, tokens, turns) | {"bayes": bayes.median_tokens, "heddle": full.median_tokens, "oracle": left}
    return Look(groups[item.prompt_id], turns, left, full.upper_tokens, float(item.prompt_tokens or 0), float(tokens), says)
