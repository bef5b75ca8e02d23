"""Two real vLLM engines: trajectories that move are pre-warmed while their tool runs, and their tokens do not change."""

from __future__ import annotations

import asyncio
import time

import pytest
import ray
from moves import TRAJECTORIES, engines, play, second_turns

from verl_heddle.options import Place
from verl_heddle.trajectory import Reason

pytestmark = [pytest.mark.e2e, pytest.mark.alone]


@pytest.fixture(scope="module")
def servers(workspace):
    with engines(str(workspace / "tiny_model")) as handles:
        yield handles


async def test_prewarmed_contexts_are_cached_and_tokens_stay_the_same(servers):
    stay, still, _ = await play(servers, Place(), 100)
    assert {turn.replica for record in still for turn in record.steps} == {"s0"}
    warm, warmed, counts = await play(servers, Place(enable=True), 100)
    moved = second_turns(warmed, Reason.MOVED)
    assert moved and {turn.replica for turn in moved} == {"s1"} and counts["prewarm/done"] >= len(moved), counts
    assert min(turn.cached_tokens / turn.ctx_tokens for turn in moved) > 0.9
    cold, colded, counts = await play(servers, Place(enable=True, transport="none"), 200, tool_s=0.5)
    assert max(turn.cached_tokens / turn.ctx_tokens for turn in second_turns(colded, Reason.MOVED)) < 0.1
    assert not counts["prewarm/done"] and len(cold) == TRAJECTORIES
    assert warm == stay, "where a trajectory runs does not change what it says"


async def test_a_tool_that_is_back_first_drops_its_prewarm(servers):
    _, records, counts = await play(servers, Place(enable=True), 300, tool_s=0.0)
    assert len(records) == TRAJECTORIES and not counts["prewarm/failed"], counts
    limit = time.monotonic() + 20
    while any(ray.get(server.heddle_status.remote(), timeout=30)["unfinished"] for server in servers.values()):
        assert time.monotonic() < limit, "a pre-warm is left in an engine"
        await asyncio.sleep(0.05)
