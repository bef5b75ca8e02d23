"""UniBoost: order turns by arrival time less a boost, which is larger the fewer tokens a turn has to prefill.

Law: inside the replica, turns wait in order of arrival - b(w), with b(w) = (1/gamma) * ln(1 / (1 - exp(-gamma * w))) and w = alpha *
uncached tokens. The boost is bounded, so no turn starves. A large gamma gives first come, first served; a small one shortest first. No
prediction. Placement is verl's own.

Source: arXiv 2606.18431 (ICML 2026) and the author's SGLang pull request #35637 (open), whose defaults give gamma and alpha. Its adaptive
gamma is off by default and not implemented here, nor is the paper's cache-aware preemption, which the pull request lacks.
Assumed: SGLang re-sorts before each prefill, while our order is set when the turn arrives. Uncached tokens are estimated: a replica keeps
whole contexts, evicts the least recently used first and running ones never; prompts computed by siblings are ignored. If KV runs out, vLLM
preempts the last in the order, while SGLang has its own rule. Needs `EngineOptions(order="priority")`. Cost: O(1) per turn.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import exp, inf, log1p

from verl_heddle.fleet import Replica
from verl_heddle.simulate.baselines.stock import Stock
from verl_heddle.trajectory import Decision, TurnEnd, TurnStart

GAMMA_PER_S = 10.0
"""`SGLANG_UNIBOOST_GAMMA`."""

ALPHA_S_PER_TOKEN = 64e-6
"""`SGLANG_UNIBOOST_ALPHA_US_PER_TOKEN`: about the prefill time of a token."""

PER_S = 1e6
"""Priority units per second: priorities are integers, in microseconds."""


def boost_s(uncached_tokens: int, gamma_per_s: float = GAMMA_PER_S) -> float:
    """Seconds by which a turn moves ahead of its arrival."""
    return -log1p(-exp(-gamma_per_s * ALPHA_S_PER_TOKEN * max(1, uncached_tokens))) / gamma_per_s


@dataclass(slots=True)
class _Cache:
    capacity: float
    running: dict[str, int] = field(default_factory=dict)
    idle: OrderedDict[str, int] = field(default_factory=OrderedDict)
    tokens: int = 0

    def evict(self) -> None:
        while self.tokens > self.capacity and self.idle:
            self.tokens -= self.idle.popitem(last=False)[1]


class UniBoost(Stock):
    """UniBoost order, with verl's placement."""

    def __init__(self, seed: int = 0, gamma_per_s: float = GAMMA_PER_S) -> None:
        super().__init__(seed)
        self._gamma_per_s = gamma_per_s
        self._caches: dict[str, _Cache] = {}

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined, empty."""
        replicas = list(replicas)
        super().replicas_added(replicas)
        self._caches |= {replica.name: _Cache(inf if replica.kv_tokens is None else replica.kv_tokens) for replica in replicas}

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """verl's placement, with the boosted arrival time as priority."""
        decision = super().turn_started(turn, now)
        cache = self._caches[decision.replica]
        cached = min(cache.idle.pop(turn.conversation, 0), turn.context_tokens)
        cache.running[turn.conversation] = turn.context_tokens
        cache.tokens += turn.context_tokens - cached
        cache.evict()
        return replace(decision, priority=round(PER_S * (now - boost_s(turn.context_tokens - cached, self._gamma_per_s))))

    def turn_finished(self, turn: TurnEnd, now: float) -> None:
        """Mark the conversation's context as most recently used."""
        super().turn_finished(turn, now)
        cache = self._caches[turn.replica]
        context = cache.running.pop(turn.conversation, None)
        if context is not None:
            cache.idle[turn.conversation] = context + turn.output_tokens
            cache.tokens += turn.output_tokens
            cache.evict()
