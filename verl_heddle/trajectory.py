"""The nouns of a rollout: who a trajectory is, what happened in its turns, and the events that tell the orchestrator.

Two families live here. `TrajectoryId`, `TurnStart`, `TurnEnd`, `TrajectoryEnd` and `Decision` are what the cluster and the
simulator exchange with the `Orchestrator` while a step runs. `Turn` and `Trajectory` are the finished story, one JSON line each
(`verl_heddle.traces` reads and writes them): what a real run recorded, what a public trace tells, what a generator invents.

Units: tokens are counts, durations are seconds, times are seconds on one caller-chosen clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import StrEnum
from math import inf
from operator import attrgetter
from typing import Any


def travels(cls: Any) -> Any:
    """A frozen dataclass with slots, of two fields or more, whose objects go from process to process by the thousand: pickled as a call of
    the class, which takes half the time of what `dataclass` makes."""
    told = attrgetter(*(one.name for one in fields(cls) if one.init))
    cls.__reduce__ = lambda self: (type(self), told(self))
    return cls


class Reason(StrEnum):
    """Why a turn went where it went; counted as the metric `heddle/decisions/<reason>`."""

    LEAST_INFLIGHT = "least_inflight"
    """First turn of a conversation: the replica with the fewest requests in flight (verl's own rule)."""

    STICKY = "sticky"
    """Later turn: the replica that holds the conversation's prefix cache (verl's own rule)."""

    HASHED = "hashed"
    """`rollout.full_determinism`: the replica the request id hashes to (verl's own rule)."""

    ADMITTED = "admitted"
    """The trajectory was not resident anywhere: the replica with the fewest requests in flight of those with room for its context, or where
    that lay last."""

    PLANNED = "planned"
    """First turn, or its replica left: where the step is expected to end clearly sooner, or else where verl's rule puts it."""

    MOVED = "moved"
    """Later turn, on a replica that is expected to end sooner than its own, by more than the move costs."""

    NOT_PAYING = "not_paying"
    """First turn by verl's rule, because planning has not paid over the last steps."""

    FALLBACK_POLICY = "fallback_policy"
    """The orchestrator raised; the router applied verl's own rule."""

    FALLBACK_ROUTER = "fallback_router"
    """The router did not answer in time or died; the worker applied verl's own rule locally."""


class Outcome(StrEnum):
    """How a trajectory's life ended."""

    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@travels
@dataclass(frozen=True, slots=True)
class TrajectoryId:
    """One sample's whole episode.

    `prompt` is stable over epochs (a digest of the prompt), `uid` is verl's id of this visit to the prompt, `sample` numbers the
    group's trajectories (verl: `session_id`), `step` is the training step that asked for it.
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
    """A trajectory wants to generate: `context_tokens` is everything the model will read.

    `turn` numbers the trajectory's generations from 0 in the order in which they begin; several may be under way at once. `conversation`
    is verl's request id: what shares one shares a context. Most trajectories have one for life; an agent loop may talk in several, and
    loops of several trajectories may share one.
    """

    trajectory: TrajectoryId
    conversation: str
    turn: int
    context_tokens: int
    generated_tokens: int
    """Tokens this trajectory has generated, in earlier turns and earlier legs of this one."""
    tool_s: float | None = None
    """Seconds its tools took since its last turn; None: there was none before, or nobody measured."""
    text: str | None = None
    """The prompt's text, told with a trajectory's first turn where it is known."""
    leg: int = 0
    """How often this generation has been sent before: it starts again when its replica is lost, and goes on after a weight update."""
    request: str = field(init=False, repr=False, compare=False)
    """Name of the request, in the router and in the engine: unique in the run."""

    def __post_init__(self) -> None:
        _only_times(self, "tool_s")
        object.__setattr__(self, "request", _request(self.trajectory, self.turn, self.leg))


@travels
@dataclass(frozen=True, slots=True)
class TurnEnd:
    """A request ended on `replica`, by itself (`completed`) or by failure, abort or cancellation."""

    trajectory: TrajectoryId
    conversation: str
    replica: str
    turn: int
    output_tokens: int
    completed: bool = True
    engine_s: float | None = None
    """Seconds it kept the engine busy, queueing not counted; None: not known."""
    leg: int = 0
    before_tokens: int = 0
    """Generated in earlier legs."""
    interrupted: bool = False
    """A weight update ended the request, not the generation, which goes on in another leg."""
    request: str = field(init=False, repr=False, compare=False)
    """As `TurnStart.request`."""

    def __post_init__(self) -> None:
        _only_times(self, "engine_s")
        object.__setattr__(self, "request", _request(self.trajectory, self.turn, self.leg))


def _request(trajectory: TrajectoryId, turn: int, leg: int) -> str:
    return f"{trajectory.key}:{turn}.{leg}" if leg else f"{trajectory.key}:{turn}"


def _only_times(event: object, name: str) -> None:
    """What is no time, such as NaN, infinite or negative seconds, was not measured: one such number would stay in every running mean."""
    seconds = getattr(event, name)
    if seconds is not None and not 0 <= seconds < inf:
        object.__setattr__(event, name, None)


@travels
@dataclass(frozen=True, slots=True)
class ToolStart:
    """A tool that the last turn asked for begins to run (parallel calls come one by one): the gap in which planning costs nothing."""

    trajectory: TrajectoryId
    tool: str


@travels
@dataclass(frozen=True, slots=True)
class TrajectoryEnd:
    """The episode is over. `output_tokens` counts what the model generated over all turns."""

    trajectory: TrajectoryId
    outcome: Outcome
    output_tokens: int
    turns: int
    truncated: bool = False
    """Ended by a limit on tokens or turns: it would have been at least so long."""


@travels
@dataclass(frozen=True, slots=True)
class Decision:
    """Answer to a `TurnStart`: where to run, how urgent (vLLM: lower runs first), why, and what was believed."""

    replica: str
    priority: int
    reason: Reason
    predicted_remaining: float | None = None
    """Tokens still to come, this turn included (median); None: nobody predicts."""
    predicted_upper: float | None = None
    """The same, its 0.9 quantile."""
    held: bool = False
    """The turn waits until the orchestrator admits it. `replica` may be empty then: it is chosen when there is room."""
    stays: bool = False
    """The trajectory's next turns run there and as urgently without being asked for, until the orchestrator says otherwise."""


@dataclass(frozen=True, slots=True)
class Prewarm:
    """Order to fill the prefix cache of `replica` with the trajectory's context while its tool runs: a one-token request there.

    To be dropped when the trajectory's next turn starts, or it ends; what has been prefilled by then stays cached. `priority` is vLLM's:
    it must disturb nobody.
    """

    trajectory: str
    replica: str
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """One generation and the tool call it led to, as one entry of a trace line's `steps`.

    None means that the source does not say. The second group of fields is written by a live run only.
    """

    input_tokens: int | None
    """New context since the previous generation (tool output and the like); 0 in the first turn."""
    output_tokens: int | None
    tool: str | None = None
    """Name of the tool, parallel calls joined by `+`; None where no tool was called."""
    tool_latency_s: float | None = None
    gen_s: float | None = None
    """Time the engine worked on the request; waiting for a slot is not in it."""
    ctx_tokens: int | None = None
    ctx_reset: bool = False
    output_est: bool = False

    route_s: float | None = None
    """Asking the router where to go."""
    queue_s: float | None = None
    """Waiting for a slot in the engine, before the first token or after a preemption."""
    transport_s: float | None = None
    """Call to the engine less queueing and generating: RPC, serialisation."""
    between_s: float | None = None
    """From this generation's end to the next one's start, less the tools: parsing, tokenising."""
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
    """Requests it took, where a weight update interrupted it; its times are their sums."""
    paused_s: float | None = None
    """Between its legs, and before an engine that was paused for a weight update."""
    reread_tokens: int | None = None
    """Context that its later legs computed again."""
    weights: str | None = None
    """Weights (training step) of its first and its last token, as `3-5`, where trainer and rollout run side by side."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One trace line. A trajectory ends with its list of steps, not with a null tool.

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
        """Tokens generated over all turns; turns of unknown length count 0."""
        return sum(turn.output_tokens or 0 for turn in self.steps)

    @property
    def tool_s(self) -> float:
        """Seconds in tools over all turns; unknown counts 0."""
        return sum(turn.tool_latency_s or 0.0 for turn in self.steps)
