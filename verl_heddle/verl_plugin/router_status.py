"""What verl's `RequestLoadBalancer` protocol asks of a router besides its fleet: a place by verl's rule, and how things are."""

from __future__ import annotations

from collections import Counter
from typing import Any

from verl_heddle.orchestrator import Orchestrator


class PoolStatus:
    """The answers of a router that keeps its servers' handles in `_servers`; what is in flight its orchestrator counts."""

    _servers: dict[str, Any]
    _orchestrator: Orchestrator
    _others: Counter[str]
    """Requests in flight of verl's own clients, who know no turns, by replica."""

    def acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        """A turn of somebody who does not speak of trajectories (verl's own client): verl's rule."""
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
