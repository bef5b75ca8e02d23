"""Seconds per decode step against batch and context, and per prefill, beside the table that planner and simulator use.

Decode: all sequences of a point have their prompts cached first, then start together and generate the same number of tokens; the time of a
step is the median over them of (last token - first token) / steps, by the engine core's clock. The forecast is the table's at the mean
context of that window. Points of one context share prompts, the largest batch first, so a prompt is prefilled once. Prefill: one sequence
alone, from its slot to its first token, median of three. The table holds engine steps without host work; so small batches should come out
slower than it says, by that work.
"""

from __future__ import annotations

import asyncio
from statistics import median

from bench.gpu.engines import Handle, started, words
from bench.gpu.one import Run
from bench.gpu.profiles import Profile
from bench.gpu.results import Prediction, Row

TITLE = "Decode step against batch and context, and prefill: against the shipped table"
CAVEATS = (
    "Times are of the engine core, host work between steps included; the table is of the steps alone.",
    "Sampling at temperature 1 over the whole vocabulary, as a rollout does; the table's share for sampling is its source's.",
)
REPEATS = 3


def points(profile: Profile) -> list[tuple[int, int]]:
    """(batch, context), by context, the largest batch first; those whose KV cache does not fit are left out."""
    return [
        (batch, context)
        for context in profile.tau_contexts
        for batch in sorted(profile.tau_batches, reverse=True)
        if batch * (context + profile.tau_tokens + profile.block_tokens) <= profile.tau_kv_tokens
    ]


def predict(profile: Profile) -> Prediction:
    """The prior at every point."""
    latency = profile.prior()
    rows = [
        Row(_decode(batch, context), "ms", 1e3 * float(latency.decode_s(1, batch, context + profile.tau_tokens / 2)))
        for batch, context in points(profile)
    ]
    rows += [Row(_prefill(new, context), "ms", 1e3 * float(latency.prefill_s(1, new, context))) for new, context in profile.prefills]
    return Prediction(tuple(rows), profile.prior_source)


async def measure(run: Run) -> None:
    """Prefills first: they are few, and warm kernels up."""
    profile = run.profile
    async with started(profile, run.scratch, max(profile.tau_batches), profile.tau_kv_tokens) as (handle,):
        await handle.prepare(max(profile.tau_batches), "fcfs")
        await _batch(handle, profile, "warm-up", min(4, max(profile.tau_batches)), 64)
        for new, context in profile.prefills:
            await _one_prefill(run, handle, new, context)
        for context in profile.tau_contexts:
            await handle.prepare(max(profile.tau_batches), "fcfs")
            for batch, _ in [point for point in points(profile) if point[1] == context]:
                if run.left_s() < 5:
                    raise TimeoutError
                answers = await _batch(handle, profile, f"tau{context}", batch, context)
                steps = profile.tau_tokens - 1
                spread = max(one.first_at for one in answers) - min(one.first_at for one in answers)
                whole = max(one.last_at for one in answers) - min(one.first_at for one in answers)
                seconds = median(one.decode_s / steps for one in answers)
                run.put(_decode(batch, context), 1e3 * seconds, uneven_start=spread / max(whole, 1e-9))


async def _batch(handle: Handle, profile: Profile, key: str, batch: int, context: int):  # type: ignore[no-untyped-def]
    """`batch` sequences of `context` cached tokens decode together."""
    prompts = [words(f"{key} {index}", context, profile.shape.vocabulary) for index in range(batch)]
    await asyncio.gather(*(handle.generate(prompt, 1, f"{key}:{batch}:cache{i}") for i, prompt in enumerate(prompts)))
    return await asyncio.gather(*(handle.generate(prompt, profile.tau_tokens, f"{key}:{batch}:{i}") for i, prompt in enumerate(prompts)))


async def _one_prefill(run: Run, handle: Handle, new: int, context: int) -> None:
    seconds = []
    for repeat in range(REPEATS):
        name = f"prefill {new} {context} {repeat}"
        begin = words(name, context, run.profile.shape.vocabulary) if context else []
        if context:
            await handle.generate(begin, 1, f"{name} cache")
        answer = await handle.generate(begin + words(f"{name} new", new, run.profile.shape.vocabulary), 1, name)
        seconds.append(answer.first_s)
    run.put(_prefill(new, context), 1e3 * median(seconds), repeats=[round(1e3 * one, 3) for one in seconds], cached=answer.cached_tokens)


def _decode(batch: int, context: int) -> str:
    return f"decode, batch {batch}, context {context}"


def _prefill(new: int, context: int) -> str:
    return f"prefill, {new} new tokens after {context}"
