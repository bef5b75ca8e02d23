"""What the simulator's tests share: short ways to write trajectories, a policy that does anything, and a slow simulator to compare with."""

from __future__ import annotations

from collections import deque
from random import Random

from hypothesis import strategies as st

from verl_heddle.latency.model import LatencyModel
from verl_heddle.report.rules import RULES
from verl_heddle.simulate import Cancel, EngineOptions, HostTier, Prewarm, simulate
from verl_heddle.simulate.baselines import LptOracle
from verl_heddle.trajectory import Decision, Reason, Trajectory, Turn

FLAT = LatencyModel.affine(0.01, 0.001)
"""Step times that depend on the batch only, no prefill: the staircase formula holds."""

FULL = LatencyModel.affine(
    0.01,
    0.0007,
    3e-7,
    prefill_per_token_s=1.3e-4,
    prefill_per_context_s=1.1e-8,
    prefill_base_s=0.004,
    tps=(1, 2, 4),
    speedup={2: 1.7, 4: 2.6},
)


def trajectory(prompt: str, trial: int, turns, prompt_tokens: int = 10) -> Trajectory:
    """`turns`: (new input, output, tool seconds) each."""
    steps = tuple(Turn(fresh, output, "tool" if tool else None, tool) for fresh, output, tool in turns)
    return Trajectory("test", "test", prompt, trial, prompt_tokens, steps)


def lengths(*tokens: int, prompt_tokens: int = 1) -> list[Trajectory]:
    """One trajectory of one turn for each number."""
    return [trajectory(f"p{i}", 0, [(0, n, 0.0)], prompt_tokens) for i, n in enumerate(tokens)]


@st.composite
def workloads(draw, most: int = 12) -> list[Trajectory]:
    """Groups of small trajectories; tool times are 0, or all different so that no two events coincide but for rounding."""
    tool = st.one_of(st.just(0.0), st.floats(0.001, 2.0))
    result: list[Trajectory] = []
    number = 0
    for group in range(draw(st.integers(1, 4))):
        prompt_tokens = draw(st.integers(1, 70))
        for trial in range(draw(st.integers(1, max(1, most // 4)))):
            turns = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30), tool), min_size=1, max_size=4))
            odd = [(fresh, output, seconds * (1 + 0.0123 * (number + i) ** 0.5)) for i, (fresh, output, seconds) in enumerate(turns)]
            number += len(turns)
            result.append(trajectory(f"p{group}", trial, odd, prompt_tokens))
    return result


class Anything:
    """Places, prioritises, cancels and pre-warms at random; checks the protocol while at it."""

    def __init__(self, seed: int, cancels: bool = False, prewarms: bool = False) -> None:
        self.rng = Random(seed)
        self.cancels, self.prewarming = cancels, prewarms
        self.replicas: list[str] = []
        self.keys: set[str] = set()
        self.open: dict[str, str] = {}
        self.started = self.finished = 0
        self.tokens: dict[str, int] = {}
        self.ended: dict[str, str] = {}
        self.now = 0.0

    def replicas_added(self, replicas) -> None:
        self.replicas += [replica.name for replica in replicas]

    def replicas_removed(self, names) -> None:
        self.replicas = [name for name in self.replicas if name not in set(names)]

    def _tick(self, now: float) -> None:
        assert now >= self.now
        self.now = now

    def turn_started(self, turn, now: float) -> Decision:
        self._tick(now)
        key = turn.trajectory.key
        assert key not in self.open and key not in self.ended
        assert turn.generated_tokens == self.tokens.get(key, 0)
        self.keys.add(key)
        self.started += 1
        self.open[key] = self.rng.choice(self.replicas)
        return Decision(self.open[key], self.rng.randint(-3, 3), Reason.LEAST_INFLIGHT)

    def turn_finished(self, turn, now: float):
        self._tick(now)
        key = turn.trajectory.key
        assert self.open.pop(key) == turn.replica
        self.finished += 1
        self.tokens[key] = self.tokens.get(key, 0) + turn.output_tokens
        actions = []
        if self.prewarming and self.rng.random() < 0.5 and self.replicas:
            actions.append(Prewarm(key, self.rng.choice(self.replicas), self.rng.randint(-3, 3)))
        return actions + self._cancel()

    def trajectory_ended(self, end, now: float):
        self._tick(now)
        key = end.trajectory.key
        assert key not in self.ended and key not in self.open
        assert end.output_tokens == self.tokens.get(key, 0)
        self.ended[key] = end.outcome
        return self._cancel()

    def _cancel(self) -> list[Cancel]:
        if not self.cancels or self.rng.random() > 0.2:
            return []
        return [Cancel(self.rng.choice(sorted(self.keys)))]


def step_by_step(work: list[Trajectory], slots: int, latency, options: EngineOptions, capacity=None, priority=None) -> list[float]:
    """Finish times on one replica of tp 1, one decode step at a time, written without any of the simulator's shortcuts.

    Prompts are not shared; with a capacity the prefix cache must be off (what an unlimited cache does is simple, eviction is tested apart).
    """
    assert not options.share_prompts and (capacity is None or not options.prefix_cache)
    finish = [0.0] * len(work)
    arrivals = sorted((0.0, i) for i in range(len(work)))
    turn = [0] * len(work)
    context = [item.prompt_tokens for item in work]
    cached = [0] * len(work)
    waiting: deque[dict] = deque()
    running: list[dict] = []
    now = 0.0
    count = [0]

    def arrive(index: int, at: float) -> None:
        steps = work[index].steps
        if turn[index] == len(steps):
            finish[index] = at
            return
        context[index] += steps[turn[index]].input_tokens
        rank = priority[index] if priority else 0
        count[0] += 1
        waiting.append(
            {
                "i": index,
                "ctx": context[index],
                "left": steps[turn[index]].output_tokens,
                "rank": rank,
                "at": at,
                "owed": -1,
                "seq": count[0],
            }
        )

    def order() -> None:
        if options.order == "priority":
            ranked = sorted(waiting, key=lambda r: (r["rank"], r["at"], r["seq"]))
            waiting.clear()
            waiting.extend(ranked)

    while arrivals or waiting or running:
        while arrivals and arrivals[0][0] <= now:
            arrive(*reversed(arrivals.pop(0)))
        if not waiting and not running:
            now = arrivals[0][0] if arrivals else now
            continue
        thrown = False
        while capacity is not None and sum(r["ctx"] for r in running) > capacity:
            victim = running[-1] if options.order == "fcfs" else max(running, key=lambda r: (r["rank"], r["at"], r["seq"]))
            running.remove(victim)
            victim["owed"] = -1
            waiting.appendleft(victim)
            thrown = True
        order()
        budget = (options.batch_tokens or 10**9) - sum(r["owed"] == 0 for r in running)
        extra, decodes = 0.0, [r for r in running if r["owed"] == 0]

        def chunk(r: dict, budget: int) -> int:
            take = min(r["owed"], budget)
            r["owed"] -= take
            return take

        for r in running:
            if r["owed"] > 0 and budget > 0:
                take = chunk(r, budget)
                budget -= take
                extra += take * r["rate"]
        while waiting and not thrown and len(running) < slots and budget > 0:
            r = waiting[0]
            if capacity is not None and sum(x["ctx"] for x in running) + r["ctx"] > capacity:
                break
            waiting.popleft()
            hit = min(cached[r["i"]], r["ctx"] - 1) // options.block_tokens * options.block_tokens
            r["owed"] = r["ctx"] - hit
            r["rate"] = (latency.prefill_s(1, r["owed"], hit) - latency.prefill_s(1, 1, hit)) / r["owed"] if r["owed"] > 1 else 0.0
            running.append(r)
            take = chunk(r, budget)
            budget -= take
            extra += take * r["rate"]
        decodes = [r for r in running if r["owed"] == 0]
        mean = sum(r["ctx"] for r in decodes) / len(decodes) if decodes else 0
        now += extra + (latency.decode_s(1, len(decodes), mean) if decodes else latency.prefill_s(1, 1))
        while arrivals and arrivals[0][0] <= now:
            arrive(*reversed(arrivals.pop(0)))
        for r in decodes:
            r["ctx"] += 1
            r["left"] -= 1
        for r in [r for r in running if r["left"] == 0]:
            running.remove(r)
            index = r["i"]
            context[index] = r["ctx"]
            if options.prefix_cache:
                cached[index] = (r["ctx"] - 1) // options.block_tokens * options.block_tokens
            tool = work[index].steps[turn[index]].tool_latency_s
            turn[index] += 1
            if tool:
                arrivals.append((now + tool, index))
                arrivals.sort()
            else:
                arrive(index, now)
    return finish


def peers(work, fleet, latency, seed=0):
    """Results under every rule that is not heddle, by its name."""
    found = {}
    for name, rule in RULES.items():
        if rule.options is None and not (rule.tier and fleet[0].kv_tokens is not None):
            policy = LptOracle(work, seed) if rule.make is None else rule.make(seed)
            engine = EngineOptions(rule.order, tier=HostTier() if rule.tier else None)
            found[name] = simulate(work, fleet, latency, policy, engine=engine)
    return found
