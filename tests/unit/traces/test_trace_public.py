"""The public traces, where a machine has them: every line is read and written back, and the published statistics come out.

The files are never part of the repository. Their directory is VERL_HEDDLE_TRACES, by default `../shared/traces`.
"""

import gzip
import json
import os
from pathlib import Path

import pytest

from verl_heddle.traces import TraceError, decode, episodes, read, replayable, summary, to_dict, trace_files

FOLDER = Path(os.environ.get("VERL_HEDDLE_TRACES", Path(__file__).parents[4] / "shared" / "traces"))
try:
    FILES = {file.name.split(".")[0]: file for file in trace_files(FOLDER)}
except TraceError:
    FILES = {}

pytestmark = pytest.mark.skipif(not FILES, reason="no public traces here")

# Aggregates of the eight sources: trajectories, prompts; steps p50, p90, max; output p50, p90, p99, max; longest/median p50, p90; share of
# variance inside prompts; mean of longest/mean in batches of 256; Spearman of siblings and of the first 3 turns.
TABLE = {
    "claude_code": (496, 496, (46, 154, 514), (19570, 69036, 176780, 316310), None, None, 8.0, None, 0.11),
    "bfcl_vllm": (2149, 431, (12, 17, 42), (1242, 2404, 4219, 22045), (1.31, 1.79), 0.26, 7.0, 0.77, 0.11),
    "tbench_mini": (107, 26, (18, 35, 57), (3093, 6829, 14366, 17039), (1.45, 1.98), 0.24, 4.7, 0.77, -0.18),
    "sweagent": (578, 193, (10, 16, 23), (1737, 3103, 4311, 6078), (1.27, 1.90), 0.38, 2.8, 0.43, 0.26),
    "balrog_cot": (153, 35, (100, 100, 603), (126826, 369278, 393842, 521801), (1.17, 3.40), 0.29, 2.9, 0.81, 0.46),
    "taubench": (124, 31, (11, 20, 30), (650, 1209, 1998, 2149), (1.25, 2.01), 0.31, 3.0, 0.69, -0.28),
    "tau2_retail_cc": (178, 80, (5, 6, 8), (2155, 4321, 9696, 12202), (1.09, 1.32), 0.17, 4.5, 0.77, -0.44),
    "math8": (520, 65, (1, 1, 1), (259, 371, 777, 2605), (1.14, 1.71), 0.30, 7.4, 0.82, None),
}
# Tool seconds: calls, p50, p90, p99, max, and the tools' share of the time.
TOOLS = {
    "tbench_mini": (2039, 0.03, 14.9, 30.0, 62, 0.40),
    "claude_code": (28587, 8, 72, 846, 77589, 0.91),
    "tau2_retail_cc": (761, 0.019, 0.029, 0.039, 0.046, 0.00),
}


def file_of(source: str) -> Path:
    if source not in FILES:
        pytest.skip("no public traces here")
    return FILES[source]


@pytest.mark.parametrize("source", sorted(TABLE))
def test_published_statistics(source: str) -> None:
    count, prompts, steps, output, ratio, within, batch, siblings, first_3 = TABLE[source]
    found = summary(read(file_of(source)))
    assert (found["trajectories"], found["prompts"]) == (count, prompts)
    assert tuple(found["steps"][key] for key in ("p50", "p90", "max")) == steps
    assert tuple(found["output_tokens"][key] for key in ("p50", "p90", "p99", "max")) == output
    if ratio is None:
        assert found["longest_over_median"] is None and found["within_share"] is None
    else:
        assert tuple(found["longest_over_median"][key] for key in ("p50", "p90")) == pytest.approx(ratio, abs=0.006)
        assert found["within_share"] == pytest.approx(within, abs=0.006)
    assert found["batch_max_over_mean"] == pytest.approx(batch, rel=0.06)  # random batches
    assert found["spearman"]["siblings"] == (None if siblings is None else pytest.approx(siblings, abs=0.006))
    assert found["spearman"]["first_3"] == (None if first_3 is None else pytest.approx(first_3, abs=0.006))
    if source in TOOLS:
        calls, *spread, share = TOOLS[source]
        assert found["tool_s"]["n"] == calls
        assert [found["tool_s"][key] for key in ("p50", "p90", "p99", "max")] == pytest.approx(spread, rel=0.07)
        assert found["tool_share"] == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize("source", sorted(TABLE))
def test_every_line_comes_back_as_it_was(source: str) -> None:
    with gzip.open(file_of(source)) as lines:
        for number, line in enumerate(lines, start=1):
            record = json.loads(line)
            again = to_dict(decode(line, file=source, line=number))
            assert again == record and list(again) == list(record)
            assert [list(step) for step in again["steps"]] == [list(step) for step in record["steps"]]


@pytest.mark.parametrize("source", sorted(TABLE))
def test_every_trajectory_can_be_replayed(source: str) -> None:
    for trajectory in read(file_of(source)):
        found = replayable(trajectory, max_tool_s=600)
        assert found.prompt_tokens is not None and len(found.steps) == len(trajectory.steps)
        for turn in found.steps:
            assert turn.output_tokens and turn.input_tokens is not None and turn.ctx_tokens is not None and turn.gen_s is None
            assert turn.tool_latency_s is not None and 0 <= turn.tool_latency_s <= 600
        assert "output_tokens" not in found.meta.get("assumed", ())


def test_episodes_of_conversations() -> None:
    pieces = [episode for trajectory in read(file_of("claude_code")) for episode in episodes(trajectory)]
    found = summary(pieces)
    assert len(pieces) == 5351
    assert [found["output_tokens"][key] for key in ("p50", "p90", "p99", "max")] == pytest.approx([450, 7731, 32016, 57831], rel=0.01)
    assert [found["steps"][key] for key in ("p50", "p90", "p99", "max")] == [1, 15, 79, 164]
