"""What verl's `RequestLoadBalancer` protocol asks a router about itself: fields it needs, servers, requests in flight."""

from __future__ import annotations

from typing import Any

from verl_heddle.orchestrator import Orchestrator


class PoolStatus:
    """The answers of a router that keeps its servers' handles in `_servers`; what is in flight its orchestrator counts."""

    _servers: dict[str, Any]
    _orchestrator: Orchestrator

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
