"""The real scheduler of the installed vLLM, driven two steps deep against a worker that is a fake: no engine, no model, no GPU.

vLLM never schedules asynchronously on a CPU, so a real CPU engine cannot show what preemption does to a step in flight. Here step N + 1 is
scheduled while N is under way. The fake worker remembers which token prefix wrote each KV slot, checks it at every step, and "samples"
a hash of all tokens, so one lost, doubled or misplaced token changes everything after it.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict, deque
from hashlib import blake2b

import pytest
import torch
import vllm
from transformers import Qwen2Config
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from verl_heddle.schedule.preempt import REFUSAL_STEPS, STARTS
from verl_heddle.verl_plugin import log, vllm_scheduler, vllm_seams
from verl_heddle.verl_plugin.compat import SUPPORTED
from verl_heddle.verl_plugin.vllm_scheduler import NOT_ENABLED, HeddleScheduler

BLOCK = 16
EAGER = {"margin": 1, "min_steps": 0, "max_preemptions": 1000}
"""Preempt as often as the order allows: what a test of bookkeeping wants."""


def next_token(tokens) -> int:
    return int.from_bytes(blake2b(repr(list(tokens)).encode(), digest_size=4).digest(), "big") % 300 + 10


class FakeWorker:
    """What a model runner keeps of a request. `v2`: as Model Runner V2 (default on GPU for many models): `slots` places, given back for
    finished and preempted ids only; resumed requests come as new ones."""

    def __init__(self, v2: bool, slots: int):
        self.v2, self.slots, self.requests = v2, slots, {}
        self.kv = defaultdict(lambda: [None] * BLOCK)

    def _update(self, out):
        for request_id in set(out.finished_req_ids) | (set(out.preempted_req_ids or ()) if self.v2 else set()):
            self.requests.pop(request_id, None)
        for new in out.scheduled_new_reqs:
            tokens = list(new.prefill_token_ids if self.v2 else new.prompt_token_ids)
            self.requests[new.req_id] = {"tokens": tokens, "blocks": list(new.block_ids[0]), "computed": new.num_computed_tokens}
            assert not self.v2 or len(self.requests) <= self.slots, "no free place in the worker"
        cached = out.scheduled_cached_reqs
        for request_id, computed, blocks in zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True):
            mine = self.requests[request_id]
            mine["computed"] = computed
            if request_id in cached.resumed_req_ids:
                assert request_id in cached.all_token_ids, "resumed without its tokens"
                mine["blocks"], mine["tokens"] = list(blocks[0]), list(cached.all_token_ids[request_id])
            elif blocks:
                mine["blocks"] += blocks[0]

    def run(self, out) -> ModelRunnerOutput:
        self._update(out)
        sampled = {}
        for request_id, number in out.num_scheduled_tokens.items():
            mine = self.requests[request_id]
            tokens, blocks, end = mine["tokens"], mine["blocks"], mine["computed"] + number
            assert end <= len(tokens), "asked to read tokens it was not given"
            assert end <= len(blocks) * BLOCK, "no block for the position"
            for position in range(end):
                place, mark = self.kv[blocks[position // BLOCK]], (position, hash(tuple(tokens[: position + 1])))
                if position < mine["computed"]:
                    assert place[position % BLOCK] == mark, f"wrong KV for {request_id} at {position}"
                place[position % BLOCK] = mark
            sampled[request_id] = [next_token(tokens)] if end == len(tokens) else []
            tokens += sampled[request_id]
        return ModelRunnerOutput(list(sampled), {name: i for i, name in enumerate(sampled)}, [list(one) for one in sampled.values()])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("config_only")
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen2Config(architectures=["Qwen2ForCausalLM"], **shape).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(model, monkeypatch):
    """Builds a scheduler as the engine core does."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def build(cls=HeddleScheduler, settings=EAGER, blocks=400, slots=4, depth=2, v2=False, policy="priority"):
        shape = {"max_model_len": 1024, "max_num_seqs": slots, "max_num_batched_tokens": 256, "block_size": BLOCK}
        monkeypatch.setenv(vllm_scheduler.SETTINGS, json.dumps(settings or {}))
        arguments = EngineArgs(model=model, skip_tokenizer_init=True, dtype="float32", scheduling_policy=policy, **shape)
        config = arguments.create_engine_config()
        config.scheduler_config.async_scheduling = depth > 1
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        kv = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        outputs = StructuredOutputManager(config)
        scheduler = cls(vllm_config=config, kv_cache_config=kv, structured_output_manager=outputs, block_size=BLOCK, log_stats=True)
        scheduler.use_v2_model_runner = v2
        return scheduler

    init_none_hash(sha256)
    return build


def request(name, prompt, tokens, priority, arrival=0.0):
    sampling, hasher = SamplingParams(max_tokens=tokens, ignore_eos=True), get_request_block_hasher(BLOCK, sha256)
    return Request(f"{name}-{0:08x}", prompt, sampling, None, priority=priority, block_hasher=hasher, arrival_time=arrival)


def drive(scheduler, arrivals, depth=2, disturb=lambda scheduler: None):
    """Run until all is done. `arrivals`: (step, request), sorted. Returns the steps taken."""
    worker = FakeWorker(scheduler.use_v2_model_runner, scheduler.max_num_running_reqs)
    todo, flight, step = deque(arrivals), deque(), 0
    while todo or scheduler.has_requests() or flight:
        while todo and todo[0][0] <= step:
            scheduler.add_request(todo.popleft()[1])
        disturb(scheduler)
        step += 1
        assert step < 50_000, "no progress"
        if scheduler.has_requests():
            out = scheduler.schedule()
            flight.append((out, worker.run(out)))
            if len(flight) < depth and out.total_num_scheduled_tokens:
                continue
        if flight:
            scheduler.update_from_output(*flight.popleft())
    return step


def right(one: Request) -> bool:
    tokens, start = list(one.all_token_ids), one.num_prompt_tokens
    return len(tokens) == start + one.max_tokens and all(tokens[i] == next_token(tokens[:i]) for i in range(start, len(tokens)))


def crowd(seed: int, number: int = 70):
    chance, made = random.Random(seed), []
    for i in range(number):
        prompt, tokens = [chance.randrange(10, 300) for _ in range(chance.choice([5, 40, 120]))], chance.choice([1, 7, 60, 150])
        made.append((chance.randrange(number * 6), request(f"r{i}", prompt, tokens, chance.randrange(10), float(i))))
    return sorted(made, key=lambda one: one[0])


def trouble(seed: int, aborted: set[str]):
    """Random aborts and random new priorities of live requests."""
    chance = random.Random(seed)

    def disturb(scheduler):
        alive = list(scheduler.requests)
        if alive and chance.random() < 0.02:
            one = chance.choice(alive)
            aborted.add(one)
            scheduler.finish_requests(one, RequestStatus.FINISHED_ABORTED)
        if alive and chance.random() < 0.1:
            assert scheduler.set_priorities({chance.choice(alive).rpartition("-")[0]: chance.randrange(10)}) in (0, 1)

    return disturb


def test_the_installed_release_is_a_supported_one_and_as_we_know_it():
    assert vllm.__version__.split("+")[0] in SUPPORTED["vllm"]
    assert vllm_seams.mismatch() is None


def test_objects_have_what_we_read(make):
    scheduler = make(settings={"margin": 2, "min_steps": 3})
    assert (scheduler.rule.margin, scheduler.rule.min_steps) == (2, 3)
    assert vllm_seams.missing(scheduler) is None
    assert all(hasattr(request("a", [1], 1, 0), name) for name in vllm_seams.REQUEST_ATTRIBUTES)


@pytest.mark.parametrize("v2", [False, True], ids=["runner_v1", "runner_v2"])
@pytest.mark.parametrize("blocks", [400, 30], ids=["enough_kv", "kv_short"])
@pytest.mark.parametrize("depth", [2, 1], ids=["asynchronous", "synchronous"])
def test_nothing_is_lost_in_flight(make, depth, blocks, v2):
    scheduler = make(depth=depth, blocks=blocks, v2=v2)
    free, arrivals, aborted = scheduler.counts()["free_blocks"], crowd(blocks + v2), set()
    drive(scheduler, arrivals, depth, trouble(1, aborted))
    counts = scheduler.counts()
    assert len(aborted) > 3 and all(right(one) for _, one in arrivals if one.request_id not in aborted)
    assert (counts["free_blocks"], counts["requests"], counts["running"], counts["waiting"]) == (free, 0, 0, 0)
    assert counts["rule_on"] == 1 and counts["preempted_by_rule"] > (10 if blocks == 400 else 5)  # with little KV slots are seldom full
    assert sum(one.num_preemptions for _, one in arrivals) == counts["preempted_by_rule"] + counts["preempted_by_vllm"]
    assert blocks > 30 or counts["preempted_by_vllm"] > 0


@pytest.mark.parametrize("depth", [2, 1], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize("settings", [EAGER, {"enable": False}], ids=["rule_on", "rule_off"])
def test_limits_end_requests_early_and_leave_nothing(make, depth, settings):
    """Set while requests run, wait, and are thrown out; one that is beyond its limit ends within two steps' tokens."""
    scheduler, chance = make(depth=depth, settings=settings, blocks=60), random.Random(depth)
    free, arrivals, asked, beyond = scheduler.counts()["free_blocks"], crowd(5), {}, {}
    tokens = {one.request_id: one.max_tokens for _, one in arrivals}

    def disturb(scheduler):
        if scheduler.requests and chance.random() < 0.1:
            name = chance.choice(list(scheduler.requests))
            limit = chance.randrange(1, 80)
            asked[name] = min(limit, asked.get(name, limit))
            ((short, got),) = scheduler.set_limits({name.rpartition("-")[0]: limit, "nobody": 5}).items()
            beyond[name] = max(got, beyond.get(name, 0)) if got >= asked[name] else beyond.get(name, 0)
            assert name.startswith(short)

    drive(scheduler, arrivals, depth, disturb)
    ended = {one.request_id: one.num_output_tokens for _, one in arrivals}
    assert len(asked) > 10 and any(beyond.values())
    for name, length in ended.items():
        most = min(tokens[name], asked.get(name, tokens[name]))
        assert length == most or beyond.get(name, 0) <= length <= beyond[name] + 2
    counts = scheduler.counts()
    assert (counts["free_blocks"], counts["requests"], counts["running"], counts["waiting"]) == (free, 0, 0, 0)


class ResumesAtOnce(HeddleScheduler):
    """Without the first precaution: the worst running one is thrown out now and then, for nobody, and stays in the queue."""

    def schedule(self, *args, **kwargs):
        self.step += 1
        if self.step % 7 == 0 and self.running:
            self.running.remove(victim := max(self.running))
            self._preempt_request(victim, 0.0)
        return AsyncScheduler.schedule(self, *args, **kwargs)


class TellsNobody(HeddleScheduler):
    """Without the second precaution: the victims of the rule are missing from the step's preempted ids."""

    def _make_way(self):
        self.hidden = super()._make_way()
        return self.hidden

    def schedule(self, *args, **kwargs):
        out = super().schedule(*args, **kwargs)
        out.preempted_req_ids.difference_update(victim.request_id for victim in self.hidden)
        return out


@pytest.mark.parametrize(("cls", "depth", "v2"), [(ResumesAtOnce, 1, False), (TellsNobody, 2, True)])
def test_both_precautions_are_needed(make, cls, depth, v2):
    with pytest.raises((AssertionError, KeyError)):
        drive(make(cls, depth=depth, v2=v2), crowd(0), depth)


@pytest.mark.parametrize("depth", [2, 1], ids=["asynchronous", "synchronous"])
def test_a_long_one_starts_in_the_step_that_first_sees_it(make, depth):
    scheduler = make(settings=None, depth=depth)
    shorts = [(0, request(f"s{i}", [20 + i] * 30, 60, -1)) for i in range(6)]
    late = [(20, request("long", [90] * 30, 100, -40))]
    drive(scheduler, shorts + late, depth)
    counts = scheduler.counts()
    assert counts["preempted_by_rule"] == counts["winners_started"] == counts["winners_waited_steps"] == 1
    assert counts["recomputed_tokens"] < BLOCK + depth
    assert all(right(one) for _, one in shorts + late)


def test_equal_priorities_never_preempt(make):
    scheduler = make()
    drive(scheduler, [(2 * i, request(f"e{i}", [20 + i] * 30, 40, 5, float(i))) for i in range(12)])
    assert scheduler.counts()["preempted_by_rule"] == 0 and scheduler.counts()["refused_margin"] > 0


def test_live_priorities_move_running_and_waiting_requests(make):
    scheduler = make(slots=2, settings=EAGER | {"ageing_per_s": 0})
    ones = {name: request(name, [ord(name)] * 30, 80, priority) for name, priority in (("a", 1), ("b", 2), ("c", 9))}
    found = []

    def disturb(scheduler):
        if scheduler.step == 10 and not found:
            found.append(scheduler.set_priorities({"c": 0, "a": 50, "nobody": 3}))

    drive(scheduler, [(0, one) for one in ones.values()], disturb=disturb)
    assert found == [2] and [one.priority for one in ones.values()] == [50, 2, 0]
    assert [one.num_preemptions for one in ones.values()] == [1, 0, 0]
    assert all(map(right, ones.values()))


def test_an_older_request_is_overtaken_only_for_a_while(make):
    scheduler = make(slots=1, settings={"ageing_per_s": 1.0})
    for name, priority, arrival in (("new", 0, 30.0), ("old", 10, 0.0), ("run", 0, 0.0)):
        scheduler.add_request(request(name, [3], 5, priority, arrival))
    assert [one.request_id[:3] for one in scheduler.waiting] == ["run", "old", "new"]


def steady(make, monkeypatch, settings, waiting=40):
    """Four long requests run, many worse ones wait; returns the scheduler and the steps in which the rule was asked."""
    scheduler, asked = make(settings=settings, slots=4, blocks=400), []
    plan = scheduler._plan

    def watched():
        asked.append(scheduler.step)
        return plan()

    monkeypatch.setattr(scheduler, "_plan", watched)
    running = [(0, request(f"run{i}", [20 + i] * 30, 200, -5)) for i in range(4)]
    return scheduler, asked, running + [(1, request(f"w{i}", [50 + i] * 30, 1, 5, 1.0 + i)) for i in range(waiting)]


def test_a_refusal_holds_until_something_changes(make, monkeypatch):
    """While four requests decode 200 tokens, nobody comes or goes: it is asked in few of the steps, and counted as refusing in all."""
    scheduler, asked, arrivals = steady(make, monkeypatch, EAGER)
    drive(scheduler, arrivals)
    while_running = [step for step in asked if step <= 200]
    assert len(while_running) <= 200 // REFUSAL_STEPS + 5
    assert scheduler.counts()["refused_margin"] >= 190


def test_what_changes_a_refusal_is_seen_in_the_next_step(make, monkeypatch):
    """A new best one, a new priority of a waiting one and of a running one."""
    scheduler, _, arrivals = steady(make, monkeypatch, EAGER)
    seen = {}

    def disturb(scheduler):
        if scheduler.step in (21, 41, 61):
            seen[scheduler.step] = scheduler.counts()["preempted_by_rule"]
        if scheduler.step == 21:
            scheduler.add_request(request("new", [9] * 30, 150, -20, 99.0))
        if scheduler.step == 41:
            assert scheduler.set_priorities({"w30": -30}) == 1
        if scheduler.step == 61:
            assert scheduler.set_priorities({"run0": 40, "run1": 40, "run2": 40}) == 3
        if scheduler.step in (22, 42, 62):
            assert scheduler.counts()["preempted_by_rule"] > seen[scheduler.step - 1]

    drive(scheduler, arrivals, disturb=disturb)
    assert len(seen) == 3


def test_few_are_thrown_out_in_one_step(make):
    """Thirty requests run, sixty better ones come: never more than `STARTS` victims in a step."""
    scheduler, most = make(slots=30, blocks=900), []
    arrivals = [(0, request(f"run{i}", [20 + i] * 30, 60, 5)) for i in range(30)]
    arrivals += [(20, request(f"w{i}", [60 + i] * 30, 60, -50)) for i in range(60)]
    before = [0]

    def disturb(scheduler):
        now = scheduler.counts()["preempted_by_rule"]
        most.append(now - before[0])
        before[0] = now

    drive(scheduler, arrivals, disturb=disturb)
    assert max(most) == STARTS and sum(most) >= 30 and all(right(one) for _, one in arrivals)


@pytest.mark.parametrize("call", ["set_priorities", "set_limits", "counts"])
def test_a_call_that_cannot_be_answered_raises_nothing_in_the_engine(make, monkeypatch, call):
    from vllm.v1.engine.core import EngineCore

    scheduler = make()
    monkeypatch.setattr(scheduler, call, lambda *_: 1 // 0)
    core = object.__new__(EngineCore)
    core.scheduler = scheduler
    assert getattr(core, f"heddle_{call}")(*([] if call == "counts" else [{"a": 1}])) in (0, {})


@pytest.mark.parametrize(
    ("broken", "policy", "settings", "why"),
    [
        ("Scheduler.schedule takes (self)", "priority", EAGER, "differs"),
        (None, "fcfs", EAGER, "fcfs"),
        (None, "priority", {"margin": 0}, "margin must be"),
        (None, "priority", {"margn": 2}, "margn"),
        (None, "priority", {"enable": False}, NOT_ENABLED),
    ],
)
def test_off_means_vllms_own_scheduling_and_one_line(make, monkeypatch, capsys, broken, policy, settings, why):
    monkeypatch.setattr(vllm_scheduler, "MISMATCH", broken)
    monkeypatch.setattr(log, "_said", set())
    scheduler, stock = make(settings=settings, policy=policy), make(AsyncScheduler, None, policy=policy)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("heddle:")]
    assert scheduler.rule is None and why in scheduler.off
    assert said == [] if why == NOT_ENABLED else len(said) == 1 and why in said[0], "nobody misses what nobody asked for"
    ours, theirs = crowd(3, 30), crowd(3, 30)
    assert drive(scheduler, ours) == drive(stock, theirs)
    assert [(one.num_preemptions, one.priority) for _, one in ours] == [(one.num_preemptions, one.priority) for _, one in theirs]
    assert scheduler.counts()["rule_on"] == 0 and scheduler.set_priorities({"r0": 3}) == 0


def test_a_rule_that_raises_is_switched_off_and_nothing_is_lost(make, monkeypatch):
    scheduler, arrivals = make(), crowd(4, 30)

    def disturb(scheduler):
        if scheduler.step == 40:
            monkeypatch.setattr(vllm_scheduler, "preemptions", lambda *_: 1 // 0)

    drive(scheduler, arrivals, disturb=disturb)
    assert "ZeroDivisionError" in scheduler.off and all(right(one) for _, one in arrivals)
