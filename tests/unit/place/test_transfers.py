"""The matching of transfers: exclusive ends, nobody waits whose ends are free, longest first."""

from hypothesis import given
from hypothesis import strategies as st

from verl_heddle.place.decisions import Transfer, Transfers

EVENTS = st.lists(
    st.tuples(st.sampled_from("aaaor"), st.integers(0, 9), st.integers(0, 4), st.integers(0, 4), st.integers(1, 100)), max_size=60
)


@given(EVENTS)
def test_a_maximal_matching_at_any_time(events):
    transfers, waiting, under_way = Transfers(), {}, {}
    for kind, who, one, other, tokens in events:
        key, ends = f"k{who}", tuple(dict.fromkeys((f"r{one}", f"r{other}")))
        if kind == "a":
            transfers.ask(Transfer(key, ends[0], ends, float(tokens)))
            under_way.pop(key, None)
            waiting.pop(key, None)
            waiting[key] = (ends, tokens)
        elif kind == "o":
            known = key in waiting or key in under_way
            assert transfers.over(key) == known
            waiting.pop(key, None)
            under_way.pop(key, None)
        else:
            gone = {name for table in (waiting, under_way) for name, (ends, _) in table.items() if f"r{one}" in ends}
            assert set(transfers.removed(f"r{one}")) == gone
            for name in gone:
                waiting.pop(name, None)
                under_way.pop(name, None)
        begun = transfers.start()
        assert [item.tokens for item in begun] == sorted((item.tokens for item in begun), reverse=True)
        for item in begun:
            under_way[item.key] = waiting.pop(item.key)
        busy = [end for ends, _ in under_way.values() for end in ends]
        assert len(busy) == len(set(busy)), "an end in two transfers"
        for ends, _ in waiting.values():
            assert set(ends) & set(busy), "it waits for nothing"
        assert all((f"k{n}" in transfers) == (f"k{n}" in waiting or f"k{n}" in under_way) for n in range(10))


def test_the_longest_gets_the_end():
    transfers = Transfers()
    for number, tokens in enumerate((10.0, 300.0, 20.0)):
        transfers.ask(Transfer(f"k{number}", "r", ("r",), tokens))
    assert [item.key for item in transfers.start()] == ["k1"]
    assert transfers.start() == []
    transfers.over("k1")
    assert [item.key for item in transfers.start()] == ["k2"]
