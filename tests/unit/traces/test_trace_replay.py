"""What a simulator gets: every number known by a stated rule, nothing of the cluster it was recorded on."""

import dataclasses

import pytest

from verl_heddle.traces import TraceError, episodes, generate, replayable
from verl_heddle.trajectory import Trajectory, Turn


def recorded(*steps: Turn, prompt_tokens: int | None = 100, **meta: object) -> Trajectory:
    return Trajectory("made-up", "coding", "p", 0, prompt_tokens, steps, 1.0, "m", dict(meta))


def test_live_numbers_go_and_the_story_stays() -> None:
    live = Turn(0, 10, "ls", 2.0, 3.0, 100, False, True, 0.1, 0.2, 0.3, 0.4, "r0", -5, "sticky", 9.0, 1, 64, 0.5)
    found = replayable(recorded(live, Turn(5, 7, ctx_tokens=115), uid="u"))
    assert found.steps == (Turn(0, 10, "ls", 2.0, ctx_tokens=100, output_est=True), Turn(5, 7, None, 0.0, ctx_tokens=115))
    assert (found.meta, found.reward, found.prompt_tokens) == ({"uid": "u"}, 1.0, 100)
    assert replayable(found) == found


def test_people_cost_nothing() -> None:
    found = replayable(recorded(*(Turn(0, 1, tool, 300.0) for tool in ("human", "user", "next_user_turn", "ls"))))
    assert [(turn.tool, turn.tool_latency_s) for turn in found.steps] == [(None, 0.0)] * 3 + [("ls", 300.0)]


def test_unknown_tool_times() -> None:
    trajectory = recorded(Turn(0, 1, "ls", None), Turn(0, 1, "make", 5000.0), Turn(0, 1, None, 3.0), Turn(0, 1))
    found = replayable(trajectory)
    assert [turn.tool_latency_s for turn in found.steps] == [0.0, 600.0, 3.0, 0.0]
    assert found.meta == {"assumed": ["tool_latency_s"]}
    assert [turn.tool_latency_s for turn in replayable(trajectory, tool_time=len, max_tool_s=10).steps] == [2, 10, 3.0, 0.0]


def test_unknown_tokens() -> None:
    found = replayable(recorded(Turn(None, 10), Turn(None, None), Turn(None, 30), Turn(5, 0), prompt_tokens=None))
    assert [turn.output_tokens for turn in found.steps] == [10, 10, 30, 1]
    assert [turn.input_tokens for turn in found.steps] == [0, 0, 0, 5]
    assert found.prompt_tokens == 1024
    assert [turn.ctx_tokens for turn in found.steps] == [1024, 1034, 1044, 1079]
    assert found.meta["assumed"] == ["input_tokens", "output_tokens", "prompt_tokens"]
    assert replayable(recorded(Turn(0, 1), prompt_tokens=None), prompt_tokens=50).prompt_tokens == 50


def test_a_recorded_context_is_believed() -> None:
    steps = (Turn(0, 10, ctx_tokens=70), Turn(None, 5, ctx_tokens=100), Turn(2, 5, ctx_tokens=40, ctx_reset=True), Turn(None, 5))
    found = replayable(recorded(*steps, prompt_tokens=None))
    assert found.prompt_tokens == 70
    assert [(turn.input_tokens, turn.ctx_tokens) for turn in found.steps] == [(0, 70), (20, 100), (2, 40), (0, 45)]
    assert found.steps[2].ctx_reset and found.meta == {"assumed": ["input_tokens"]}


def test_nothing_to_go_by() -> None:
    with pytest.raises(TraceError, match="output_tokens: no turn of p trial 0 has a known length"):
        replayable(recorded(Turn(0, None)))
    assert replayable(recorded()).steps == ()


def test_generated_trajectories_are_replayable_as_they_are() -> None:
    for trajectory in generate("coding", 5):
        found = replayable(trajectory)
        assert found.meta == trajectory.meta and found.output_tokens == trajectory.output_tokens
        context = trajectory.prompt_tokens or 0
        for before, turn in zip((Turn(0, 0), *found.steps), found.steps, strict=False):
            context += (before.output_tokens or 0) + (turn.input_tokens or 0)
            assert turn.ctx_tokens == context
            assert not any(getattr(turn, field.name) is None for field in dataclasses.fields(Turn)[:2])


def test_episodes_are_cut_at_people() -> None:
    steps = (
        Turn(0, 1, "ls", 2.0, ctx_tokens=100),
        Turn(3, 2, "human", 60.0, ctx_tokens=104),
        Turn(9, 3, "ls", 2.0, ctx_tokens=80, ctx_reset=True),
        Turn(1, 4, "human", 60.0, ctx_tokens=90),
    )
    first, second = episodes(recorded(*steps))
    assert (first.prompt_id, first.prompt_tokens) == ("p#0", 100)
    assert first.steps == (steps[0], Turn(3, 2, ctx_tokens=104))
    assert (second.prompt_id, second.prompt_tokens) == ("p#1", 80)
    assert second.steps == (Turn(0, 3, "ls", 2.0, ctx_tokens=80), Turn(1, 4, ctx_tokens=90))
    assert [whole.steps for whole in episodes(recorded(Turn(0, 1, "ls")))] == [(Turn(0, 1, "ls"),)]
    assert episodes(recorded()) == []
