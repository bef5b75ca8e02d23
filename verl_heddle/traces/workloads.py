"""Define the parameters of generated agentic workloads, with the three of the Heddle paper: coding, search, math.

The source of each number is given next to it. "Heddle" is arXiv 2603.28101, which reports tool means, group size and output cap but no
length distribution. The rest is fitted to public traces ("tbench_mini": Terminal-Bench runs; "bfcl_vllm": tool calling of an open model
on vLLM; "balrog_cot": long reasoning; "DAPO log": 3,072 groups of 16 math samples) or marked *assumed*. A workload therefore combines
sources and must be labelled synthetic wherever its results are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import erf, exp, log, sqrt
from typing import TypedDict

from verl_heddle.traces.schema import TraceError

BETWEEN_SHARE = 0.7
"""Default share of the variance of log length that lies between prompts: 62 to 83 % in seven public traces, 72 % in the DAPO log."""

TOOL_TIMEOUT_S = 30.0
"""Longest tool call: agents in tbench_mini time out after 30 s."""

_SIGMA = (0.0, 5.0)  # a factor of 150 per standard deviation: more is a mistake and would overflow floats
_RANGES: Mapping[str, tuple[float, float]] = {  # integer bounds mark integer parameters
    "median_tokens": (1.0, 1e9),
    "prompt_sigma": _SIGMA,
    "sample_sigma": _SIGMA,
    "spread_sigma": _SIGMA,
    "median_turns": (1.0, 1e6),
    "turns_per_length": (0.0, 2.0),
    "turns_sigma": _SIGMA,
    "turn_token_sigma": _SIGMA,
    "late_growth": (0.0, 2.0),
    "prompt_tokens": (1.0, 1e9),
    "prompt_tokens_sigma": _SIGMA,
    "input_tokens": (1.0, 1e9),
    "input_tokens_sigma": _SIGMA,
    "tool_mean_s": (0.0, 1e6),
    "tool_prompt_share": (0.0, 1.0),
    "tool_timeout_s": (1e-3, 1e6),
    "cap_tokens": (1, 10**9),
    "max_turns": (1, 10**6),
    "max_input_tokens": (1, 10**9),
}


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool: how often it is called and how long it takes, relative to the other tools of its workload."""

    name: str
    share: float
    """Share of the workload's calls; shares add up to 1."""
    median_s: float
    """Median seconds, before the workload scales all tools to its `tool_mean_s`."""
    sigma: float
    """Standard deviation of log seconds."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Distribution of one kind of trajectory. Logarithms are natural; a `sigma` is the standard deviation of a logarithm.

    The uncapped length of a trajectory is log-normal: `log(median_tokens) + prompt_sigma * z_prompt + sample_sigma * s_prompt * z_sample`,
    all z standard normal, s_prompt log-normal with mean square 1 and sigma `spread_sigma`. The number of turns is the rounded
    `median_turns * (length / median_tokens) ** turns_per_length * exp(turns_sigma * z)`, the length is split over the turns by log-normal
    weights (growing over the turns by `late_growth`), and the trajectory is cut when its output reaches `cap_tokens`. Every turn but the
    last calls a tool.
    """

    name: str
    median_tokens: float
    """Median generated tokens of a trajectory before the cap."""
    prompt_sigma: float
    """Spread of log length between prompts (prompt effect)."""
    sample_sigma: float
    """Spread of log length between samples of one prompt (root mean square over prompts)."""
    spread_sigma: float
    """How much `sample_sigma` varies between prompts; 0 = not at all."""
    median_turns: float
    """Turns of a trajectory of median length."""
    turns_per_length: float
    """Elasticity of the number of turns with respect to length: 0 = unrelated, 1 = turns of constant size."""
    turns_sigma: float
    """Spread of the number of turns at a given length."""
    turn_token_sigma: float
    """Spread of tokens per turn within one trajectory."""
    late_growth: float
    """Which turns are longer in a trajectory that is long for its number of turns: 0 = all equally, so early turns predict the length;
    2 = only late ones. In public traces early turns predict little, except for long reasoning."""
    prompt_tokens: float
    """Median tokens before the first generation."""
    prompt_tokens_sigma: float
    input_tokens: float
    """Median tokens that a tool result adds to the context."""
    input_tokens_sigma: float
    tool_mean_s: float
    """Mean seconds of a tool call; all tools are scaled by one factor to match it."""
    tools: tuple[Tool, ...]
    tool_prompt_share: float = 0.14
    """Share of the variance of log tool time, given the tool, that lies between prompts (tbench_mini)."""
    tool_timeout_s: float = TOOL_TIMEOUT_S
    cap_tokens: int = 40_960
    """Output cap of a trajectory (Heddle: "40K")."""
    max_turns: int = 100
    """Turn limit (*assumed*; the 90 % quantile of balrog_cot)."""
    max_input_tokens: int = 4096
    """Tool results are truncated to this length (*assumed*; the 99 % quantile of tbench_mini)."""

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float if isinstance(low, float) else int) or not low <= value <= high:
                kind = "a number" if isinstance(low, float) else "a whole number"
                raise TraceError(f"got {value!r}", allowed=f"{kind} from {low:g} to {high:g}", field=f"{self.name}.{name}")
        if not self.tools or any(tool.share < 0 or tool.median_s <= 0 or tool.sigma < 0 for tool in self.tools):
            raise TraceError(
                "no tools, or one with a negative share or sigma or a median of 0 or less",
                allowed="at least one valid tool",
                field=f"{self.name}.tools",
            )
        if abs(sum(tool.share for tool in self.tools) - 1) > 1e-6:
            raise TraceError(f"shares add up to {sum(tool.share for tool in self.tools):g}", allowed="1", field=f"{self.name}.tools")
        if self.tool_mean_s > 0.5 * self.tool_timeout_s:  # closer to the timeout, the scale would grow without bound
            raise TraceError(f"got {self.tool_mean_s:g}", allowed="at most half of tool_timeout_s", field=f"{self.name}.tool_mean_s")

    @property
    def between_share(self) -> float:
        """Share of the variance of log length between prompts, before the cap; 0 if all lengths are equal."""
        total = self.prompt_sigma**2 + self.sample_sigma**2
        return self.prompt_sigma**2 / total if total else 0.0

    @property
    def tool_scale(self) -> float:
        """Factor on every tool's median that makes the mean over all calls, timeouts included, equal `tool_mean_s`."""
        low, high = log(1e-9), log(1e9)
        for _ in range(80):  # bisection: the mean grows with the scale; a range of 41 halved 80 times is far below float resolution
            middle = (low + high) / 2
            mean = sum(t.share * _capped_mean(log(t.median_s) + middle, t.sigma, self.tool_timeout_s) for t in self.tools)
            low, high = (middle, high) if mean < self.tool_mean_s else (low, middle)
        return exp(low)


class LengthSpread(TypedDict):
    """The two spreads of log length of a `Workload`."""

    prompt_sigma: float
    sample_sigma: float


def split_variance(sigma: float, between_share: float) -> LengthSpread:
    """Split a total spread `sigma` of log length into `prompt_sigma` and `sample_sigma`, for sensitivity checks.

    Raises:
        TraceError: a negative sigma, or a share outside 0 to 1.
    """
    if not sigma >= 0 or not 0 <= between_share <= 1:
        raise TraceError(f"got sigma {sigma:g}, between_share {between_share:g}", allowed="sigma from 0, between_share from 0 to 1")
    return {"prompt_sigma": sigma * sqrt(between_share), "sample_sigma": sigma * sqrt(1 - between_share)}


def _capped_mean(mu: float, sigma: float, cap: float) -> float:
    """Mean of min(X, cap) for log-normal X."""
    if sigma == 0:
        return min(exp(mu), cap)
    room = (log(cap) - mu) / sigma
    below = exp(mu + sigma**2 / 2 + log(p)) if (p := _normal(room - sigma)) > 0 else 0.0
    return below + cap * (1 - _normal(room))


def _normal(z: float) -> float:
    return (1 + erf(z / sqrt(2))) / 2


CODING = Workload(
    name="coding",
    median_tokens=7000,  # 3,463 Terminal-Bench attempts: p50 6,999, p90 20,979, p99 47,960; their sigma: log(20979 / 6999) / 1.28
    **split_variance(0.86, BETWEEN_SHARE),
    spread_sigma=0.4,  # DAPO log: the coefficient of variation of a group is 0.19 at p50 and 0.35 at p90, sampling noise of 16 removed
    median_turns=8,  # assumed: between episodes of interactive coding sessions (1 at p50, 15 at p90) and tbench_mini (18)
    turns_per_length=0.55,  # tbench_mini and sweagent
    turns_sigma=0.32,  # tbench_mini
    turn_token_sigma=0.86,  # tbench_mini
    late_growth=1.75,  # rank correlation 0.1 between tokens of the first 3 turns and the rest; -0.18 in tbench_mini, 0.26 in sweagent
    prompt_tokens=724,  # tbench_mini
    prompt_tokens_sigma=0.18,  # tbench_mini: p90 / p50
    input_tokens=62,  # tbench_mini
    input_tokens_sigma=1.6,  # tbench_mini: p90 / p50
    tool_mean_s=0.46,  # Heddle, Table 1, 8B
    # The tools are Heddle's (format check, run, test suites). Their shares and times are assumed: two distant modes, as in tbench_mini.
    tools=(Tool("format_check", 0.35, 0.02, 0.6), Tool("run_code", 0.35, 0.5, 0.8), Tool("run_tests", 0.3, 1.0, 0.9)),
)

SEARCH = Workload(
    name="search",
    median_tokens=1242,  # bfcl_vllm; Heddle says only that search is short with many steps
    **split_variance(0.52, BETWEEN_SHARE),  # bfcl_vllm: standard deviation of log length
    spread_sigma=0.4,
    median_turns=12,  # bfcl_vllm
    turns_per_length=0.39,  # bfcl_vllm
    turns_sigma=0.29,  # bfcl_vllm
    turn_token_sigma=0.67,  # bfcl_vllm
    late_growth=1.6,  # rank correlation 0.1 between tokens of the first 3 turns and the rest, as in bfcl_vllm
    prompt_tokens=2765,  # bfcl_vllm: tool schemas included
    prompt_tokens_sigma=0.15,  # bfcl_vllm: p90 / p50
    input_tokens=451,  # assumed: search results as long as the tool results of tau2_retail_cc
    input_tokens_sigma=0.72,  # tau2_retail_cc: p99 / p50
    tool_mean_s=1.42,  # Heddle, Table 1, 8B
    tools=(Tool("web_search", 0.65, 0.4, 0.35), Tool("open_page", 0.35, 3.0, 0.6)),  # assumed
)

MATH = Workload(
    name="math",
    median_tokens=8000,  # assumed: 2,000 per turn, "tens of seconds" of generation per step (Heddle); about 2.5 % reach the cap
    **split_variance(0.83, BETWEEN_SHARE),  # balrog_cot: p90 / p50
    spread_sigma=0.4,
    median_turns=4,  # assumed
    turns_per_length=0.4,  # assumed: near the smallest fitted value, since long reasoning makes turns longer
    turns_sigma=0.3,  # all fitted values
    turn_token_sigma=0.58,  # balrog_cot
    late_growth=0,  # balrog_cot: rank correlation 0.46 and 0.57 between early tokens and the rest
    prompt_tokens=56,  # math8
    prompt_tokens_sigma=0.53,  # math8: p90 / p50
    input_tokens=20,  # assumed: a number or a short expression
    input_tokens_sigma=0.8,  # assumed
    tool_mean_s=0.05,  # Heddle, Table 1, mean of the three models
    tools=(Tool("calculator", 0.6, 0.005, 0.5), Tool("solver", 0.4, 0.08, 0.8)),  # assumed
)

WORKLOADS: Mapping[str, Workload] = {workload.name: workload for workload in (CODING, SEARCH, MATH)}
