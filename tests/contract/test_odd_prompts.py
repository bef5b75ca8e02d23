"""Whatever a dataset calls a prompt: verl's own worker starts and settles its group, and the prompt has one name everywhere."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("verl")

import torch
from odd_prompts import ODD, Unreadable, message, photo
from verl_batches import BareWorker, batch

from verl_heddle.options import Options
from verl_heddle.shape.plan import Share
from verl_heddle.shape.select import Rule
from verl_heddle.shape.settings import ShapeReason
from verl_heddle.verl_plugin import prompts
from verl_heddle.verl_plugin.agent_loop import HeddleWorker
from verl_heddle.verl_plugin.prompts import facts_of, facts_of_batch, prompt_digest, prompt_text
from verl_heddle.verl_plugin.shaping import SHARE, Selection


class Client:
    """As much of the client as a worker that has no engines needs."""

    def __init__(self):
        self.counts, self.ended, self.limits = Counter(), [], []

    def trajectory_ended(self, end):
        self.ended.append(end)

    def tool_started(self, who, tool):
        pass

    def limit(self, table):
        self.limits.append(table)


class Worker(BareWorker):
    def __init__(self, samples):
        super().__init__(samples)
        self.llm_client, self._options, self._model = Client(), Options(), "m"
        self._records, self._running, self._most_tokens, self._most_turns = [], {}, 100, 9
        self._selection = Selection(samples, self.llm_client.limit, 1.0)


@pytest.fixture
def statuses(monkeypatch):
    """What verl's worker tells the transfer queue of each prompt."""
    found: dict[str, list[str]] = {}

    async def put(key, partition_id, tag, **more):
        found.setdefault(key, []).append(tag["status"])

    async def life(self, sampling_params, trajectory, **kwargs):
        await asyncio.sleep(0)

    monkeypatch.setattr("transfer_queue.async_kv_put", put)
    monkeypatch.setattr("verl.experimental.agent_loop.AgentLoopWorker._run_agent_loop", life)
    return found


def play(made, samples=2):
    async def go():
        worker = Worker(samples)
        await worker.generate_sequences(made)
        await asyncio.gather(*worker.background_tasks)
        return worker

    return asyncio.run(go())


@pytest.mark.parametrize("name", ODD)
def test_its_group_runs_under_one_name(name, statuses):
    made, _ = batch(["x"])
    from verl.utils import tensordict_utils as tu

    tu.assign_non_tensor_stack(made, "raw_prompt", [ODD[name]])
    (announced,) = facts_of_batch(made)
    worker = play(made)
    assert statuses == {"u0": ["running", "finished"]}
    assert {record.prompt_id for record in worker._records} == {announced.digest} and len(worker._records) == 2
    assert not worker.llm_client.counts


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("what", ["is_plain", "facts_of"])
def test_nothing_of_ours_leaves_a_prompt_pending(what, share, statuses, monkeypatch, capsys):
    """An exception before verl's own method would: the step waits for ever."""

    def broken(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(f"verl_heddle.verl_plugin.agent_loop.{what}", broken)
    shares = [Share(2, Rule(2, 0, 0.0), ShapeReason.SHAPED)] if share else [None]
    made, _ = batch(["x"], **{SHARE: shares, "__rollout_n__": [2]})
    play(made)
    assert statuses["u0"][0] == "running" and statuses["u0"][-1] in ("finished", "failure")


def test_a_share_that_cannot_be_opened_is_n_samples(statuses, monkeypatch):
    monkeypatch.setattr(Selection, "opened", lambda *args: {}[0])
    made, _ = batch(["x"], **{SHARE: [Share(5, Rule(2, 0, 0.0), ShapeReason.SHAPED)], "__rollout_n__": [5]})
    worker = play(made, samples=2)
    assert statuses == {"u0": ["running", "finished"]} and len(worker._records) == 2 and worker.llm_client.counts["prompt"] == 1


def test_named_once_per_prompt_however_many_samples(statuses, monkeypatch):
    calls = []
    monkeypatch.setattr(prompts, "prompt_digest", lambda raw: calls.append(1) or "d")
    made, _ = batch(["one", "two"])
    assert len(play(made, samples=16)._records) == 32 and len(calls) == 2


def test_a_picture_is_hashed_beside_the_event_loop(statuses, monkeypatch):
    import threading

    where = {}
    monkeypatch.setattr(prompts, "prompt_digest", lambda raw: where.setdefault(str(type(raw[0]["content"])), threading.current_thread()))
    made, _ = batch(["x", "y"])
    from verl.utils import tensordict_utils as tu

    tu.assign_non_tensor_stack(made, "raw_prompt", [ODD["an image"], [{"role": "user", "content": "words"}]])
    play(made)
    assert where["<class 'list'>"] is not threading.main_thread() and where["<class 'str'>"] is threading.main_thread()


SAME = """
import numpy, sys, io
sys.path[:0] = {paths!r}
import odd_prompts as odd
from verl_heddle.verl_plugin.prompts import prompt_digest
for name in ("an image", "bytes", "a bfloat16 tensor", "parts in parts", "token ids", "an unreadable object"):
    print(prompt_digest(odd.ODD[name]))
class Thing:
    def __init__(self): self.pixels = numpy.arange(9); self.name = "x"
print(prompt_digest([{{"image": Thing(), "file": io.BytesIO(b"abc")}}]))
"""


def test_the_same_in_every_process(capsys, monkeypatch):
    script = SAME.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[2])])
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(script, {"__name__": "here"})
    assert other == capsys.readouterr().out and len(set(other.split())) == 7


def test_what_differs_is_told_apart_and_what_is_the_same_is_not():
    different = [
        message({"image": photo(1)}),
        message({"image": photo(2)}),
        message({"image": np.asarray(photo(1))}),
        message({"image": torch.zeros(2, 3)}),
        message({"image": torch.zeros(3, 2)}),
        message({"image": b"ab"}, {"image": b"c"}),
        message({"image": b"a"}, {"image": b"bc"}),
        message({"image": Path("/a")}),
        message({"image": Path("/b")}),
        "ab",
        ["ab"],
        ["a", "b"],
        [1, 2],
        [12],
        None,
    ]
    names = [prompt_digest(one) for one in different]
    assert len(set(names)) == len(different)
    assert prompt_digest(message({"image": photo(1)})) == names[0]
    assert prompt_digest(tuple(message({"image": photo(1)}))) == names[0]
    assert prompt_digest([{"b": 1, "a": 2}]) == prompt_digest([{"a": 2, "b": 1}])


def test_a_film_costs_a_bounded_number_of_bytes(monkeypatch):
    hashed = []

    class Counting:
        def update(self, data):
            hashed.append(len(data))

        def hexdigest(self):
            return "d"

    monkeypatch.setattr(prompts.hashlib, "blake2b", lambda digest_size: Counting())
    film = message({"video": [np.zeros((1080, 1920, 3), np.uint8)] * 200})
    prompt_digest(film)
    assert sum(hashed) < prompts.BUDGET + 200 * 2 * prompts.BLOCK
    hashed.clear()
    prompt_digest(message({"image": io.BytesIO(bytes(2**19))}))
    assert sum(hashed) > 2**19, "a picture counts whole"


def test_the_words_are_those_of_the_text():
    assert prompt_text(ODD["an image"]) == "what is it?"
    assert prompt_text(ODD["parts in parts"]) == "look\nthere"
    assert prompt_text("words") == "words" and prompt_text(["one", "two"]) == "one\ntwo"
    assert prompt_text([1, 2]) is None and prompt_text(None) is None and facts_of([Unreadable()]).text is None


def test_a_reward_that_is_no_number_does_not_fail_a_row_that_is_written(monkeypatch):
    class Output:
        prompt_ids, response_ids, reward_score = None, [1], {"score": 1}

    async def written(self, output, validate, **kwargs):
        return "written"

    monkeypatch.setattr("verl.trainer.ppo.v1.agent_loop_tq.AgentLoopWorkerTQ.__ray_actor_class__._agent_loop_postprocess", written)

    async def life(self, sampling_params, trajectory, **kwargs):
        return await self._agent_loop_postprocess(Output(), False, **kwargs)

    monkeypatch.setattr("verl.experimental.agent_loop.AgentLoopWorker._run_agent_loop", life)

    async def go():
        worker = Worker(1)
        assert isinstance(worker, HeddleWorker)
        told = await worker._run_agent_loop({}, {"step": None}, uid="u", session_id=0, raw_prompt="x")
        assert told == "written" and worker.llm_client.counts["record"] == 2
        (record,) = worker._records
        assert record.meta["outcome"] == "finished" and record.reward is None

    asyncio.run(go())
