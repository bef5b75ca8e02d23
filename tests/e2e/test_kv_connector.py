"""Two real vLLM engines with a KV connector between them: a conversation that moves finds its context there, nothing is pre-warmed.

The connector is ours and for tests (shared_kv.py); what it shows is that `heddle.place.transport=none` with `kv_transfer_config` works.
"""

from __future__ import annotations

import pytest
import ray
from moves import TRAJECTORIES, engines, play, second_turns

from verl_heddle.options import Place
from verl_heddle.trajectory import Reason

pytestmark = [pytest.mark.e2e, pytest.mark.alone]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def servers(workspace, folder):
    connector = {
        "kv_connector": "SharedFolder",
        "kv_connector_module_path": "shared_kv",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"folder": str(folder)},
    }
    with engines(str(workspace / "tiny_model"), kv_transfer_config=connector) as handles:
        yield handles


def hits(servers) -> dict[str, int]:
    return {name: ray.get(server.external_hits.remote(), timeout=30) for name, server in servers.items()}


async def test_a_conversation_that_moves_finds_its_context_through_the_connector(servers, folder):
    said, records, counts = await play(servers, Place(enable=True, transport="none"), 100, tool_s=0.5)
    moved = second_turns(records, Reason.MOVED)
    assert moved and {turn.replica for turn in moved} == {"s1"} and not counts["prewarm/done"]
    assert min(turn.cached_tokens / turn.ctx_tokens for turn in moved) > 0.9, "read from the folder, not computed again"
    found = hits(servers)
    assert found["s1"] == sum(turn.cached_tokens for turn in moved) and not found["s0"], found

    for file in folder.iterdir():
        file.unlink()
    for server in servers.values():
        ray.get(server.forget.remote(), timeout=30)
    stay, still, _ = await play(servers, Place(), 100, tool_s=0.5)
    assert {turn.replica for record in still for turn in record.steps} == {"s0"} and len(stay) == TRAJECTORIES
    assert said == stay, "KV that was computed elsewhere gives the same tokens"
    assert hits(servers) == found, "the engine that computed a context has it"
