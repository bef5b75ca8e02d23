"""Shares of a batch, from the manager through verl's own batch and worker code to the samples that start."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("verl")

from verl_batches import BareWorker, batch

from verl_heddle.fleet import Replica
from verl_heddle.latency import LatencyModel
from verl_heddle.options import Shape
from verl_heddle.shape.groups import Visit
from verl_heddle.shape.plan import plain
from verl_heddle.shape.settings import ShapeReason
from verl_heddle.verl_plugin.prompts import first_turns, prompt_digest
from verl_heddle.verl_plugin.shaping import SHARE, Planner

SIZE = 3
LOOSE = {"length_bias": 1.0, "prompt_bias": 1.0, "mixed_loss": 1.0}


def visit(prompt, *lengths):
    """A group of which all samples ended and nothing is trained on."""
    share = plain(len(lengths), None, ShapeReason.NO_FORECAST)
    return Visit("uid", prompt, share, True, tuple((tokens, False) for tokens in lengths), (), 0)


def started(made, workers=1):
    """(uid, samples started, share) of each prompt: verl's chunks and verl's worker, its agent loops left out."""
    found = {}

    class Worker(BareWorker):
        def __init__(self):
            super().__init__(SIZE)
            self._selection = self

        def opened(self, uid, prompt, share):
            found[uid] = [prompt, share, 0]

        async def _run_agent_loop(self, sampling_params, trajectory, **kwargs):
            assert SHARE not in kwargs and "__rollout_n__" not in kwargs, "what is passed on is written into the rows"
            found.setdefault(kwargs["uid"], [None, None, 0])[2] += 1

    async def play():
        for chunk in made.chunk(workers):
            worker = Worker()
            await worker.generate_sequences(chunk)
            await asyncio.gather(*worker.background_tasks)

    asyncio.run(play())
    return found


@pytest.fixture(autouse=True)
def no_queue(monkeypatch):
    async def nothing(*args, **kwargs):
        return None

    monkeypatch.setattr("transfer_queue.async_kv_put", nothing)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_prompt_gets_its_samples(workers):
    given, _ = batch(["one", "two", "three", "four"], __rollout_n__=[3, 2, 3, 3])
    made = Planner(Shape(enable=True, spare=1, uniform=True, **LOOSE), SIZE, 1000).share_out(given, [])
    assert SHARE not in given and len(first_turns(made, SIZE, 1)) == 4 + 2 + 4 + 4
    found = started(made, workers)
    assert {uid: one[2] for uid, one in found.items()} == {"u0": 4, "u1": 2, "u2": 4, "u3": 4}
    assert found["u1"][:2] == [None, None], "a prompt with a number of its own is left alone"
    assert found["u0"][0] == prompt_digest([{"role": "user", "content": "one"}]) and found["u0"][1].samples == 4


def test_nothing_is_given_before_anything_is_known_and_more_to_the_long_tails_after():
    planner, prompts = Planner(Shape(enable=True, **LOOSE), 8, 40_000), [f"p{n}" for n in range(8)]
    replicas = [Replica("a"), Replica("b")]
    first = planner.share_out(batch(prompts)[0], replicas)
    assert {share.samples for share in first[SHARE]} == {8}
    visits = []
    for number, prompt in enumerate(prompts):
        lengths = [200] * 7 + [220] if number else [200, 200, 210, 220, 230, 240, 6000, 30_000]
        digest = prompt_digest([{"role": "user", "content": prompt}])
        visits.append(visit(digest, *lengths))
    planner.step_ended(1, [], visits)
    planner.latency = LatencyModel.affine(0.02, 0.00002)
    second = planner.share_out(batch(prompts)[0], replicas)
    samples = [share.samples for share in second[SHARE]]
    assert samples[0] == max(samples) > 8 and sum(samples[1:]) < 7 * 12
    assert planner.share_out(batch(prompts)[0], []) is not second


def test_a_validation_is_left_alone():
    given, _ = batch(["one"], validate=True)
    assert Planner(Shape(enable=True, spare=1, **LOOSE), SIZE, 1000).share_out(given, []) is given


def test_a_checkpoint_keeps_what_is_known_of_prompts(tmp_path, capsys):
    import json
    from types import SimpleNamespace

    from verl_heddle.verl_plugin import checkpoint

    planner = Planner(Shape(enable=True), SIZE, 1000)
    planner.step_ended(1, [], [visit("p", 100, 200)])
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(planner.shaper.state()))
    again = Planner(Shape(enable=True), SIZE, 1000)
    checkpoint._restore_shaping(SimpleNamespace(shaper=again.shaper), str(path))
    assert again.shaper.state() == planner.shaper.state()
    for broken in ("{}", "nonsense"):
        path.write_text(broken)
        checkpoint._restore_shaping(again, str(path))
        assert "shaping starts without" in "".join(capsys.readouterr())
    assert again.shaper.state() == planner.shaper.state()


def test_what_is_known_of_prompts_comes_back_where_nobody_predicts(tmp_path):
    import json
    from types import SimpleNamespace

    from verl_heddle.options import Options
    from verl_heddle.verl_plugin import checkpoint

    planner, again = (Planner(Shape(enable=True), SIZE, 1000) for _ in range(2))
    planner.step_ended(1, [], [visit("p", 100, 200)])
    path = tmp_path / checkpoint.SHAPE_FILE
    path.parent.mkdir()
    path.write_text(json.dumps(planner.shaper.state()))
    trainer = SimpleNamespace(resume_mode="resume_path", resume_from_path=str(tmp_path))
    checkpoint.restore(SimpleNamespace(options=Options(), planner=again), SimpleNamespace(trainer=trainer))
    assert again.shaper.state() == planner.shaper.state()
