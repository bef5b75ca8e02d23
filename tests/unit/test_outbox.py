"""What a worker tells the router: in order, once, soon, and before what it asks; and asks: one call at a time, nobody forgotten."""

import asyncio

import pytest

from verl_heddle.verl_plugin.outbox import LATEST_S, Outbox, Questions


def test_events_leave_once_in_order_by_themselves_or_with_a_question():
    async def play():
        sent = []
        outbox = Outbox(sent.append)
        outbox.put("a", 1)
        outbox.put("b", 2)
        assert outbox.take() == [("a", 1), ("b", 2)] and outbox.take() == []
        await asyncio.sleep(3 * LATEST_S)
        assert sent == [], "taken along"
        outbox.put("c", 3)
        outbox.put("d", 4)
        await asyncio.sleep(3 * LATEST_S)
        assert sent == [[("c", 3), ("d", 4)]], "sent alone when nobody asked"
        outbox.put("e", 5)
        outbox.send()
        outbox.send()
        assert sent[1:] == [[("e", 5)]]
        await asyncio.sleep(3 * LATEST_S)
        assert len(sent) == 2

    asyncio.run(play())


def test_questions_that_come_meanwhile_go_together_and_the_cancelled_are_left_out():
    async def play():
        lots, gate = [], asyncio.Event()

        async def send(lot):
            lots.append(lot)
            await gate.wait()
            if "bad" in lot:
                raise RuntimeError("No available servers")
            return [what * 10 for what in lot]

        questions = Questions(send)
        first = asyncio.create_task(questions.ask(1))
        await asyncio.sleep(0.01)
        later = [asyncio.create_task(questions.ask(number)) for number in (2, 3, 4)]
        await asyncio.sleep(0.01)
        later.pop(1).cancel()
        gate.set()
        assert await first == 10 and await asyncio.gather(*later) == [20, 40] and lots == [[1], [2, 4]]
        one, other = asyncio.create_task(questions.ask("bad")), asyncio.create_task(questions.ask("worse"))
        for task in (one, other):
            with pytest.raises(RuntimeError, match="No available servers"):
                await task
        assert await questions.ask(5) == 50, "it goes on"

    asyncio.run(play())
