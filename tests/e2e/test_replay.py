"""A small replay on one real engine: lengths exactly as asked, prefix cache between turns, tools as long as asked, an ordinary trace."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.fidelity.model import make_model
from bench.fidelity.replay import Engines
from bench.fidelity.server import EngineArguments
from verl_heddle.options import Options
from verl_heddle.report.attribution import accounted
from verl_heddle.traces import read, write
from verl_heddle.trajectory import Trajectory, Turn

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

BLOCK = 32
LATE_S = 1.0
"""How late a sleep may end on a busy machine."""


def trajectory(name: str, *outputs: int, tool_s: float = 0.0) -> Trajectory:
    turns = [Turn(20 if index else 0, length, "sleep", tool_s) for index, length in enumerate(outputs)]
    turns[-1] = Turn(turns[-1].input_tokens, outputs[-1])
    return Trajectory("test", "replay", name, 0, 70, tuple(turns))


ASKED = [trajectory("a", 90, 40, tool_s=0.4), trajectory("b", 33, 1, 64, tool_s=0.2), trajectory("c", 120), trajectory("d", 1, 50)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    arguments = EngineArguments(
        str(make_model(tmp_path_factory.mktemp("model"))), max_num_seqs=4, max_num_batched_tokens=512, block_size=BLOCK
    )
    with Engines(arguments, cores=(None,)) as started:
        yield started


@pytest.fixture(scope="module")
def records(engines):
    return engines.replay(ASKED, Options(observe=True), slots=2, order="fcfs")


def test_every_length_is_exactly_as_asked(records):
    for asked, record in zip(ASKED, records, strict=True):
        assert [turn.output_tokens for turn in record.steps] == [turn.output_tokens for turn in asked.steps]
        assert [turn.input_tokens for turn in record.steps] == [turn.input_tokens for turn in asked.steps]
        assert record.steps[0].ctx_tokens == record.prompt_tokens == asked.prompt_tokens
        for before, turn in pairwise(record.steps):
            assert turn.ctx_tokens == before.ctx_tokens + before.output_tokens + 20 and not turn.ctx_reset


def test_the_next_turn_finds_all_whole_blocks_of_the_last(records):
    for record in records:
        assert record.steps[0].cached_tokens == 0, "prompts have nothing in common"
        for before, turn in pairwise(record.steps):
            assert turn.cached_tokens == (before.ctx_tokens + before.output_tokens - 1) // BLOCK * BLOCK


def test_tools_take_as_long_as_asked(records):
    for asked, record in zip(ASKED, records, strict=True):
        for index, turn in enumerate(asked.steps):
            if not turn.tool_latency_s:
                continue
            before, after = record.steps[index], record.steps[index + 1]
            assert turn.tool_latency_s <= before.tool_latency_s < turn.tool_latency_s + LATE_S
            ended = before.start_s + before.route_s + before.queue_s + before.gen_s + before.transport_s
            assert after.start_s - ended >= turn.tool_latency_s


def test_two_slots_queue_four_trajectories(records):
    assert max(turn.queue_s for record in records for turn in record.steps) > 0.1
    assert {turn.replica for record in records for turn in record.steps} == {"replica_0"}


def test_the_record_is_an_ordinary_trace(records, tmp_path):
    write(tmp_path / "trace.jsonl", records)
    assert list(read(tmp_path / "trace.jsonl")) == records
    assert all(0.99 < accounted(record) < 1.01 for record in records)
    assert {record.meta["outcome"] for record in records} == {"finished"}


def test_a_small_kv_cache_throws_turns_out_and_loses_no_token(engines):
    work = [trajectory(name, 100, 60, tool_s=0.05) for name in "efgh"]
    held = {}
    for number, (order, kv_tokens) in enumerate((("fcfs", 13 * BLOCK), ("preempt", 13 * BLOCK), ("fcfs", None)), start=1):
        records = engines.replay(work, Options.longest(observe=order == "fcfs"), 4, order, step=number, kv_tokens=kv_tokens)
        assert [[turn.output_tokens for turn in record.steps] for record in records] == [[100, 60]] * len(work)
        held[order, kv_tokens] = sum(turn.preemptions for record in records for turn in record.steps)
    assert held["fcfs", 13 * BLOCK] > 0 and held["preempt", 13 * BLOCK] > 0 and held["fcfs", None] == 0, held
