"""Generate synthetic agentic rollouts: groups of trajectories with long-tailed lengths, turns and tool times.

`Workload` defines the distributions and documents their parameters. All numbers are drawn as arrays over prompts, trajectories or
turns; Python only builds the records. Cost: about 4 microseconds per turn.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verl_heddle.traces.schema import TraceError
from verl_heddle.traces.workloads import WORKLOADS, Workload
from verl_heddle.trajectory import Trajectory, Turn

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_LENGTH = 1e12
"""Longest length drawn before the cap: keeps extreme draws of a large sigma within 64-bit integers."""

MAX_TILT = 20.0
"""Bound on the log weight of a late turn. Beyond it, one turn has all tokens anyway, and the exponential could overflow."""


def generate(
    workload: str | Workload,
    prompts: int,
    samples: int = 16,
    seed: int | np.random.Generator = 0,
    **parameters: Any,
) -> list[Trajectory]:
    """Draw `prompts` groups of `samples` trajectories (Heddle: 16), group by group; the same arguments give the same trajectories.

    `workload` is "coding", "search", "math" or a `Workload`; `parameters` replace its fields, for example
    `generate("coding", 400, tool_mean_s=2.0, **split_variance(0.86, 0.5))`.

    Each trajectory has `source` "generated", `prompt_id` `<workload>/<number>`, its sample number as `trial`, no reward and no model;
    `meta.truncated` says whether the output cap cut it. Turns have new input, output, tool and tool time; the last one has no tool.

    Raises:
        TraceError: an unknown workload or parameter, or a value outside its documented range.
    """
    law = _law(workload, parameters)
    for name, value in (("prompts", prompts), ("samples", samples)):
        if not isinstance(value, int) or value < 1:
            raise TraceError(f"got {value}", allowed="a whole number from 1", field=name)
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(prompts), samples)
    wanted = _lengths(law, prompts, samples, rng)
    turns, cut, output = _turns(law, wanted, rng)
    owner = np.repeat(prompt, turns)
    tool, seconds = _tool_calls(law, owner, prompts, rng)
    fresh = np.exp(np.log(law.input_tokens) + law.input_tokens_sigma * rng.standard_normal(len(owner)))
    fresh = np.clip(np.rint(fresh), 1, law.max_input_tokens)
    prompt_tokens = np.exp(np.log(law.prompt_tokens) + law.prompt_tokens_sigma * rng.standard_normal(prompts))
    return _records(law, samples, np.clip(np.rint(prompt_tokens), 1, MAX_LENGTH), turns, cut, fresh, output, tool, seconds)


def _law(workload: str | Workload, parameters: dict[str, Any]) -> Workload:
    if isinstance(workload, str):
        if workload not in WORKLOADS:
            raise TraceError(f"unknown workload {workload!r}", allowed=", ".join(WORKLOADS))
        workload = WORKLOADS[workload]
    known = [field.name for field in fields(Workload)]
    if unknown := sorted(set(parameters) - set(known)):
        raise TraceError("unknown parameter", allowed=", ".join(known), field=unknown[0])
    return replace(workload, **parameters)


def _lengths(law: Workload, prompts: int, samples: int, rng: np.random.Generator) -> Floats:
    """Tokens each trajectory would generate without the cap: prompts * samples values, each at least 1."""
    level = law.prompt_sigma * rng.standard_normal((prompts, 1))
    spread = law.sample_sigma * np.exp(law.spread_sigma * rng.standard_normal((prompts, 1)) - law.spread_sigma**2)  # keeps E[spread**2]
    logs = np.log(law.median_tokens) + level + spread * rng.standard_normal((prompts, samples))
    lengths: Floats = np.rint(np.exp(np.clip(logs, 0, np.log(MAX_LENGTH)))).ravel()
    return lengths


def _turns(law: Workload, wanted: Floats, rng: np.random.Generator) -> tuple[Ints, NDArray[np.bool_], Ints]:
    """Turns per trajectory, whether the cap cut it, and the output tokens of every turn, trajectory by trajectory."""
    usual = np.log(law.median_turns) + law.turns_per_length * np.log(wanted / law.median_tokens)
    turns = np.exp(np.clip(usual + law.turns_sigma * rng.standard_normal(len(wanted)), 0, np.log(law.max_turns)))
    turns = np.minimum(np.rint(turns), wanted).astype(np.int64)

    ends = np.cumsum(turns)
    rank = np.arange(ends[-1]) - np.repeat(ends - turns, turns) + 1
    # Log size of the mean turn, relative to a median trajectory.
    excess = np.log(wanted / turns) - np.log(law.median_tokens / law.median_turns)
    tilt = np.repeat(law.late_growth * excess / turns, turns) * (rank - 0.5)
    weight = np.exp(np.clip(tilt, -MAX_TILT, MAX_TILT) + law.turn_token_sigma * rng.standard_normal(ends[-1]))
    # Weights are normalised to sum to 1 per trajectory, so one running sum serves all.
    upto = np.cumsum(weight / np.repeat(np.add.reduceat(weight, ends - turns), turns))
    share = np.clip(upto - np.repeat(np.arange(len(turns)), turns), 0, 1)
    sums = np.floor(share * np.repeat(wanted - turns, turns)).astype(np.int64) + rank  # every turn gets 1, the rest by weight
    sums[ends - 1] = wanted  # rounding of the shares must not change the total

    before = np.concatenate([[0], sums[:-1]])
    before[ends - turns] = 0
    kept = before < law.cap_tokens
    output = np.minimum(sums, law.cap_tokens)[kept] - before[kept]
    return np.add.reduceat(kept, ends - turns).astype(np.int64), wanted > law.cap_tokens, output


def _tool_calls(law: Workload, owner: Ints, prompts: int, rng: np.random.Generator) -> tuple[Ints, Floats]:
    """A tool and its seconds for every turn; `owner` is the turn's prompt. A slow prompt is slow for all tools."""
    tool = rng.choice(len(law.tools), size=len(owner), p=np.array([tool.share for tool in law.tools]))
    middle = (np.log([tool.median_s for tool in law.tools]) + np.log(law.tool_scale))[tool]
    sigma = np.array([tool.sigma for tool in law.tools])[tool]
    z = np.sqrt(law.tool_prompt_share) * rng.standard_normal(prompts)[owner]
    z += np.sqrt(1 - law.tool_prompt_share) * rng.standard_normal(len(owner))
    seconds = np.minimum(np.exp(middle + sigma * z), law.tool_timeout_s)
    return tool, np.round(seconds, 6)  # microseconds: no source measures finer, and trace files get shorter


def _records(
    law: Workload,
    samples: int,
    prompt_tokens: Floats,
    turns: Ints,
    cut: NDArray[np.bool_],
    fresh: Floats,
    output: Ints,
    tool: Ints,
    seconds: Floats,
) -> list[Trajectory]:
    """Build records from the arrays; a turn's new input is the result of the previous turn's tool."""
    ends = np.cumsum(turns)
    fresh[ends - turns] = 0
    tool_names = [kind.name for kind in law.tools]
    names: list[str | None] = [tool_names[index] for index in tool.tolist()]
    times: list[float | None] = list(seconds.tolist())
    for last in (ends - 1).tolist():
        names[last] = times[last] = None
    steps = list(map(Turn, fresh.astype(np.int64).tolist(), output.tolist(), names, times))
    prompts = prompt_tokens.astype(np.int64).tolist()
    return [
        Trajectory(
            source="generated",
            workload=law.name,
            prompt_id=f"{law.name}/{index // samples:06d}",
            trial=index % samples,
            prompt_tokens=prompts[index // samples],
            steps=tuple(steps[end - count : end]),
            meta={"group": "same_prompt", "truncated": truncated},
        )
        for index, (end, count, truncated) in enumerate(zip(ends.tolist(), turns.tolist(), cut.tolist(), strict=True))
    ]
