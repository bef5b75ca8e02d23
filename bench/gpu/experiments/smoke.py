"""Does it work at all: the engine starts, our scheduler class loads and preempts, an abort frees the slot, the prefix cache hits.

Starts with CUDA graphs and compilation, and where that fails once more without; what worked is noted, and later experiments follow it.
Whether a preempted request's greedy tokens equal those of an undisturbed run is told, not demanded: on a GPU the batch may change them.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress

from bench.gpu.engines import EAGER, Handle, started, words
from bench.gpu.one import Run
from bench.gpu.profiles import Profile
from bench.gpu.results import Prediction, Row

TITLE = "Engine, scheduler class, abort, prefix cache"
CAVEATS = ("One start each; a warm compile cache would start sooner.",)
PROMPT, LONG, SHORT = 200, 400, 8
"""Tokens of a prompt, of a request that is to lose its slot, of the urgent one."""
KV_TOKENS, SLOTS = 8192, 2


def predict(profile: Profile) -> Prediction:
    """Yes is 1. Times nobody predicts."""
    block = profile.block_tokens
    rows = (
        Row("engine starts", "yes", 1.0),
        Row("engine start", "s"),
        Row("scheduler: rule is on", "yes", 1.0),
        Row("scheduler: urgent arrival takes a slot", "yes", 1.0),
        Row("scheduler: urgent arrival, time to first token", "ms"),
        Row("scheduler: preempted request ends with all its tokens", "yes", 1.0),
        Row("scheduler: share of its greedy tokens unchanged", "%"),
        Row("live priorities: requests found", "count", 2.0),
        Row("abort: engine empty", "yes", 1.0),
        Row("abort: until engine and cache are empty", "ms"),
        Row("abort: blocks given back", "yes", 1.0),
        Row("prefix cache: tokens found of the same prompt", "tokens", float((PROMPT - 1) // block * block)),
    )
    return Prediction(rows, "what the CPU engines of the test suite do")


async def measure(run: Run) -> None:
    """Everything on one engine with two slots."""
    problem: Exception | None = None
    for eager in (run.profile.device == "cpu", True):
        os.environ[EAGER] = "1" if eager else "0"
        try:
            async with started(run.profile, run.scratch, SLOTS, KV_TOKENS) as (handle,):
                run.note(eager=eager, start_error=None if problem is None else f"{type(problem).__name__}: {problem}"[:500])
                run.put("engine starts", True)
                run.put("engine start", handle.start_s)
                await _checks(run, handle)
            return
        except Exception as error:
            if eager or "engine starts" in [row.name for row in run.record.rows.values() if row.measured is not None]:
                raise
            problem = error
            print(f"engine without graphs next: {error}", flush=True)


async def _checks(run: Run, handle: Handle) -> None:
    vocabulary = run.profile.shape.vocabulary
    prompt = words("smoke", PROMPT, vocabulary)
    await handle.prepare(SLOTS, "preempt")
    run.put("scheduler: rule is on", bool((await handle.counts())["rule_on"]))

    alone = await handle.generate(prompt, LONG, "alone", temperature=0.0)
    await handle.generate(words("other", PROMPT, vocabulary), SHORT, "warm-up")
    await handle.prepare(SLOTS, "preempt")
    low = [
        asyncio.create_task(handle.generate(prompt if i == 0 else words("b", PROMPT, vocabulary), LONG, f"low{i}", 100 - i, 0.0))
        for i in (0, 1)
    ]
    await _until(handle, lambda told: told["running"] == SLOTS)
    await asyncio.sleep(20 * alone.decode_s / LONG)  # past the steps that the rule leaves a request its slot
    urgent = await handle.generate(words("urgent", PROMPT, vocabulary), SHORT, "urgent", -100)
    first = not any(task.done() for task in low)
    run.put("scheduler: urgent arrival takes a slot", first and (await handle.counts())["preempted_by_rule"] >= 1)
    run.put("scheduler: urgent arrival, time to first token", 1e3 * (urgent.queue_s + urgent.first_s))
    disturbed = await asyncio.gather(*low)
    run.put("scheduler: preempted request ends with all its tokens", all(len(one.token_ids) == LONG for one in disturbed))
    same = sum(a == b for a, b in zip(alone.token_ids, disturbed[0].token_ids, strict=True))
    run.put("scheduler: share of its greedy tokens unchanged", 100.0 * same / LONG, preemptions=[one.preemptions for one in disturbed])

    open_ = [asyncio.create_task(handle.generate(words(f"o{i}", PROMPT, vocabulary), LONG, f"open{i}", 5)) for i in (0, 1)]
    await _until(handle, lambda told: told["running"] == SLOTS)
    run.put("live priorities: requests found", await handle.utility("heddle_set_priorities", {"open0": 1, "open1": 2}))
    began = time.monotonic()
    for task in open_:
        task.cancel()
    await asyncio.gather(*open_, return_exceptions=True)
    told = await _until(handle, lambda told: not told["requests"] and told["blocks"] - told["free_blocks"] <= 1)
    run.put("abort: engine empty", not told["requests"])
    run.put("abort: until engine and cache are empty", 1e3 * (time.monotonic() - began))
    run.put("abort: blocks given back", told["blocks"] - told["free_blocks"] <= 1, free=told["free_blocks"], blocks=told["blocks"])

    again = await handle.generate(words("o0", PROMPT, vocabulary), SHORT, "again")
    run.put("prefix cache: tokens found of the same prompt", again.cached_tokens)
    with suppress(Exception):
        run.note(counts=await handle.counts())


async def _until(handle: Handle, good, seconds: float = 10.0):  # type: ignore[no-untyped-def]
    """Ask for the counts until they are good, or time is up; returns the last ones."""
    end = time.monotonic() + seconds
    while not good(told := await handle.counts()) and time.monotonic() < end:
        await asyncio.sleep(0.002)
    return told
