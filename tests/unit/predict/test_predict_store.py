"""A predictor comes back from its bytes as it was, or not at all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from play import rollouts

from verl_heddle.predict import predictor
from verl_heddle.predict import predictor as module
from verl_heddle.predict.predictor import Predictor, StateError, pack, unpack


@pytest.fixture(scope="module")
def stored():
    run = rollouts(prompts=40, samples=6, seed=0)
    run.predictor.adopt(run.predictor.fit_job().run())
    return run.predictor.to_bytes()


def ask(predictor: Predictor):
    run = rollouts(prompts=0, samples=0, seed=0)
    run.predictor = predictor
    for name in ("p1", "p7", "new"):
        run.start(name, prompt=name, step=9)
        run.turn(name, 300, ("bash",))
    return [run.predict(name) for name in ("p1", "p7", "new")]


def test_round_trip_answers_and_learns_the_same(stored):
    first, second = Predictor.from_bytes(stored), Predictor.from_bytes(stored)
    assert second.to_bytes() == stored
    assert ask(first) == ask(second)
    assert first.model is not None and len(first.fit_job().batch) > 0


def test_restored_after_a_cold_start_too():
    assert Predictor.from_bytes(Predictor().to_bytes()).model is None


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_is_a_state_error(stored, data):
    at = data.draw(st.integers(0, len(stored) - 1))
    if data.draw(st.booleans()):
        damaged = stored[:at]
    else:
        damaged = stored[:at] + bytes([stored[at] ^ (1 << data.draw(st.integers(0, 7)))]) + stored[at + 1 :]
    with pytest.raises(StateError):
        Predictor.from_bytes(damaged)


@given(st.binary(max_size=200))
def test_anything_else_is_a_state_error(data):
    with pytest.raises(StateError, match="not a stored predictor"):
        Predictor.from_bytes(data)


def test_other_versions_are_refused(stored, monkeypatch):
    monkeypatch.setattr(predictor, "FORMAT", predictor.FORMAT + 1)
    with pytest.raises(StateError, match="format"):
        Predictor.from_bytes(stored)
    monkeypatch.undo()
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    with pytest.raises(StateError, match="other features"):
        Predictor.from_bytes(stored)


@pytest.mark.parametrize("name", ["features", "pool", "tools", "prompts", "model"])
def test_missing_parts_are_a_state_error(stored, name):
    header, arrays = unpack(stored)
    del header[name]
    with pytest.raises(StateError):
        Predictor.from_bytes(pack(header, arrays))


def test_numbers_that_are_none_are_refused(stored):
    header, arrays = unpack(stored)
    arrays["prompts"] = np.full_like(arrays["prompts"], np.nan)
    with pytest.raises(StateError):
        Predictor.from_bytes(pack(header, arrays))


def test_bytes_are_not_pickle(stored):
    assert stored.startswith(b"heddle-predict\n")
