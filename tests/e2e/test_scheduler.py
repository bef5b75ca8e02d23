"""Preemption on arrival in a real vLLM engine (CPU, tiny model): who runs when, the same tokens as undisturbed, nothing lost in a soak.

HEDDLE_SOAK_S sets the length of the soak in seconds (default 40).
"""

from __future__ import annotations

import asyncio
import os
import random
import time

import pytest
from engines import CPU_ENVIRONMENT

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

SOAK_S = float(os.environ.get("HEDDLE_SOAK_S", "40"))
SLOTS = 2
BLOCK = 32
"""The least vLLM's CPU kernels take; its default of 128 is far from a GPU's 16."""
LIVE = 24
"""Requests in the engine at any time of the soak."""


class Engine:
    """One `AsyncLLM` and the loop it lives in."""

    def __init__(self, model: str):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            model=model,
            dtype="float32",
            max_model_len=2048,
            enforce_eager=True,
            max_num_seqs=SLOTS,
            block_size=BLOCK,
            scheduling_policy="priority",
            scheduler_cls="verl_heddle.verl_plugin.vllm_scheduler.HeddleScheduler",
            gpu_memory_utilization=0.1,
            distributed_executor_backend="mp",
        )
        self.loop = asyncio.new_event_loop()

        async def start():
            return AsyncLLM.from_engine_args(arguments)

        self.llm = self.loop.run_until_complete(start())

    async def generate(self, name, prompt, priority, tokens, temperature=0.0):
        """Token ids of one request."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(max_tokens=tokens, temperature=temperature, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
        outputs = [one async for one in self.llm.generate(TokensPrompt(prompt_token_ids=prompt), sampling, name, priority=priority)]
        return list(outputs[-1].outputs[0].token_ids) if outputs else []

    def close(self):
        """End the engine's process and what still listens to it."""
        self.llm.shutdown()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()

    async def counts(self):
        return await self.llm.engine_core.call_utility_async("heddle_counts")

    async def until(self, condition, seconds=30.0):
        """Wait until the counts fulfil a condition; returns them."""
        limit = time.monotonic() + seconds
        while not condition(counts := await self.counts()):
            assert time.monotonic() < limit, f"condition not reached: {counts}"
            await asyncio.sleep(0.005)
        return counts


@pytest.fixture(scope="module")
def engine(workspace):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("HEDDLE_PREEMPT", '{"max_preemptions": 1000}')
        one = Engine(str(workspace / "tiny_model"))
        yield one
        one.close()


def difference(before, after):
    return {name: after[name] - before[name] for name in before}


def test_a_long_one_runs_within_two_steps_and_the_short_ones_end_with_the_same_tokens(engine):
    async def scenario():
        prompts = {f"short{i}": [5 + i] * 40 + list(range(20, 60)) for i in range(SLOTS)}
        alone = {name: await engine.generate("alone-" + name, prompt, 0, 400) for name, prompt in prompts.items()}
        await engine.llm.reset_prefix_cache()
        before = await engine.counts()
        tasks = {name: asyncio.create_task(engine.generate(name, prompt, -6, 400)) for name, prompt in prompts.items()}
        await engine.until(lambda counts: counts["running"] == SLOTS and counts["steps"] > before["steps"] + 60)
        longs = [asyncio.create_task(engine.generate(f"long{i}", [77 + i] * 50, -90, 60)) for i in range(SLOTS)]
        await asyncio.gather(*longs)
        assert not any(task.done() for task in tasks.values()), "the short ones were held up"
        ended = {name: await task for name, task in tasks.items()}
        return alone, ended, difference(before, await engine.until(lambda counts: counts["requests"] == 0))

    alone, ended, counts = engine.loop.run_until_complete(scenario())
    assert ended == alone
    assert counts["preempted_by_rule"] == counts["winners_started"] == SLOTS
    assert counts["winners_waited_steps"] <= 2 * SLOTS, "each starts within two steps of its arrival"
    assert counts["recomputed_tokens"] <= SLOTS * BLOCK, "full blocks are found again"
    assert counts["free_blocks"] == 0, "difference to the start"


def test_equal_ones_stay_and_a_live_priority_moves(engine):
    async def scenario():
        before = await engine.counts()
        tasks = [asyncio.create_task(engine.generate(f"live{i}", [11 + i] * 30, -10, 500)) for i in range(SLOTS + 1)]
        started = await engine.until(lambda counts: counts["running"] == SLOTS and counts["steps"] > before["steps"] + 60)
        assert started["preempted_by_rule"] == before["preempted_by_rule"]
        found = await engine.llm.engine_core.call_utility_async("heddle_set_priorities", {f"live{SLOTS}": -80, "live0": -2, "nobody": 0})
        moved = await engine.until(lambda counts: counts["preempted_by_rule"] > before["preempted_by_rule"])
        await asyncio.gather(*tasks)
        return found, difference(before, moved)

    found, counts = engine.loop.run_until_complete(scenario())
    assert found == 2
    assert counts["preempted_by_rule"] == 1


def test_a_random_soak_loses_no_request_and_leaks_no_block(engine):
    chance = random.Random(0)
    ended = {"finished": 0, "cancelled": 0, "aborted": 0}

    async def one(name):
        prompt = [chance.randrange(5, 80) for _ in range(chance.choice([8, 60, 300, 900]))]
        tokens = chance.choice([1, 20, 120])
        call = asyncio.create_task(engine.generate(name, prompt, -chance.randrange(100), tokens, temperature=1.0))
        if chance.random() < 0.3:
            await asyncio.wait([call], timeout=chance.random() * 0.5)
            if chance.random() < 0.5:
                call.cancel()
            else:
                await engine.llm.abort(name)
        elif chance.random() < 0.2:
            await engine.llm.engine_core.call_utility_async("heddle_set_priorities", {name: -chance.randrange(100)})
        try:
            got = await call
            ended["finished" if len(got) == tokens else "aborted"] += 1
        except asyncio.CancelledError:
            ended["cancelled"] += 1

    async def stream(number, until):
        count = 0
        while time.monotonic() < until:
            await one(f"soak-{number}-{count}")
            count += 1
        return count

    async def scenario():
        before = await engine.counts()
        sent = await asyncio.gather(*(stream(number, time.monotonic() + SOAK_S) for number in range(LIVE)))
        return sum(sent), before, await engine.until(lambda counts: counts["requests"] == 0)

    sent, before, after = engine.loop.run_until_complete(asyncio.wait_for(scenario(), SOAK_S + 120))
    counts = difference(before, after)
    print(f"soak: {SOAK_S:g} s, {sent} requests {ended}, {counts}, free blocks {after['free_blocks']} of {after['blocks']}")
    assert sum(ended.values()) == sent and min(ended.values()) > 0
    assert (after["running"], after["waiting"], counts["free_blocks"]) == (0, 0, 0)
    assert after["rule_on"] == 1 and counts["preempted_by_rule"] > SOAK_S / 4
