"""Priority and pace, against what their docstrings say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_heddle.schedule.priority import LIMIT, Pace, longest_first, work_tokens


def test_no_estimate_no_priority():
    assert longest_first(None, 64) == 0


def test_tools_count_at_the_pace_of_the_turns():
    pace = Pace()
    assert pace.s_per_token is None and work_tokens(100, 9.0, pace.s_per_token) == 100
    for tokens in (100, 300):
        pace.turn(tokens, tokens * 0.02)
    pace.turn(50, None)
    pace.turn(0, 5.0)
    assert pace.s_per_token == pytest.approx(0.02, rel=1e-3)
    assert work_tokens(100, 9.0, pace.s_per_token) == pytest.approx(550, rel=1e-3)


@given(st.floats(0, 1e12), st.floats(0, 1e12), st.integers(1, 10_000))
def test_longer_is_never_less_urgent(a, b, quantum):
    low, high = sorted((a, b))
    assert -LIMIT <= longest_first(high, quantum) <= longest_first(low, quantum) <= 0


def test_quantum_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        longest_first(1.0, 0)
