"""A replica dies at any moment of a step: every trajectory completes, once, and nothing is left behind in the orchestrator.

The clients do what `verl_plugin.client` does around each turn; the engines are fakes that generate at once or are dead. Real engines die in
tests/faults/test_replica_death.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from random import Random

from drawn import examples
from hypothesis import given
from hypothesis import strategies as st

from verl_heddle.fleet import Replica
from verl_heddle.latency import LatencyModel
from verl_heddle.options import Admission, Options, Place
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.trajectory import Decision, Outcome, Reason, ToolStart, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart

LATENCY = LatencyModel.affine(0.02, 0.01, prefill_per_token_s=1e-5)
REPLICAS, SAMPLES = 3, 4
LIVES = st.lists(st.lists(st.integers(1, 3000), min_size=1, max_size=5), min_size=1, max_size=14)
"""Tokens of each turn of each trajectory."""
KILLS = st.lists(st.tuples(st.integers(0, 150), st.integers(0, REPLICAS - 1)), min_size=1, max_size=2)
"""(number of the event before which it dies, which)."""
OPTIONS = {
    "stock": Options(observe=True),
    "default": Options(),
    "longest": Options.longest(admission=Admission(per_slot=1.0)),
    "planned": Options(place=Place(enable=True), admission=Admission(per_slot=1.0)),
    "planned, longest, none": Options.longest(place=Place(enable=True, transport="none")),
}


@dataclass
class Client:
    """One trajectory and the worker's end of it."""

    who: TrajectoryId
    turns: list[int]
    done: int = 0
    generated: int = 0
    decision: Decision | None = None
    held: bool = False
    over: bool = False

    @property
    def start(self) -> TurnStart:
        return TurnStart(self.who, self.who.key, self.done, 50 + self.generated, self.generated, 1.0 if self.done else None)


class Step:
    """A step of rollouts whose events come in the order that `rng` draws; replicas die behind the orchestrator's back."""

    def __init__(self, options: Options, lives: list[list[int]], rng: Random, slots: int = 2) -> None:
        self.orchestrator, self.rng = Orchestrator(options), rng
        self.fleet = {f"r{number}" for number in range(REPLICAS)}
        self.dead: set[str] = set()
        self.orchestrator.replicas_added(Replica(name, slots=slots, kv_tokens=5000) for name in sorted(self.fleet))
        self.orchestrator.step_times_known(LATENCY)
        names = [TrajectoryId(f"p{number // SAMPLES}", f"u{number // SAMPLES}", number, 1) for number in range(len(lives))]
        self.clients = {who.key: Client(who, turns) for who, turns in zip(names, lives, strict=True)}
        self.warming: dict[str, str] = {}
        self.completed: Counter[tuple[str, int]] = Counter()
        self.ended: Counter[str] = Counter()
        self.clock, self.warmed, self.warms_lost = 0.0, 0, 0
        self.stays: dict[str, str] = {}
        """Where workers believe that trajectories stay; the news of evictions come late."""
        self.out: list[str] = []
        self.told = 0
        self.orchestrator.batch_expected([one.start for one in self.clients.values()], 0.0)

    def kill(self, replica: str) -> None:
        """Nobody is told; the last one is spared."""
        if len(self.fleet - self.dead) > 1:
            self.dead.add(replica)

    def event(self) -> bool:
        """One thing that may happen next; False when all have ended."""
        todo = [one for one in self.clients.values() if not one.over]
        may = [one for one in todo if not one.held]
        warming = sorted(self.warming)
        assert may or not todo, "held turns that nobody lets in"
        if not todo:
            return False
        self.clock += 1
        if warming and self.rng.random() < 0.3:
            self._prewarm_over(self.rng.choice(warming))
        else:
            client = self.rng.choice(may)
            if client.decision is None:
                self._ask(client)
            else:
                self._answered(client, client.decision)
        self._go_on()
        return True

    def _ask(self, client: Client) -> None:
        self.warming.pop(client.who.key, None)
        home = self.stays.get(client.who.key)
        if home in self.fleet:
            self.told += 1
            client.decision = Decision(home, 0, Reason.STICKY)
            return self.orchestrator.turn_begun(client.start, home, self.clock)
        client.decision = self.orchestrator.turn_started(client.start, self.clock)
        assert client.decision.replica in self.fleet or client.decision.held, "placed on a replica that is known to be lost"
        client.held = client.decision.held
        if client.decision.stays and client.who.key not in self.out:
            self.stays[client.who.key] = client.decision.replica
        return None

    def _answered(self, client: Client, decision: Decision) -> None:
        """The engine is done, or the client finds that it is dead; then it says so and asks again with its next event."""
        alive = decision.replica not in self.dead
        tokens, turn, client.decision = client.turns[client.done] if alive else 0, client.done, None
        self.orchestrator.turn_finished(
            TurnEnd(client.who, client.who.key, decision.replica, turn, tokens, alive, tokens * 0.02), self.clock
        )
        if not alive:
            if decision.replica in self.fleet:
                self.fleet.discard(decision.replica)
                self.orchestrator.replicas_removed([decision.replica])
                left = self.orchestrator._transfers
                assert not [one for one in (*left._waiting.values(), *left._under_way.values()) if one.target == decision.replica]
            return
        self.completed[client.who.key, turn] += 1
        client.generated += tokens
        client.done += 1
        if client.done < len(client.turns):
            self.orchestrator.tool_started(ToolStart(client.who, "tool"), self.clock)
            return
        client.over = True
        self.ended[client.who.key] += 1
        self.warming.pop(client.who.key, None)
        self.orchestrator.trajectory_ended(TrajectoryEnd(client.who, Outcome.FINISHED, client.generated, client.done), self.clock)

    def _prewarm_over(self, key: str) -> None:
        """Done, or failed because its replica is dead: the client says the same."""
        self.warms_lost += self.warming.pop(key) in self.dead
        self.warmed += 1
        self.orchestrator.transferred(key, self.clock)

    def _go_on(self) -> None:
        self.orchestrator.tick(self.clock)
        self.out += self.orchestrator.put_out()
        while self.out and self.rng.random() < 0.3:
            self.stays.pop(self.out.pop(0), None)
        for request, replica in self.orchestrator.admitted(self.clock):
            client = self.clients[request.rpartition(":")[0]]
            assert client.held and client.decision is not None, "let in twice"
            client.held, client.decision = False, replace(client.decision, replica=replica)
        for order in self.orchestrator.prewarms(self.clock):
            client = self.clients[order.trajectory]
            assert client.decision is None and not client.over and order.replica in self.fleet
            self.warming[order.trajectory] = order.replica

    def check(self) -> None:
        """Everything done once, nothing left."""
        assert self.ended == Counter(self.clients.keys())
        assert self.completed == Counter((key, turn) for key, one in self.clients.items() for turn in range(len(one.turns)))
        mind = self.orchestrator
        assert mind.inflight == dict.fromkeys(self.fleet, 0)
        assert not mind.turns and not mind.turns.groups and not any(mind.awaits_transfer(key) for key in self.clients)
        assert not mind._transfers._busy and mind.prewarms(self.clock) == []
        assert not mind._placement._live
        if mind.admission is not None:
            assert not len(mind.admission) and not any(gate.inside for gate in mind.admission._gates.values())
        assert mind.residents is None or (not +mind.residents.now and not any(map(mind.residents.used, mind.residents.homes())))
        assert mind.predictor is None or not any(key in mind.predictor for key in self.clients)


@examples(100)
@given(st.sampled_from(sorted(OPTIONS)), LIVES, KILLS, st.integers(0, 10_000))
def test_every_trajectory_completes_once_whenever_a_replica_dies(name, lives, kills, seed):
    step, number = Step(OPTIONS[name], lives, Random(seed)), 0
    while step.event():
        number += 1
        assert not step.told or name == "default"
        for when, which in kills:
            if when == number:
                step.kill(f"r{which}")
        assert number < 5000, "it does not end"
    step.check()


def test_turns_held_for_the_dead_replica_and_prewarms_on_it_are_let_go():
    """The same with what a random draw seldom has: many held turns, and pre-warms on the replica that dies."""
    warmed = lost = held = 0
    for seed in range(40):
        rng = Random(seed)
        lives = [[1 + int(rng.lognormvariate(6, 1.5)) for _ in range(4)] for _ in range(16)]
        step = Step(OPTIONS["planned"], lives, rng, slots=3)
        while step.event():
            held += sum(one.held for one in step.clients.values())
            if step.warming and not step.dead:
                step.kill(next(iter(step.warming.values())))
        step.check()
        warmed, lost = warmed + step.warmed, lost + step.warms_lost
    assert warmed and lost and held, (warmed, lost, held)
    assert step.orchestrator.counts[Reason.PLANNED] >= 16
