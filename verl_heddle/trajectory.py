"""Data types of a rollout: identities, events and decisions while it runs, and the record of it afterwards.

Two groups. `TrajectoryId`, `TurnStart`, `TurnEnd`, `ToolStart`, `TrajectoryEnd`, `Decision` and `Prewarm` are exchanged between the
`Orchestrator` and the cluster or the simulator during a step. `Turn` and `Trajectory` are records, one JSON line per trajectory, from a
live run, a public trace or a generator (`verl_heddle.traces` reads and writes them).

Units: tokens are counts, durations are seconds, times are seconds on one caller-chosen clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import StrEnum
from math import inf
from operator import attrgetter
from typing import Any


def travels(cls: Any) -> Any:
    """Class decorator for a frozen dataclass with slots and at least two fields, sent between processes by the thousand: pickles an object
    as a call of its class, in half the time of the default."""
    values = attrgetter(*(item.name for item in fields(cls) if item.init))
    cls.__reduce__ = lambda self: (type(self), values(self))
    return cls


class Reason(StrEnum):
    """Why a turn went to its replica; counted as the metric `heddle/decisions/<reason>`."""

    LEAST_INFLIGHT = "least_inflight"
    """First turn of a conversation: the replica with the fewest requests in flight (verl's own rule)."""

    STICKY = "sticky"
    """Later turn: the replica that holds the conversation's prefix cache (verl's own rule)."""

    HASHED = "hashed"
    """`rollout.full_determinism`: the replica the request id hashes to (verl's own rule)."""

    ADMITTED = "admitted"
    """The trajectory was not resident: the replica that held its context last, or the one with the fewest requests in flight, among those
    with room for it."""

    PLANNED = "planned"
    """First turn, or its replica left: the replica with which the step is expected to end clearly sooner, else that of verl's rule."""

    MOVED = "moved"
    """Later turn: a replica that is expected to end sooner than its own by more than the move costs."""

    NOT_PAYING = "not_paying"
    """First turn: the replica of verl's rule, because planning has not paid over the last steps."""

    FALLBACK_POLICY = "fallback_policy"
    """The orchestrator raised; the router applied verl's own rule."""

    FALLBACK_ROUTER = "fallback_router"
    """The router did not answer in time or died; the worker applied verl's own rule locally."""


class Outcome(StrEnum):
    """How a trajectory ended."""

    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@travels
@dataclass(frozen=True, slots=True)
class TrajectoryId:
    """Identity of one sample's whole episode.

    `prompt` is a digest of the prompt, stable over epochs; `uid` is verl's id of this visit to the prompt; `sample` numbers the
    trajectories of the group (verl: `session_id`); `step` is the training step that asked for it.
    """

    prompt: str
    uid: str
    sample: int | str
    step: int
    validate: bool = False
    key: str = field(init=False, repr=False, compare=False)
    """Unique within a run: verl's own `{uid}_{session_id}`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.uid}_{self.sample}")


@travels
@dataclass(frozen=True, slots=True)
class TurnStart:
    """A trajectory wants to generate. `context_tokens` counts everything the model will read.

    `turn` numbers the trajectory's generations from 0 in the order in which they begin; several may be in flight at once. `conversation` is
    verl's request id: turns that share it share a context. Most trajectories keep one; an agent loop may use several, and loops of several
    trajectories may share one.
    """

    trajectory: TrajectoryId
    conversation: str
    turn: int
    context_tokens: int
    generated_tokens: int
    """Tokens this trajectory has generated in earlier turns and earlier legs of this one."""
    tool_s: float | None = None
    """Seconds of tool calls since its last turn; None: first turn, or not measured."""
    text: str | None = None
    """The prompt's text, if known; in a trajectory's first turn only."""
    leg: int = 0
    """How often this generation has been sent before: it restarts when its replica is lost, and continues after a weight update."""
    request: str = field(init=False, repr=False, compare=False)
    """Name of the request in router and engine, unique in the run."""

    def __post_init__(self) -> None:
        _only_times(self, "tool_s")
        object.__setattr__(self, "request", _request(self.trajectory, self.turn, self.leg))


@travels
@dataclass(frozen=True, slots=True)
class TurnEnd:
    """A request ended on `replica`: normally (`completed`), or by failure, abort or cancellation."""

    trajectory: TrajectoryId
    conversation: str
    replica: str
    turn: int
    output_tokens: int
    completed: bool = True
    engine_s: float | None = None
    """Seconds in the engine without queueing; None: not known."""
    leg: int = 0
    before_tokens: int = 0
    """Tokens generated in earlier legs."""
    interrupted: bool = False
    """A weight update ended the request; the generation continues in the next leg."""
    request: str = field(init=False, repr=False, compare=False)
    """As `TurnStart.request`."""

    def __post_init__(self) -> None:
        _only_times(self, "engine_s")
        object.__setattr__(self, "request", _request(self.trajectory, self.turn, self.leg))


def _request(trajectory: TrajectoryId, turn: int, leg: int) -> str:
    return f"{trajectory.key}:{turn}.{leg}" if leg else f"{trajectory.key}:{turn}"


def _only_times(event: object, name: str) -> None:
    """Set a duration that is NaN, infinite or negative to None: a single one would stay in every running mean."""
    seconds = getattr(event, name)
    if seconds is not None and not 0 <= seconds < inf:
        object.__setattr__(event, name, None)


@travels
@dataclass(frozen=True, slots=True)
class ToolStart:
    """A tool that the last turn asked for starts (one event per parallel call). Planning during the call costs no time."""

    trajectory: TrajectoryId
    tool: str


@travels
@dataclass(frozen=True, slots=True)
class TrajectoryEnd:
    """The episode is over. `output_tokens` counts the tokens generated over all turns."""

    trajectory: TrajectoryId
    outcome: Outcome
    output_tokens: int
    turns: int
    truncated: bool = False
    """Ended by a limit on tokens or turns, so its length is censored: a lower bound."""


@travels
@dataclass(frozen=True, slots=True)
class Decision:
    """Answer to a `TurnStart`: replica, priority (vLLM: lower runs first), reason, and the prediction behind it."""

    replica: str
    priority: int
    reason: Reason
    predicted_remaining: float | None = None
    """Median of the remaining tokens, this turn included; None: lengths are not predicted."""
    predicted_upper: float | None = None
    """Their 0.9 quantile."""
    held: bool = False
    """The turn waits until the orchestrator admits it. `replica` may be empty then; it is chosen at admission."""
    stays: bool = False
    """The trajectory's next turns run there with the same priority, without asking, until the orchestrator revokes it."""


@dataclass(frozen=True, slots=True)
class Prewarm:
    """Order to fill the prefix cache of `replica` with the trajectory's context while its tool runs, by a one-token request.

    To be dropped when the trajectory ends or its next turn starts; tokens prefilled by then stay cached. `priority` is vLLM's, and low
    enough to delay no turn.
    """

    trajectory: str
    replica: str
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """One generation and the tool call after it, as one entry of a trace line's `steps`.

    None: the source does not have it. Only live runs write the second group of fields.
    """

    input_tokens: int | None
    """New context since the previous generation (tool output and the like); 0 in the first turn."""
    output_tokens: int | None
    tool: str | None = None
    """Name of the tool, parallel calls joined by `+`; None: no tool was called."""
    tool_latency_s: float | None = None
    gen_s: float | None = None
    """Time in the engine, without waiting for a slot."""
    ctx_tokens: int | None = None
    ctx_reset: bool = False
    output_est: bool = False

    route_s: float | None = None
    """Time for the router's answer."""
    queue_s: float | None = None
    """Waiting for a slot in the engine, before the first token or after a preemption."""
    transport_s: float | None = None
    """Call to the engine, without queueing and generating: RPC, serialisation."""
    between_s: float | None = None
    """From this generation's end to the next one's start, without tools: parsing, tokenising."""
    replica: str | None = None
    priority: int | None = None
    reason: str | None = None
    predicted_remaining: float | None = None
    predicted_upper: float | None = None
    preemptions: int | None = None
    cached_tokens: int | None = None
    start_s: float | None = None
    """Offset of the turn's start from the trajectory's start."""
    legs: int | None = None
    """Number of requests, if a weight update interrupted it; its times are sums over them."""
    paused_s: float | None = None
    """Waiting between legs, and for an engine paused for a weight update."""
    reread_tokens: int | None = None
    """Context that later legs recomputed."""
    weights: str | None = None
    """Weights (training step) of its first and last token, such as `3-5`, if trainer and rollout run side by side."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One trace line. A trajectory ends with its last step, not with a null tool.

    `meta` of a live run: `uid`, `run` (when it began), `step`, `validate`, `outcome`, `start_s` and `end_s` (unix time), `setup_s`
    (before the first turn), `score_s` (reward and hand-over after the last), `wait_s` (finished, waiting for the batch).
    """

    source: str
    workload: str
    prompt_id: str
    trial: int | str
    prompt_tokens: int | None
    steps: tuple[Turn, ...]
    reward: float | None = None
    model: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def output_tokens(self) -> int:
        """Tokens generated over all turns; unknown counts as 0."""
        return sum(turn.output_tokens or 0 for turn in self.steps)

    @property
    def tool_s(self) -> float:
        """Seconds in tools over all turns; unknown counts as 0."""
        return sum(turn.tool_latency_s or 0.0 for turn in self.steps)
