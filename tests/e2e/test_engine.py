"""One real vLLM engine inside verl's own server actor, our client and router around it: queueing, priority, cancellation, a lost router."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
import ray
from engine_server import SLOTS, EngineServer
from engines import CPU_ENVIRONMENT
from omegaconf import OmegaConf

from verl_heddle.options import Deadlines, Options
from verl_heddle.traces.recorder import Recorder
from verl_heddle.trajectory import Outcome, Reason, TrajectoryEnd, TrajectoryId
from verl_heddle.verl_plugin.client import HeddleClient
from verl_heddle.verl_plugin.live import CURRENT
from verl_heddle.verl_plugin.router import HeddleRouter, uniform_fleet

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

ROLLOUT = {"name": "vllm", "scheduling_policy": "priority", "prompt_length": 500, "response_length": 1500}
CONFIG = OmegaConf.create({"actor_rollout_ref": {"rollout": ROLLOUT}})
OPTIONS = Options.longest(deadlines=Deadlines(router_s=1.0, cancel_s=20.0))


@pytest.fixture(scope="module")
def server(workspace):
    environment = CPU_ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parent)}
    ray.init(
        num_cpus=4, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False, runtime_env={"env_vars": environment}
    )
    model = str(workspace / "tiny_model")
    handle = ray.remote(num_cpus=1, max_concurrency=1000)(EngineServer).remote(model)
    ray.get(handle.start.remote(), timeout=300)
    yield handle
    ray.shutdown()


@pytest.fixture
def router(server):
    actor = ray.remote(HeddleRouter).remote({"s0": server}, {})
    ray.get(actor.configure.remote(OPTIONS, False, uniform_fleet({"s0": server}, slots=SLOTS)), timeout=60)
    yield actor
    ray.kill(actor)  # with it ends the call for news that the client has open: none may be left when this process does
    time.sleep(0.5)


@pytest.fixture
def client(server, router):
    return HeddleClient(CONFIG, router, {"s0": server}, OPTIONS)


def unfinished(server) -> int:
    return ray.get(server.heddle_status.remote(), timeout=30)["unfinished"]


async def until(condition, seconds=30.0):
    """Wait for a condition on the real engine."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "condition not reached"
        await asyncio.sleep(0.005)


async def episode(client, name: str, tokens: int, turns: int = 1, prompt: str = "p", step: int = 1):
    """A trajectory of fixed lengths; returns (outputs, record)."""
    recorder = Recorder(TrajectoryId(prompt, name, 0, step), time.monotonic(), time.time())
    CURRENT.set(recorder)
    context, outputs = [7] * 40, []
    for _ in range(turns):
        sampling = {"temperature": 0.0, "ignore_eos": True, "max_tokens": tokens}
        output = await client.generate(name, prompt_ids=list(context), sampling_params=sampling)
        outputs.append(output)
        context += list(output.token_ids) + [8] * 10
    client.trajectory_ended(TrajectoryEnd(recorder.id, Outcome.FINISHED, recorder.output_tokens, turns))
    return outputs, recorder.finish(Outcome.FINISHED, time.monotonic(), time.time(), "t", "w", None)


async def test_a_turn_tells_its_queueing_and_looks_like_verls(client, server):
    results = await asyncio.gather(*(episode(client, f"q{i}", 120, turns=2) for i in range(3 * SLOTS)))
    turns = [turn for _, record in results for turn in record.steps]
    assert all(turn.queue_s is not None and turn.preemptions == 0 for turn in turns)
    waited = sorted(turn.queue_s for turn in turns)
    assert waited[0] < 0.1 < waited[-1], "two slots: some run at once, the last waits for four others"
    assert all(turn.output_tokens == 120 for turn in turns)
    assert [record.steps[1].reason for _, record in results] == ["sticky"] * len(results)
    assert all("heddle" not in output.extra_fields for outputs, _ in results for output in outputs)
    assert unfinished(server) == 0


async def test_what_is_predicted_longest_runs_first(client, router):
    for prompt, tokens in (("short", 64), ("long", 6400)):
        end = TrajectoryEnd(TrajectoryId(prompt, prompt, 0, 1), Outcome.FINISHED, tokens, 1)
        ray.get(router.trajectory_ended.remote(end), timeout=30)
    done: list[str] = []

    async def run(name, prompt, tokens):
        await episode(client, name, tokens, prompt=prompt)
        done.append(name)

    blockers = [asyncio.create_task(run(f"b{i}", "long", 400)) for i in range(SLOTS)]
    await asyncio.sleep(0.3)
    late = []
    for name, prompt in (("s0", "short"), ("s1", "short"), ("s2", "short"), ("l0", "long")):
        late.append(asyncio.create_task(run(name, prompt, 60)))
        await asyncio.sleep(0.03)
    await asyncio.gather(*blockers, *late)
    order = [name for name in done if not name.startswith("b")]
    assert order.index("l0") <= 1, f"the long one came last and overtook: {order}"


async def test_cancelling_reaches_the_engine(client, server, router):
    tasks = [asyncio.create_task(episode(client, f"c{i}", 1400)) for i in range(SLOTS + 2)]
    await until(lambda: unfinished(server) == SLOTS + 2)
    for task in tasks[1:]:
        task.cancel()
    await asyncio.gather(*tasks[1:], return_exceptions=True)
    assert all(task.cancelled() for task in tasks[1:])
    await until(lambda: unfinished(server) <= 1)
    outputs, _ = await tasks[0]
    assert len(outputs[0].token_ids) == 1400, "its neighbour was left alone"
    await until(lambda: unfinished(server) == 0)
    await until(lambda: ray.get(router.get_total_inflight.remote(), timeout=30) == 0)


async def test_a_cancel_right_after_the_call_is_not_lost(client, server):
    for i in range(20):
        task = asyncio.create_task(episode(client, f"r{i}", 1400))
        await asyncio.sleep(0.0005 * (i % 5))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await until(lambda: unfinished(server) == 0, seconds=20)
    assert client.counts["cancel_lost"] == 0


async def test_a_limit_stops_a_turn_at_that_token(client, server):
    """Of one that runs, one that waits for a slot, one that has not started, and one that is beyond: over all turns of a trajectory."""
    tasks = {name: asyncio.create_task(episode(client, name, 700, turns=2)) for name in ("runs", "beside", "waits")}
    await until(lambda: unfinished(server) == 3)
    client.limit({"runs_0": 650, "waits_0": 900, "later_0": 40})
    later = asyncio.create_task(episode(client, "later", 700, turns=2))
    lengths = {name: [len(output.token_ids) for output in (await task)[0]] for name, task in (*tasks.items(), ("later", later))}
    assert lengths == {"runs": [650, 1], "beside": [700, 700], "waits": [700, 200], "later": [40, 1]}, "a turn has one token at least"


async def test_how_far_a_limited_turn_has_got_is_told(client, server):
    told = []
    recorder = Recorder(TrajectoryId("p", "told", 0, 1), time.monotonic(), time.time(), counter=told.append)

    async def turn():
        CURRENT.set(recorder)
        sampling = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 1400}
        return await client.generate("told", prompt_ids=[7] * 40, sampling_params=sampling)

    task = asyncio.create_task(turn())
    await until(lambda: unfinished(server) == 1)
    await asyncio.sleep(0.2)
    client.limit({"told_0": 2})
    length = len((await task).token_ids)
    assert told[-1] == length and length - told[0] <= 2, "no more than two further steps of the engine"


@pytest.mark.parametrize("how", ["killed", "hung"])
async def test_without_a_router_turns_go_on_under_verls_rule(client, router, how, capsys):
    outputs, _ = await episode(client, "before", 5)
    pid = ray.get(router.__ray_call__.remote(lambda self: os.getpid()), timeout=30)
    if how == "killed":
        ray.kill(router)
        with pytest.raises(ray.exceptions.RayActorError):  # killing takes a moment, in which it may still answer
            while True:
                ray.get(router.get_total_inflight.remote(), timeout=30)
    else:
        os.kill(pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        results = await asyncio.gather(*(episode(client, f"{how}{i}", 20, turns=3) for i in range(4)))
        assert time.monotonic() - start < 20
    finally:
        if how == "hung":
            os.kill(pid, signal.SIGCONT)
    assert {turn.reason for _, record in results for turn in record.steps} == {str(Reason.FALLBACK_ROUTER)}
    assert client.counts["fallback_router"] == 12
    assert len(outputs[0].token_ids) == 5
    assert client._link.local.get_total_inflight() == 0
