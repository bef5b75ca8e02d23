"""The corrected mode's advantages, as verl's own `compute_advantage` asks for them by name."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("verl")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

from verl_heddle.options import Shape
from verl_heddle.shape.groups import Groups
from verl_heddle.shape.plan import Share
from verl_heddle.shape.select import Fate, Rule
from verl_heddle.shape.settings import ShapeReason
from verl_heddle.shape.shaper import Shaper
from verl_heddle.verl_plugin import advantage

RESPONSE = 12


@pytest.fixture(autouse=True)
def no_shaper(monkeypatch):
    monkeypatch.setattr(advantage, "SHAPER", None)


def asked(estimator, rows, by_deviation=False):
    """Advantages verl computes for rows of (uid, tokens, reward); verl's own path, from keys to padded tensors."""
    mask = torch.zeros(len(rows), RESPONSE)
    rewards = torch.zeros(len(rows), RESPONSE)
    for number, (_, tokens, reward) in enumerate(rows):
        mask[number, :tokens] = 1
        rewards[number, tokens - 1] = reward
    data = DataProto.from_dict(
        tensors={"response_mask": mask, "token_level_rewards": rewards},
        non_tensors={"uid": np.array([uid for uid, _, _ in rows], dtype=object)},
    )
    settings = OmegaConf.create({"norm_adv_by_std_in_grpo": by_deviation})
    keys = [f"{uid}_{number}_0" for number, (uid, _, _) in enumerate(rows)]
    found = compute_advantage_for_multi_trajectories(
        data, keys, adv_estimator=estimator, norm_adv_by_std_in_grpo=by_deviation, config=settings
    )
    assert torch.equal(found.batch["returns"], found.batch["advantages"])
    return found.batch["advantages"]


rows_of = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, RESPONSE), st.sampled_from([-1.0, 0.0, 0.5, 1.0])), min_size=1, max_size=12
)


@given(rows_of, st.booleans())
@settings(deadline=None)
def test_without_weights_it_is_verls_grpo(rows, by_deviation):
    torch.testing.assert_close(asked("heddle_grpo", rows, by_deviation), asked("grpo", rows, by_deviation), atol=1e-5, rtol=1e-5)


def shaped(corrected):
    """A shaper after a step in which 2 of 4 were kept of u, the shortest and the longest."""
    shaper, groups = Shaper(Shape(corrected=corrected), 2), Groups(2)
    groups.opened("u", "p", Share(4, Rule(2, 1), ShapeReason.SHAPED), [f"u_{n}" for n in range(4)])
    for number, tokens in enumerate([2, 9, 9, 10]):
        groups.finished(f"u_{number}", tokens, Fate.VALID, 1.0)
    shaper.step_ended(1, groups.take())
    return shaper


def test_the_weights_of_the_shaper_reach_the_advantages(monkeypatch):
    rows = [("u", 2, 1.0), ("other", 4, 1.0), ("u", 10, 0.0), ("other", 4, 0.0)]
    plain = asked("grpo", rows)
    monkeypatch.setattr(advantage, "SHAPER", shaped(corrected=False))
    assert torch.equal(asked("heddle_grpo", rows), plain)
    monkeypatch.setattr(advantage, "SHAPER", shaped(corrected=True))
    found = asked("heddle_grpo", rows)
    short, long = advantage.SHAPER.weights("u", [2, 10])
    assert long > 1.2 > 1 > short
    mean = short / 2
    assert found[0, 0].item() == pytest.approx(short * (1 - mean)) and found[2, 0].item() == pytest.approx(-long * mean)
    assert torch.equal(found[1::2], plain[1::2]), "a group that was not selected from"
    assert torch.all(found[0, 2:] == 0) and torch.all(found[2, 10:] == 0)


def test_several_rows_of_a_trajectory_are_refused(monkeypatch):
    monkeypatch.setattr(advantage, "SHAPER", shaped(corrected=True))
    with pytest.raises(ValueError, match="3 rows for 2 samples"):
        asked("heddle_grpo", [("u", 3, 1.0)] * 3)


def test_the_name_is_known_once_the_gate_was_asked():
    assert compute_advantage.__module__ == "verl.trainer.ppo.ray_trainer"
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    assert get_adv_estimator_fn("heddle_grpo") is advantage.weighted_grpo
