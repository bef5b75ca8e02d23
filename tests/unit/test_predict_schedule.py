"""History mean and priority, against what their docstrings say."""

from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_heddle.predict.history import FLOOR_TOKENS, HistoryMean
from verl_heddle.schedule.priority import LIMIT, longest_first


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 10_000)), min_size=1), st.sampled_from("abcd"), st.integers(0, 20_000))
def test_history_is_the_mean_of_the_prompt_else_of_all(seen, prompt, generated):
    history = HistoryMean()
    for name, tokens in seen:
        history.observe(name, tokens)
    own = [tokens for name, tokens in seen if name == prompt]
    expected = mean(own or [tokens for _, tokens in seen]) - generated
    assert history.remaining(prompt, generated) == pytest.approx(max(FLOOR_TOKENS, expected))


def test_history_is_bounded_and_forgets_the_oldest():
    history = HistoryMean(max_prompts=2)
    for name, tokens in (("a", 10), ("b", 20), ("c", 60)):
        history.observe(name, tokens)
    assert history.remaining("c", 0) == 60
    assert history.remaining("a", 0) == 30, "forgotten: the pooled mean"


def test_no_history_no_estimate():
    assert HistoryMean().remaining("a", 0) is None
    assert longest_first(None, 64) == 0


@given(st.floats(0, 1e12), st.floats(0, 1e12), st.integers(1, 10_000))
def test_longer_is_never_less_urgent(a, b, quantum):
    low, high = sorted((a, b))
    assert -LIMIT <= longest_first(high, quantum) <= longest_first(low, quantum) <= 0


def test_quantum_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        longest_first(1.0, 0)
