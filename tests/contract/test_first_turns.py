"""What the manager announces to the router is what verl's workers then start."""

import asyncio

import pytest

pytest.importorskip("verl")

from verl_batches import BareWorker, batch

from verl_heddle.trajectory import TrajectoryId
from verl_heddle.verl_plugin.prompts import first_turns, prompt_digest


@pytest.mark.parametrize("validate", [False, True])
def test_one_first_turn_per_trajectory(validate):
    made, raw = batch(["short", "a longer prompt " * 20], validate)
    turns = first_turns(made, samples=4, validation_samples=2)
    count = 2 if validate else 4
    expected = [TrajectoryId(prompt_digest(raw[row]), f"u{row}", sample, 7, validate) for row in range(2) for sample in range(count)]
    assert [turn.trajectory for turn in turns] == expected
    assert turns[0].text == "short" and turns[-1].context_tokens > turns[0].context_tokens > 0


def test_the_same_names_as_the_workers_give(monkeypatch):
    """verl's own code starts the loops; only what runs in them is replaced."""
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

    started = []

    class Worker(BareWorker):
        async def _run_agent_loop(self, sampling_params, trajectory, **kwargs):
            who = (prompt_digest(kwargs["raw_prompt"]), str(kwargs["uid"]), int(kwargs["session_id"]))
            started.append(TrajectoryId(*who, int(trajectory["step"]), bool(trajectory["validate"])))

    async def nothing(*args, **kwargs):
        return None

    monkeypatch.setattr("transfer_queue.async_kv_put", nothing)
    made, _ = batch(["one", "two"], __rollout_n__=[3, 2])
    announced = first_turns(made, samples=3, validation_samples=1)

    async def play():
        worker = Worker(3)
        await worker.generate_sequences(made)
        await asyncio.gather(*worker.background_tasks)

    asyncio.run(play())
    assert issubclass(Worker, AgentLoopWorkerTQ.__ray_actor_class__)
    assert sorted(started, key=str) == sorted((turn.trajectory for turn in announced), key=str)
