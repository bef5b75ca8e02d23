"""The router actor: verl's load-balancer protocol around the pure `Orchestrator`.

verl builds it from `router.yaml` in the task runner; the agent-loop manager then calls `configure` with the user's options. The
workers' clients use `turn_started` / `turn_finished` / `trajectory_ended`; the ten methods of verl's `RequestLoadBalancer` stay
complete for everybody else. An orchestrator that raises is replaced, call by call, by verl's own rule.
"""

from __future__ import annotations

import time
from collections import Counter
from random import Random
from typing import Any

import ray

from verl_heddle.fleet import Replica
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.place.sticky import StickyLeastInflight
from verl_heddle.trajectory import Decision, Reason, TrajectoryEnd, TurnEnd, TurnStart
from verl_heddle.verl_plugin.voice import say_once


class HeddleRouter:
    """One per run; Ray serialises its calls.

    Args:
        servers: server id -> actor handle; parked replicas (no address) are left out.
        yaml_config: contents of `router.yaml`, which holds the class name only.
    """

    def __init__(self, servers: dict[str, Any], yaml_config: dict | None = None) -> None:
        self._servers: dict[str, Any] = {}
        self._shape: dict[str, int] = {}
        self._orchestrator = Orchestrator(Options())
        self._verls_rule = StickyLeastInflight(Random())
        """Kept in step with every decision, so that it can take over at any call."""
        self.failures: Counter[str] = Counter()
        self.add_servers({name: handle for name, handle in servers.items() if name is not None})

    def configure(self, options: Options, tp: int, slots: int, deterministic: bool) -> dict[str, Any]:
        """Start over with the user's options; returns server id -> actor handle. Called before the first turn, and after a restart."""
        self._shape = {"tp": tp, "slots": slots}
        self._orchestrator = Orchestrator(options, deterministic)
        self._orchestrator.replicas_added(Replica(name, **self._shape) for name in self._servers)
        return dict(self._servers)

    def handles(self) -> dict[str, Any]:
        """Server id -> actor handle."""
        return dict(self._servers)

    def turn_started(self, turn: TurnStart) -> Decision:
        """Where the turn goes, how urgently, and why.

        Raises:
            RuntimeError: there is no server.
        """
        try:
            decision = self._orchestrator.turn_started(turn, time.monotonic())
            self._verls_rule.note(turn.conversation, decision.replica)
        except Exception as error:
            if not self._servers:
                raise
            self._failed("turn_started", error)
            replica, _ = self._verls_rule.acquire(turn.conversation)
            decision = Decision(replica, 0, Reason.FALLBACK_POLICY)
        return decision

    def turn_finished(self, turn: TurnEnd) -> None:
        """The engine is done with the turn."""
        self._verls_rule.release(turn.replica)
        self._tell("turn_finished", turn)

    def trajectory_ended(self, end: TrajectoryEnd) -> None:
        """The episode is over."""
        self._tell("trajectory_ended", end)

    def stats(self) -> dict[str, int]:
        """Failures of the orchestrator since the start of the run, by event."""
        return dict(self.failures)

    def _tell(self, event: str, what: Any) -> None:
        try:
            getattr(self._orchestrator, event)(what, time.monotonic())
        except Exception as error:
            self._failed(event, error)

    def _failed(self, event: str, error: Exception) -> None:
        self.failures[event] += 1
        say_once(f"orchestrator raised in {event} ({type(error).__name__}: {error}); verl's own rule decided instead")

    # --- verl's RequestLoadBalancer protocol -----------------------------------------------------------------------------

    def acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        """A turn of somebody who does not speak of trajectories (verl's own client): verl's rule."""
        replica, _ = self._verls_rule.acquire(request_id)
        return replica, self._servers[replica]

    def release_server(self, server_id: str, request_id: str | None = None) -> None:
        """Counterpart of `acquire_server`."""
        self._verls_rule.release(server_id)

    def require_acquire_fields(self) -> list[str]:
        """Nothing: `turn_started` carries what we need."""
        return []

    def require_release_fields(self) -> list[str]:
        """Nothing."""
        return []

    def add_servers(self, servers: dict[str, Any]) -> None:
        """Replicas joined."""
        self._servers.update(servers)
        for name in servers:
            self._verls_rule.add(name)
        self._orchestrator.replicas_added(Replica(name, **self._shape) for name in servers)

    def remove_servers(self, server_ids: list[str]) -> None:
        """Replicas left."""
        for name in server_ids:
            self._servers.pop(name, None)
            self._verls_rule.remove(name)
        self._orchestrator.replicas_removed(server_ids)

    def get_all_servers(self) -> list[str]:
        """Server ids in the pool."""
        return list(self._servers)

    def get_inflight_count(self, server_id: str) -> int:
        """Requests in flight on one server."""
        return self._verls_rule.inflight.get(server_id, 0)

    def get_total_inflight(self) -> int:
        """Requests in flight on all servers."""
        return sum(self._verls_rule.inflight.values())

    def get_status(self) -> dict[str, Any]:
        """verl's debugging view."""
        return {
            "servers": dict(self._verls_rule.inflight),
            "total_inflight": self.get_total_inflight(),
            "active_servers": len(self._servers),
            "registered_handles": list(self._servers),
        }

    def clear_sticky_cache(self) -> dict[str, Any]:
        """Conversations are placed anew at their next turn."""
        self._orchestrator.homes_forgotten()
        return {"cleared_entries": self._verls_rule.forget(), "server_loads": dict(self._verls_rule.inflight)}


RouterActor = ray.remote(max_restarts=3)(HeddleRouter)
"""As verl gets it: a router whose process dies is started again with the same servers; the workers route alone until the manager, at the
next step, finds it back. Three times, because a router that dies more often has a reason."""
