"""Selection among a worker's tasks: exactly n rows a group whatever happens, nobody written twice, nobody left. The engine is a fake."""

from __future__ import annotations

import asyncio
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("verl")

from verl_heddle.shape.plan import Share
from verl_heddle.shape.select import Fate, Rule, Sample, choose
from verl_heddle.shape.settings import ShapeReason
from verl_heddle.verl_plugin.shaping import Selection

SIZE = 3


class FakeEngine:
    """Decodes a token per turn of the event loop, obeys limits as the scheduler does, and counts whom it serves."""

    def __init__(self):
        self.limits, self.serves = {}, set()

    async def decode(self, key, generated, tokens):
        self.serves.add(key)
        try:
            for number in range(1, tokens + 1):
                await asyncio.sleep(0)
                if generated + number >= self.limits.get(key, inf):
                    return number
            return tokens
        finally:
            self.serves.discard(key)


class Play:
    """One worker's step: samples of given lengths and fates, one turn or two."""

    def __init__(self):
        self.engine, self.written, self.ended = FakeEngine(), [], []
        self.selection = Selection(SIZE, self.limit, 1.0)

    def limit(self, table):
        self.engine.limits |= table

    async def life(self, key, tokens, fate, turns, write_fails=False):
        done = 0
        for part in (tokens,) if turns == 1 else (tokens // 2, tokens - tokens // 2):
            done += await self.engine.decode(key, done, part)
            self.selection.generated(key, done)
            await asyncio.sleep(0)  # tools, parsing
        if fate is Fate.USELESS:
            raise RuntimeError("a tool broke")
        self.ended.append(key)
        if not await self.selection.is_kept(key, done, fate is Fate.CUT, 1.0):
            return
        await asyncio.sleep(0)
        if write_fails:
            raise OSError("disk full")
        self.written.append(key)

    async def prompt(self, uid, samples, rule, **more):
        self.selection.opened(uid, uid, Share(len(samples), rule, ShapeReason.SHAPED))
        lives = [self.selection.live(f"{uid}_{n}", self.life(f"{uid}_{n}", *one, **more)) for n, one in enumerate(samples)]
        return await asyncio.gather(*lives, return_exceptions=True)


fates = st.sampled_from([Fate.VALID] * 6 + [Fate.CUT, Fate.USELESS])
groups = st.lists(st.tuples(st.integers(1, 40), fates, st.integers(1, 2)), min_size=SIZE, max_size=7)


@given(st.lists(groups, min_size=1, max_size=4), st.integers(0, SIZE), st.sampled_from([0.0, 12.0, inf]))
def test_exactly_n_rows_and_those_of_the_rule(prompts, longest, patience):
    async def play():
        worker = Play()
        rule = Rule(SIZE, longest, patience)
        results = await asyncio.gather(*(worker.prompt(f"u{n}", samples, rule) for n, samples in enumerate(prompts)))
        assert not worker.engine.serves and all(one.task.done() for one in worker.selection._samples.values())
        visits = worker.selection.take()
        assert len(visits) == len(prompts) and not worker.selection._samples and not worker.selection.take()
        for number, (samples, told) in enumerate(zip(prompts, results, strict=True)):
            wanted = choose(rule, [Sample(n, tokens, fate) for n, (tokens, fate, _) in enumerate(samples)])
            assert sorted(worker.written) == sorted(set(worker.written))
            assert sorted(key for key in worker.written if key.startswith(f"u{number}_")) == [f"u{number}_{n}" for n in wanted]
            failed = [one for one in told if isinstance(one, BaseException)]
            lost = [n for n, (_, fate, _) in enumerate(samples) if fate is Fate.USELESS and f"u{number}_{n}" not in worker.engine.limits]
            assert not failed if len(wanted) == SIZE else len(failed) >= len(lost) > 0 or not lost

    asyncio.run(play())


def test_who_cannot_be_kept_is_stopped_at_once():
    async def play():
        worker = Play()
        told = await worker.prompt(
            "u", [(5, Fate.VALID, 1), (6, Fate.VALID, 1), (7, Fate.VALID, 1), (4000, Fate.VALID, 2)], Rule(SIZE, 0, 0.0)
        )
        assert told == [None] * 4 and sorted(worker.written) == ["u_0", "u_1", "u_2"] and worker.ended == worker.written
        (visit,) = worker.selection.take()
        assert visit.stopped_tokens <= 9 and visit.seen[-1][1], "censored, at what it had when its siblings were enough"

    asyncio.run(play())


def test_a_row_that_cannot_be_written_fails_its_group():
    async def play():
        worker = Play()
        told = await worker.prompt("u", [(5, Fate.VALID, 1)] * 4, Rule(SIZE, 0, 0.0), write_fails=True)
        assert [type(one) for one in told].count(OSError) == SIZE

    asyncio.run(play())


def test_cancelled_from_outside_and_missed_or_not():
    async def play(samples):
        worker = Play()
        running = asyncio.create_task(worker.prompt("u", [(30, Fate.VALID, 1)] * samples, Rule(SIZE, 0, 0.0)))
        while not worker.engine.serves:
            await asyncio.sleep(0)
        worker.selection._samples["u_0"].task.cancel()
        told = await asyncio.wait_for(running, 5)
        assert len(worker.written) == min(SIZE, samples - 1)
        return [type(one) for one in told]

    assert asyncio.run(play(4)) == [type(None)] * 4
    assert asyncio.run(play(3)).count(asyncio.CancelledError) == 1


@pytest.mark.parametrize("event", ["progress", "finished", "take"])
@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_a_rule_that_raises_costs_the_selection_not_the_group(event, after, monkeypatch, capsys):
    """Whoever waits for a verdict would wait for ever, and the step with him."""
    from verl_heddle.shape.groups import Groups

    original, calls = getattr(Groups, event), []

    def broken(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise ZeroDivisionError("a bug")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Groups, event, broken)

    async def play():
        worker = Play()
        samples = [(5, Fate.VALID, 1), (2, Fate.USELESS, 1), (6, Fate.VALID, 2), (7, Fate.VALID, 1), (40, Fate.VALID, 2)]
        await asyncio.wait_for(worker.prompt("u", samples, Rule(SIZE, 1, inf)), 5)
        assert len(worker.written) == SIZE and len(set(worker.written)) == SIZE
        worker.selection.take()
        assert not worker.selection._samples and worker.selection.failures == (len(calls) > after)

    asyncio.run(play())
