"""A peer's law of admission in the plugin's own router, in the place of resident sets: the same path, another law."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

from verl_heddle.fleet import Replica
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.simulate.baselines import ThunderAgent
from verl_heddle.simulate.baselines.programs import Programs
from verl_heddle.trajectory import TrajectoryEnd, TurnEnd, TurnStart
from verl_heddle.verl_plugin.router import HeddleRouter

PERIOD_S = 0.25
"""ThunderAgent's check, every 5 s on GPUs: the CPU engines' turns are some 20 times shorter."""


def thunder_agent(seed: int) -> ThunderAgent:
    """The law, on the engines' scale."""
    law = ThunderAgent(seed)
    law.period_s = PERIOD_S
    return law


class AsResidents:
    """Programs as the orchestrator asks resident sets; see `schedule.residents.Residents` for each method.

    The router's timer runs while turns are held; a law that works by the clock has it looked at with every turn as well.
    """

    def __init__(self, law: Programs) -> None:
        self._law = law
        self.counts: Counter[str] = Counter()

    def add(self, replica: Replica, hold_s: float) -> None:
        self._law.replicas_added([replica])

    def remove(self, name: str) -> None:
        self._law.replicas_removed([name])

    def hold(self, name: str, hold_s: float) -> None: ...

    def forget(self) -> int:
        return 0

    def turn_started(self, turn: TurnStart, now: float) -> str | None:
        self._law.tick(now)
        return self._law.turn_started(turn, now).replica or None

    def turn_finished(self, turn: TurnEnd, now: float) -> None:
        self._law.turn_finished(turn, now)
        self._law.tick(now)

    def trajectory_ended(self, key: str, now: float) -> None:
        self._law.trajectory_ended(cast(TrajectoryEnd, SimpleNamespace(trajectory=SimpleNamespace(key=key))), now)

    def home_of(self, key: str) -> str | None:
        program = self._law.live.get(key)
        return None if program is None else program.home

    def stays(self, key: str) -> bool:
        return False  # its turns are asked for, every one

    def put_out(self) -> list[str]:
        return []

    def tick(self, now: float) -> None:
        self._law.tick(now)

    def due_s(self) -> float:
        return self._law.due_s(0.0)

    def admitted(self) -> list[tuple[str, str]]:
        return self._law.admitted(0.0)

    @property
    def waits(self) -> bool:
        return bool(self._law.live)

    def metrics(self) -> dict[str, int]:
        return {}


def under(law: Programs, options: Options) -> Orchestrator:
    """The orchestrator, but that this law admits."""
    made = Orchestrator(options)
    made.residents = cast(Any, AsResidents(law))
    return made


class PeerRouter(HeddleRouter):
    """Takes ThunderAgent's law where the options ask for no order, as its engines have none; otherwise heddle's own router."""

    def configure(self, options: Options, deterministic: bool, fleet: dict[str, tuple[Replica, Any]], *more: Any) -> None:
        super().configure(options, deterministic, fleet, *more)
        if options.admits and not options.priority.enable:
            self._orchestrator = under(thunder_agent(options.seed), options)
            self._orchestrator.replicas_added(replica for replica, _ in fleet.values())
