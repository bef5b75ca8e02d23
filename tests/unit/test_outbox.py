"""What a worker tells the router: in order, once, soon, and before what it asks."""

import asyncio

from verl_heddle.verl_plugin.outbox import LATEST_S, Outbox


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
