"""What is run: small workloads, policies, slots. One `Configuration` with one seed is one run, for the engines and for the simulator.

Sizes: a turn is about 60 tokens, on these engines half a second; a run of 16 or 24 trajectories takes 6 to 25 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from verl_heddle.fleet import Replica
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.simulate.workload import walk
from verl_heddle.traces import Tool, Workload, generate, replayable
from verl_heddle.trajectory import Outcome, Trajectory, TrajectoryEnd, TrajectoryId, TurnStart

REPLICAS = ("replica_0", "replica_1")
MAX_SLOTS = 8
BATCH_TOKENS = 2048
"""vLLM `max_num_batched_tokens`: above every prompt here, so one step prefills a prompt."""
BLOCK_TOKENS = 32
"""vLLM's CPU kernels want a multiple of 32; the CPU default of 128 would leave most of a turn uncached."""

SKEWS = {"light": (0.20, 0.15), "heavy": (0.85, 0.35)}
"""Spread of log length (between prompts, within a prompt): longest over mean about 1.5 and 3 in a run."""
TOOL_MEAN_S = {"none": 0.0, "short": 0.2, "long": 1.2}
"""Mean tool time: nothing, a third of a turn's generation, twice that generation."""

SMALL = Workload(
    name="replay",
    median_tokens=220.0,
    prompt_sigma=0.2,
    sample_sigma=0.15,
    spread_sigma=0.0,
    median_turns=4.0,
    turns_per_length=0.5,
    turns_sigma=0.3,
    turn_token_sigma=0.4,
    late_growth=0.5,
    prompt_tokens=150.0,
    prompt_tokens_sigma=0.4,
    input_tokens=50.0,
    input_tokens_sigma=0.5,
    tool_mean_s=1.0,
    tools=(Tool("sleep", 1.0, 1.0, 0.7),),
    cap_tokens=1200,
    max_turns=10,
    max_input_tokens=150,
)


@dataclass(frozen=True, slots=True)
class Configuration:
    """`policy`: `stock` verl (sticky, least in-flight, first come first served); `known`: longest remaining first, with each prompt's true
    length in the history; `history`: the same with groups of 4 whose prompts were seen once before. `placed`: `unlucky` gives the
    longest trajectories to one replica, as far as verl's rule lets that happen."""

    policy: Literal["stock", "known", "history"]
    slots: int
    skew: Literal["light", "heavy"]
    tools: Literal["none", "short", "long"]
    placed: Literal["as it comes", "unlucky"] = "as it comes"
    prompts: int = 24
    kv_share: float | None = None
    preempt: bool = False

    @property
    def name(self) -> str:
        """For tables and files."""
        extra = ["unlucky"] * (self.placed == "unlucky") + ["kv"] * (self.kv_share is not None) + ["preempt"] * self.preempt
        return "-".join([self.policy, str(self.slots), self.skew, self.tools, *extra])

    @property
    def order(self) -> Literal["fcfs", "priority"]:
        """vLLM's `scheduling_policy`."""
        return "fcfs" if self.policy == "stock" else "priority"

    def kv_tokens(self, seed: int) -> int | None:
        """KV cache of a replica: its share of all contexts at their ends, at least the longest of them, in whole blocks."""
        if self.kv_share is None:
            return None
        ends = [max(context + output for context, _, output in walk(replayable(item))) for item in self.work(seed)[0]]
        wanted = max(self.kv_share * sum(ends) / len(REPLICAS), max(ends) + BLOCK_TOKENS)
        return -(-round(wanted) // BLOCK_TOKENS) * BLOCK_TOKENS

    def options(self, seed: int) -> Options:
        """The plugin's settings."""
        options = Options.longest(observe=self.policy == "stock", seed=seed)
        options.priority.refresh_s = 0.0  # vLLM's own scheduler takes no new priorities
        options.priority.quantum_tokens = 1 if self.policy == "known" and not self.preempt else 64
        return options

    def work(self, seed: int) -> tuple[list[Trajectory], list[TrajectoryEnd]]:
        """The trajectories in order of submission, and what the policy has seen before."""
        between, within = SKEWS[self.skew]
        law = replace(SMALL, prompt_sigma=between, sample_sigma=within, tool_mean_s=TOOL_MEAN_S[self.tools] or 1.0)
        if self.policy == "history":
            drawn = generate(law, self.prompts // 4, 8, seed)
            items, seen = [one for one in drawn if one.trial >= 4], [one for one in drawn if one.trial < 4]
        else:
            items = generate(law, self.prompts, 1, seed)
            seen = items if self.policy == "known" else []
        if self.tools == "none":
            items = [replace(item, steps=tuple(replace(turn, tool=None, tool_latency_s=None) for turn in item.steps)) for item in items]
        if self.placed == "unlucky":
            items = unlucky(items, self.options(seed))
        return items, [_end(item) for item in seen]


def unlucky(items: Sequence[Trajectory], options: Options) -> list[Trajectory]:
    """The same trajectories in an order of submission that brings the longest of them to the first replica."""
    policy = Orchestrator(options)
    policy.replicas_added(Replica(name) for name in REPLICAS)
    homes = []
    for number in range(len(items)):
        who = TrajectoryId(str(number), str(number), 0, 0)
        homes.append(policy.turn_started(TurnStart(who, who.key, 0, 1, 0), 0.0).replica)
    longest = iter(sorted(items, key=lambda item: -item.output_tokens))
    placed = {number: next(longest) for name in REPLICAS for number, home in enumerate(homes) if home == name}
    return [placed[number] for number in range(len(items))]


def _end(item: Trajectory) -> TrajectoryEnd:
    who = TrajectoryId(item.prompt_id, f"before:{item.prompt_id}", item.trial, -1)
    return TrajectoryEnd(who, Outcome.FINISHED, item.output_tokens, len(item.steps))


CALIBRATION = (
    Configuration("stock", 8, "heavy", "short"),
    Configuration("stock", 4, "light", "none", prompts=16),
)
"""Recorded for `calibrate` only: stock verl, batches from 1 to 8 and contexts to the longest."""

PREDICTED = (
    Configuration("stock", 4, "light", "short"),
    Configuration("known", 2, "heavy", "short", prompts=16),
    Configuration("stock", 8, "heavy", "long"),
    Configuration("history", 4, "heavy", "short"),
    Configuration("stock", 2, "light", "none", prompts=16),
    Configuration("known", 4, "heavy", "none"),
    Configuration("stock", 4, "heavy", "none", "unlucky"),
    Configuration("history", 8, "light", "long"),
)

KV_SHARE = 0.25
KV_BOUND = (
    Configuration("stock", 8, "light", "short", kv_share=KV_SHARE),
    Configuration("stock", 8, "heavy", "long", kv_share=KV_SHARE),
    Configuration("known", 8, "heavy", "short", kv_share=KV_SHARE),
    Configuration("history", 8, "heavy", "short", kv_share=KV_SHARE, preempt=True),
)
"""What the larger gains are claimed for: contexts that do not fit, so that vLLM throws turns out and reads contexts again."""
