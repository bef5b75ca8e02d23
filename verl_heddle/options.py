"""The `heddle.*` options: types, defaults and help texts.

`Options` is registered with Hydra, so a wrong type such as `heddle.priority.quantum_tokens=many` is refused while the command line is read.
`check` validates what types cannot express. `verl-heddle overrides` and the docs page are generated from the `help` texts here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from verl_heddle.schedule.resident import ORDERS as RESIDENT_ORDERS


def option(default: Any, help: str) -> Any:
    """A dataclass field with the help text that `verl-heddle overrides` prints."""
    return field(default=default, metadata={"help": help})


@dataclass
class Priority:
    """`heddle.priority.*`: which waiting turn vLLM runs first."""

    enable: bool = option(True, "Give vLLM a priority for every turn. Needs rollout.scheduling_policy=priority.")
    order: str = option(
        "arrival",
        "arrival: first come, first served as in stock verl, except that validation runs before training turns that overlap with it. "
        "longest: the longest predicted trajectory first; use it with heddle.preempt.enable=true heddle.residents.enable=false.",
    )
    quantum_tokens: int = option(64, "Predictions that differ by less than this count as equal; ties run first come, first served.")
    refresh_s: float = option(
        1.0, "Minimum seconds between updates of priorities in flight, made when a sibling's end has changed a prediction; 0: never."
    )


@dataclass
class Predict:
    """`heddle.predict.*`: how many tokens a trajectory still has to generate. Active if `heddle.priority.order=longest` or `heddle.place`
    needs it."""

    trees: bool = option(True, "Fit boosted trees between steps on what was seen; off: only pool, prompt history and finished siblings.")
    checkpoint: bool = option(True, "Save what was learned in verl's checkpoints, and load it when verl resumes from one.")


@dataclass
class Preempt:
    """`heddle.preempt.*`: when a waiting turn takes the slot of a running one inside vLLM. Use with `heddle.priority.order=longest`."""

    enable: bool = option(False, "Preempt on arrival; off: a waiting turn waits for a free slot, as in stock vLLM.")
    margin: int = option(4, "Priority units (heddle.priority.quantum_tokens each) by which the waiting turn must be more urgent.")
    max_preemptions: int = option(3, "Maximum number of times that one turn can lose its slot this way.")
    min_steps: int = option(8, "Engine steps that a turn runs before it can lose its slot.")
    ageing_per_s: float = option(0.1, "Priority units that a waiting turn gains per second, so that none starves; 0: none.")


@dataclass
class Residents:
    """`heddle.residents.*`: which trajectories each replica keeps. Their contexts are held through tool calls; other trajectories wait in
    the router until a replica has room. Inactive with heddle.place, under rollout.full_determinism, and where the host keeps what vLLM
    evicts (kv_offloading_size)."""

    enable: bool = option(True, "Admit trajectories as KV cache has room; off: verl's rule places turns, bounded by heddle.admission.")
    order: str = option(
        "least_served",
        "Which waiting trajectory is admitted first. least_served: the one that has generated least, so that long ones show early. "
        "by_arrival: the one that began first.",
    )


@dataclass
class Admission:
    """`heddle.admission.*`: how many turns are in flight per replica; the rest wait in the router, most urgent first."""

    per_slot: float = option(
        4.0,
        "Without heddle.residents: turns in flight per slot (rollout.max_num_seqs) of a replica from which new trajectories wait; 0: no "
        "bound, as in stock verl.",
    )
    hold_s: float = option(
        600.0, "Seconds without a completed turn after which a replica counts as silent; turns held that long then go whatever the bound."
    )


@dataclass
class Offload:
    """`heddle.offload.*`: keep what an engine's KV cache evicts in host memory, and read it back instead of recomputing it. These options
    size vLLM's own KV offloading (kv_offloading_size), which needs no plugin. Resident sets rest with it. Not run on a GPU yet."""

    enable: bool = option(False, "Keep evicted KV cache in host memory, which is emptied with every weight update. Needs CUDA.")
    gib: float | None = option(
        None, "GiB per replica; null: an equal part of host_share of the host memory that is free when the engines start."
    )
    host_share: float = option(0.4, "Share of the host's free memory that all its replicas take together; pinned for the whole run.")


@dataclass
class Place:
    """`heddle.place.*`: on which replica a trajectory runs, and whether it moves. Off by default: it pays where lengths are predicted well
    or KV cache is short, and mostly does what verl does elsewhere (`bench/placement`)."""

    enable: bool = option(
        False,
        "Plan placement by expected remaining length, from the second step on, with step times learned from the run's own turns; off: use "
        "verl's own rule. Needs two replicas.",
    )
    moves: bool = option(True, "Let a trajectory change replica between turns if the whole step is then expected to end sooner.")
    transport: str = option(
        "prewarm",
        "How a context reaches its new replica. prewarm: a one-token request there while the tool runs; none: the next turn prefills it "
        "again, unless a KV connector of vLLM (engine_kwargs.vllm.kv_transfer_config) finds it.",
    )


@dataclass
class Layout:
    """`heddle.layout.*`: rollout replicas of different tensor-parallel degrees on the trainer's GPUs, which can change from one step to the
    next. Needs rollout.tensor_model_parallel_size=1, which the layout replaces."""

    enable: bool = option(False, "Divide the GPUs into replicas by layout.fixed, layout.schedule, or a plan; off: verl's equal replicas.")
    fixed: list[int] = field(
        default_factory=list,
        metadata={"help": "Degrees in GPU order for the whole run, such as [4,2,1,1]. Empty: planned, unless layout.schedule is set."},
    )
    schedule: Any = field(
        default=None,
        metadata={
            "help": "Degrees by the first training step they apply to, such as {1: [1,1,1,1], 50: [2,1,1]}; null: none. Overrides fixed."
        },
    )
    times: str = option(
        "", "For the plan: model and GPU whose step times it uses, named as for verl-heddle plan: qwen3-14b/h200, or /models/mine/l40s."
    )
    margin: float = option(0.05, "For the plan: share of the step's expected seconds that a different layout must save.")
    horizon_steps: int = option(8, "For the plan: steps within which a change must earn back its cost.")
    engines: int = option(
        2,
        "Maximum engines on a GPU: the one in use, and sleeping ones that each keep some memory. Beyond this, the one unused for longest "
        "is shut down, and launched again when it is needed.",
    )


@dataclass
class Shape:
    """`heddle.shape.*`: spare samples per prompt. A group ends with its n-th usable sample, and samples that it cannot keep are stopped."""

    enable: bool = option(
        False, "Sample prompts with long tails more than n times, train on n of the samples, stop the rest. Changes what is trained on."
    )
    spare: float | None = option(
        None,
        "Mean number of spare samples per prompt; null: as many as pay according to the forecast, for prompts visited before, from the "
        "second step on.",
    )
    uniform: bool = option(False, "Give every prompt the same number of spare samples (needs spare); false: give them where needed.")
    most: float = option(2.0, "Maximum samples per prompt, as a multiple of n.")
    longest: int = option(1, "How many of the n kept samples come from the long end; 0: keep the n shortest.")
    patience: float | None = option(
        None,
        "How long to wait for a sample from the long end, as a multiple of the tokens at which the step's last group is expected to be "
        "full; inf: always; null: while the forecast says that waiting costs almost nothing.",
    )
    unseen: bool = option(
        False,
        "Let the forecast give spare samples to prompts never visited before; only the pool is known for them, so all get the same number.",
    )
    objective: str = option("tail", "Why a prompt gets spare samples. tail: the expected end of its group; spread: the paper's rule.")
    price: float = option(1.0, "Seconds of the step that a second of extra work must save.")
    length_bias: float = option(
        0.25,
        "Bound on how much shorter kept samples may be than those they stand for, as a share of the length, averaged over a step's "
        "prompts; 1: no bound. If it is exceeded, shaping rests.",
    )
    prompt_bias: float = option(0.6, "The same bound for a single prompt; it limits that prompt's spare samples.")
    mixed_loss: float = option(
        0.2, "Bound on the share of mixed-reward groups that selection may lose; 1: no bound. If it is exceeded, shaping rests."
    )
    rest_steps: int = option(20, "Steps of plain sampling after a bound is exceeded; then shaping is tried again.")
    control_every: int = option(0, "Sample every k-th prompt of a step plainly, for comparison; 0: none.")
    corrected: bool = option(
        False, "Weight each kept sample's advantage to correct for selection; use `algorithm.adv_estimator=heddle_grpo`, not `grpo`."
    )


@dataclass
class Tools:
    """`heddle.tools.*`: the watchdog over tool calls. A failure becomes a tool message, and the trajectory goes on."""

    enable: bool = option(True, "Guard every tool call. Off: a tool that hangs also hangs the step, as in stock verl.")
    call_s: float = option(600.0, "Seconds that a tool call may take; then it is cancelled, and the model reads that it failed.")
    trajectory_s: float = option(
        3600.0, "Seconds of tool time per trajectory, summed over its calls; after that every further call fails at once."
    )
    retries: int = option(1, "How often to repeat a failed call of a tool named in heddle.tools.idempotent.")
    idempotent: list[str] = field(
        default_factory=list, metadata={"help": "Names of the tools that can be called twice without harm, such as a search."}
    )
    max_chars: int = option(
        200_000, "Maximum characters of a tool's answer, before verl's own, shorter limit (multi_turn.max_tool_response_length)."
    )
    threads: int = option(64, "Maximum plain functions that run at a time per worker, each in its own thread.")
    max_abandoned: int = option(
        32, "Maximum hung calls of one tool that a worker cannot end; beyond that, further calls of that tool fail at once."
    )


@dataclass
class Trace:
    """`heddle.trace.*`: the record of every trajectory."""

    enable: bool = option(True, "Write every trajectory of the run as one JSON line, which the simulator can replay.")
    dir: str = option("${trainer.default_local_dir}/heddle", "Folder of trace.jsonl.")
    segment_mb: float = option(
        256.0,
        "Size in MB at which trace.jsonl is closed and compressed as trace.0001.jsonl.gz, trace.0002.jsonl.gz, ...; 0: never. Readers of "
        "trace.jsonl read these segments too.",
    )
    workload: str | None = option("${trainer.project_name}", "Name written to each line's `workload`.")


@dataclass
class Twin:
    """`heddle.twin.*`: how long each step would have taken under the other rule, simulated during the trainer's update."""

    enable: bool = option(
        True,
        "Report on W&B (heddle/twin/*) how long each synchronous step would have taken under stock verl; with +plugin=observe, under "
        "heddle. Costs a process at the lowest priority on the trainer's host, and after the first minute at most 1 % of that host's CPU "
        "time: a step beyond it is not judged. Off with heddle.shape and heddle.layout.",
    )
    budget_s: float = option(120.0, "Seconds after which the simulation of a step is given up.")


@dataclass
class Deadlines:
    """`heddle.deadlines.*`: how long to wait for another process before going on without it."""

    start_s: float = option(600.0, "Seconds to wait for the router to start; after that the run goes on as stock verl.")
    router_s: float = option(30.0, "Seconds to wait for an answer from the router; after that the worker routes the turn by verl's rule.")
    cancel_s: float = option(
        30.0, "Seconds to wait for a cancelled request to leave its engine; after that heddle stops asking and counts it."
    )
    collect_s: float = option(
        30.0, "Seconds to wait for the workers' records at the end of a step; after that the step's heddle metrics are incomplete."
    )


@dataclass
class Options:
    """`heddle.*`."""

    observe: bool = option(False, "Only measure; verl's own rules decide everything. Set by +plugin=observe.")
    auto: bool = option(
        True,
        "Let resident sets rest, so that verl's own rule places turns, while the twin forecasts faster steps that way. The forecast uses "
        "the last steps, corrected by how far the twin was off. Synchronous trainers only; needs heddle.twin.",
    )
    poll_interval_s: float = option(
        0.1, "Seconds between the trainer's checks for a complete batch. verl's fixed 2 s lengthen every rollout by up to 2 s."
    )
    seed: int = option(0, "Seed of the router's random tie-breaks.")
    priority: Priority = field(default_factory=Priority)
    predict: Predict = field(default_factory=Predict)
    preempt: Preempt = field(default_factory=Preempt)
    residents: Residents = field(default_factory=Residents)
    admission: Admission = field(default_factory=Admission)
    offload: Offload = field(default_factory=Offload)
    place: Place = field(default_factory=Place)
    layout: Layout = field(default_factory=Layout)
    shape: Shape = field(default_factory=Shape)
    tools: Tools = field(default_factory=Tools)
    trace: Trace = field(default_factory=Trace)
    twin: Twin = field(default_factory=Twin)
    deadlines: Deadlines = field(default_factory=Deadlines)

    @classmethod
    def longest(cls, **others: Any) -> Options:
        """Longest predicted first, with the options that the help of `heddle.priority.order` recommends; `others` are sections."""
        sections: dict[str, Any] = {
            "priority": Priority(order="longest"),
            "preempt": Preempt(enable=True),
            "residents": Residents(enable=False),
        }
        return cls(**(sections | others))

    @property
    def predicts(self) -> bool:
        """Whether some decision needs predicted lengths."""
        return not self.observe and (self.place.enable or (self.priority.enable and self.priority.order == "longest"))

    @property
    def judges(self) -> bool:
        """Whether the twin judges steps; it cannot simulate stopped samples or replicas of different degrees."""
        return self.twin.enable and (self.observe or not (self.shape.enable or self.layout.enable))

    @property
    def admits(self) -> bool:
        """Whether replicas keep resident sets."""
        return not self.observe and self.residents.enable and not self.place.enable

    @property
    def chooses(self) -> bool:
        """Whether resident sets rest when the twin says that they do not pay."""
        return self.auto and self.judges and self.admits

    def decisions(self, rests: bool = False) -> dict[str, Any]:
        """The settings that decide about turns, for the trace: `preempt` (its settings; False: off), `residents` (their order; False: off
        or resting) and `per_slot` (0: no bound)."""
        preempts = not self.observe and self.priority.enable and self.preempt.enable
        bounded = not (self.observe or self.admits) and self.admission.per_slot > 0
        return {
            "preempt": {name: value for name, value in asdict(self.preempt).items() if name != "enable"} if preempts else False,
            "residents": self.residents.order if self.admits and not rests else False,
            "per_slot": self.admission.per_slot if bounded else 0,
        }


ORDERS = ("arrival", "longest")
"""Values of `heddle.priority.order`."""

TRANSPORTS = ("prewarm", "none")
"""Values of `heddle.place.transport`."""


def walk(node: Any = None, prefix: str = "heddle") -> Iterator[tuple[str, Any, str]]:
    """Yield (key, default, help) of every option, depth first in declaration order."""
    node = Options() if node is None else node
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}.{item.name}")
        else:
            yield f"{prefix}.{item.name}", value, item.metadata["help"]


def check(options: Options) -> list[str]:
    """Problems with the values, one line each; empty if there are none."""
    problems = []
    if options.priority.quantum_tokens < 1:
        problems.append(f"heddle.priority.quantum_tokens must be at least 1, got {options.priority.quantum_tokens}")
    if options.priority.order not in ORDERS:
        problems.append(f"heddle.priority.order must be one of {', '.join(ORDERS)}, got {options.priority.order}")
    if options.residents.order not in RESIDENT_ORDERS:
        problems.append(f"heddle.residents.order must be one of {', '.join(RESIDENT_ORDERS)}, got {options.residents.order}")
    if not 0 <= options.priority.refresh_s <= 3600:
        problems.append(f"heddle.priority.refresh_s must be between 0 and 3600 seconds, got {options.priority.refresh_s}")
    if options.preempt.margin < 1:
        problems.append(f"heddle.preempt.margin must be at least 1, or equal turns would preempt each other, got {options.preempt.margin}")
    for name in ("max_preemptions", "min_steps", "ageing_per_s"):
        value = getattr(options.preempt, name)
        if not 0 <= value < float("inf"):
            problems.append(f"heddle.preempt.{name} must not be negative, got {value}")
    if options.admission.per_slot and not options.admission.per_slot >= 1:
        problems.append(
            f"heddle.admission.per_slot must be at least 1, so that no slot idles, or 0 for no bound, got {options.admission.per_slot}"
        )
    if not options.admission.hold_s > 0:
        problems.append(f"heddle.admission.hold_s must be positive seconds, got {options.admission.hold_s}")
    if not options.twin.budget_s > 0:
        problems.append(f"heddle.twin.budget_s must be positive seconds, got {options.twin.budget_s}")
    if options.offload.gib is not None and not options.offload.gib > 0:
        problems.append(f"heddle.offload.gib must be positive, or null, got {options.offload.gib}")
    if not 0 < options.offload.host_share <= 0.9:
        problems.append(f"heddle.offload.host_share must be above 0 and at most 0.9, got {options.offload.host_share}")
    if options.place.transport not in TRANSPORTS:
        problems.append(f"heddle.place.transport must be one of {', '.join(TRANSPORTS)}, got {options.place.transport}")
    if not 0 <= options.layout.margin < 1:
        problems.append(f"heddle.layout.margin must be a share, at least 0 and below 1, got {options.layout.margin}")
    for name in ("horizon_steps", "engines"):
        if getattr(options.layout, name) < 1:
            problems.append(f"heddle.layout.{name} must be at least 1, got {getattr(options.layout, name)}")
    if not _is_schedule(options.layout.schedule):
        problems.append(
            f"heddle.layout.schedule must map training steps, from 1, to lists of degrees, such as {{1: [1,1], 5: [2]}}, "
            f"got {options.layout.schedule!r}"
        )
    if not 0.005 <= options.poll_interval_s <= 60:
        problems.append(f"heddle.poll_interval_s must be between 0.005 and 60 seconds, got {options.poll_interval_s}")
    for item in fields(options.deadlines):
        value = getattr(options.deadlines, item.name)
        if not value > 0:
            problems.append(f"heddle.deadlines.{item.name} must be positive seconds, got {value}")
    for name in ("call_s", "trajectory_s", "max_chars", "threads", "max_abandoned"):
        if not getattr(options.tools, name) > 0:
            problems.append(f"heddle.tools.{name} must be positive, got {getattr(options.tools, name)}")
    if options.tools.retries < 0:
        problems.append(f"heddle.tools.retries must not be negative, got {options.tools.retries}")
    if not options.trace.segment_mb >= 0:
        problems.append(f"heddle.trace.segment_mb must not be negative, got {options.trace.segment_mb}")
    if options.trace.enable and not options.trace.dir:
        problems.append("heddle.trace.dir is empty: set a folder, or heddle.trace.enable=false")
    return problems


def _is_schedule(given: Any) -> bool:
    if given is None:
        return True
    if not isinstance(given, dict) or not all(isinstance(step, int) and step >= 1 for step in given):
        return False
    return all(isinstance(layout, list) and all(isinstance(tp, int) for tp in layout) for layout in given.values())
