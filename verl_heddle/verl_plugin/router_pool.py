"""The router's fleet: which replicas there are, which are paused, and verl's `RequestLoadBalancer` protocol over them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import LatencyModel
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.verl_plugin.log import log
from verl_heddle.verl_plugin.news import Promised
from verl_heddle.verl_plugin.stopwatch import Stopwatch


class ServerPool:
    """Base of the router: keeps the servers' handles. The orchestrator's tables own the fleet and the turns in flight."""

    _servers: dict[str, Any]
    _orchestrator: Orchestrator
    _known: dict[str, Replica]
    """Every replica seen so far: under `separate_async` those that left come back."""
    _paused: set[str]
    """Replicas whose engine is paused by a weight update."""
    _all_paused: Stopwatch
    _latency: LatencyModel | None
    _promised: Promised
    _others: Counter[str]
    """Requests in flight from verl's own clients, which report no turns, by replica."""
    _counts: Counter[str]

    # --- what the router does after a change of the fleet ------------------------------------------------------------------

    def _dispatch(self) -> None:
        raise NotImplementedError

    def _drop_orders(self) -> None:
        raise NotImplementedError

    def _deliver(self, request: str, replica: str | None) -> None:
        raise NotImplementedError

    def _handle(self, event: str, what: Any) -> None:
        raise NotImplementedError

    def _fall_back(self, event: str, error: Exception) -> None:
        raise NotImplementedError

    # --- the fleet ---------------------------------------------------------------------------------------------------------

    def fleet_is(self, fleet: dict[str, tuple[Replica, Any]]) -> None:
        """Replace the fleet by these replicas and actor handles, by server id. Between steps."""
        before = self._orchestrator.replicas
        self.remove_servers([name for name in {**self._servers, **before} if name not in fleet])
        self._known |= {name: replica for name, (replica, _) in fleet.items()}
        self._set_step_times([replica for replica, _ in fleet.values()])  # before a replica of an unknown degree joins
        self.add_servers({name: handle for name, (_, handle) in fleet.items() if name not in before})

    def _set_step_times(self, fleet: Iterable[Replica]) -> None:
        """Pass the step times on if they cover every degree in the fleet."""
        latency = self._latency
        known = latency is not None and all(replica.tp in latency.tps for replica in fleet)
        try:
            self._orchestrator.step_times_known(latency if known else None)
        except Exception as error:
            self._fall_back("step_times_known", error)

    def handles(self) -> dict[str, Any]:
        """Server id -> actor handle."""
        return dict(self._servers)

    def replica_lost(self, name: str) -> None:
        """A worker found the server dead: drop it; its trajectories are reassigned at their next request."""
        if name in self._servers:
            self._counts["replicas_lost"] += 1
            log(f"replica {name} died; its trajectories go on elsewhere")
            self.remove_servers([name])

    def paused(self, name: str) -> None:
        """A weight update pauses this replica's engine and drops its contexts; the replica may already have left for the trainer."""
        self._paused.add(name)
        self._time_pause()
        self._handle("paused", name)

    def resumed(self, name: str) -> None:
        """The replica's engine runs again."""
        self._paused.discard(name)
        self._time_pause()
        self._handle("resumed", name)

    def _time_pause(self) -> None:
        self._all_paused.run(bool(self._servers) and self._paused >= self._servers.keys(), time.monotonic())

    def add_servers(self, servers: dict[str, Any]) -> None:
        """Replicas joined; an unknown one is assumed to be like the others."""
        self._servers.update(servers)
        like = next(iter(self._orchestrator.replicas.values()), Replica(""))
        for name in servers:
            self._known.setdefault(name, replace(like, name=name))
        self._orchestrator.replicas_added(self._known[name] for name in servers)
        self._time_pause()
        self._dispatch()

    def remove_servers(self, server_ids: list[str]) -> None:
        """Replicas left."""
        for name in server_ids:
            self._servers.pop(name, None)
            self._others.pop(name, None)
        self._time_pause()
        self._orchestrator.replicas_removed(server_ids)
        self._drop_orders()
        self._dispatch()
        if not self._servers:
            for request in list(self._promised.held):
                self._deliver(request, None)

    def clear_sticky_cache(self) -> dict[str, Any]:
        """Conversations are reassigned at their next turn."""
        cleared = self._orchestrator.homes_forgotten()
        self._dispatch()
        return {"cleared_entries": cleared, "server_loads": self._orchestrator.inflight}

    # --- the rest of verl's protocol ---------------------------------------------------------------------------------------

    def acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        """A request from verl's own client, which reports no trajectory: placed by verl's rule."""
        replica, _ = self._orchestrator.rule.acquire(request_id)
        self._others[replica] += 1
        return replica, self._servers[replica]

    def release_server(self, server_id: str, request_id: str | None = None) -> None:
        """Counterpart of `acquire_server`."""
        self._others[server_id] = max(0, self._others[server_id] - 1)
        self._orchestrator.rule.release(server_id)

    def require_acquire_fields(self) -> list[str]:
        """Nothing: `turn_started` carries what we need."""
        return []

    def require_release_fields(self) -> list[str]:
        """Nothing."""
        return []

    def get_all_servers(self) -> list[str]:
        """Server ids in the pool."""
        return list(self._servers)

    def get_inflight_count(self, server_id: str) -> int:
        """Requests in flight on one server."""
        return self._orchestrator.inflight.get(server_id, 0)

    def get_total_inflight(self) -> int:
        """Requests in flight on all servers."""
        return sum(self._orchestrator.inflight.values())

    def get_status(self) -> dict[str, Any]:
        """verl's debugging view."""
        return {
            "servers": self._orchestrator.inflight,
            "total_inflight": self.get_total_inflight(),
            "active_servers": len(self._servers),
            "registered_handles": list(self._servers),
        }
