"""The bench of the router plays what it says: so many trajectories at any time, each turn ended, nothing fallen back."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.router.alone import OPTIONS, Alone  # noqa: E402
from bench.router.crowd import Crowd  # noqa: E402
from verl_heddle.trajectory import TrajectoryEnd  # noqa: E402


def test_a_crowd_keeps_its_number_and_its_turns_are_in_order():
    crowd, seen = Crowd("c", 20), {}
    for _ in range(600):
        life = crowd.start()
        assert life.last.turn == seen.setdefault(life.who.key, 0) and crowd.ready == 19
        end, after = crowd.finish(life, "r")
        seen[life.who.key] += 1
        assert end.turn == life.last.turn and isinstance(after, TrajectoryEnd) == (
            life.who.key not in {one.who.key for one in crowd._ready}
        )
        assert crowd.ready == 20
    assert 30 < crowd.ended < 200 and crowd.ended <= len(seen) <= 20 + crowd.ended


@pytest.mark.parametrize("name", list(OPTIONS))
def test_every_option_is_played_without_a_fallback(name):
    play = Alone(name, replicas=4, live=60)
    asyncio.run(play.turns(400))
    router = play.router
    assert not router.failures and router.get_total_inflight() == len(play._open) == 30
    told = router.stats().get("told", 0)
    assert not any(asyncio.run(play.drain()).values()), "nothing is left"
    assert sum(router._orchestrator.counts.values()) == len(play.acquire_s) + told == 400 and (told > 200) == (name == "default")


def test_where_kv_cache_is_short_trajectories_wait_and_are_put_out():
    play = Alone("default", replicas=4, live=60, kv_tokens=15_000)
    asyncio.run(play.turns(1500))
    stats = play.router.stats()
    assert play._held and stats["residents/full"] > 10 and stats["told"] > 300
    assert len(play.acquire_s) + stats["told"] == 1500 and not play.router.failures
    assert not any(asyncio.run(play.drain()).values())
