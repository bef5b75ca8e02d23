"""Everything a user can set under `heddle.*`, with its default and what it does. The typed schema of the flag.

`Options` is registered with Hydra, so `heddle.priority.quantum_tokens=many` is refused while the command line is being read. `check`
holds what types cannot say. `verl-heddle overrides` and the docs page are made from the `help` texts here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from verl_heddle.schedule.resident import ORDERS as RESIDENT_ORDERS


def option(default: Any, help: str) -> Any:
    """A dataclass field with the text that `verl-heddle overrides` prints."""
    return field(default=default, metadata={"help": help})


@dataclass
class Priority:
    """`heddle.priority.*`: which waiting turn vLLM runs first."""

    enable: bool = option(True, "Hand vLLM a priority per turn. Needs rollout.scheduling_policy=priority.")
    order: str = option(
        "arrival",
        "arrival: first come, first served as in stock verl, but validation goes before the training that it runs beside. longest: the "
        "longest predicted trajectory first; goes with heddle.preempt.enable=true heddle.residents.enable=false.",
    )
    quantum_tokens: int = option(64, "Predictions that differ by less than this count as equal; ties run first come, first served.")
    refresh_s: float = option(
        1.0, "How often, at most, turns under way get a new priority when a sibling's end has changed what is expected of them; 0: never."
    )


@dataclass
class Predict:
    """`heddle.predict.*`: how much of a trajectory is still to come. On when `heddle.priority.order=longest` or
    `heddle.place` asks for it."""

    trees: bool = option(True, "Between steps, fit boosted trees on what was seen; off: pool, prompt history and finished siblings alone.")
    checkpoint: bool = option(True, "Keep what was learnt inside verl's checkpoints, and read it back when verl resumes from one.")


@dataclass
class Preempt:
    """`heddle.preempt.*`: when a waiting turn takes a running one's slot, inside vLLM. Goes with `heddle.priority.order=longest`."""

    enable: bool = option(False, "Preempt on arrival; off: a waiting turn waits for a free slot, as in stock vLLM.")
    margin: int = option(
        4,
        "Priority units, of heddle.priority.quantum_tokens each, by which the waiting turn must be more urgent.",
    )
    max_preemptions: int = option(3, "How often one turn may lose its slot this way.")
    min_steps: int = option(8, "Engine steps a turn keeps its slot at least.")
    ageing_per_s: float = option(0.1, "Priority units a waiting turn gains per second, so that nothing starves; 0: none.")


@dataclass
class Residents:
    """`heddle.residents.*`: which trajectories a replica keeps, their contexts held through tool calls; the others wait in the router, and
    go where there is room. Rests while heddle.place plans, under rollout.full_determinism, and where the host keeps what vLLM evicts
    (kv_offloading_size)."""

    enable: bool = option(
        True, "Admit trajectories as KV cache has room; off: turns are placed by verl's rule, bounded by heddle.admission."
    )
    order: str = option(
        "least_served",
        "Who of the waiting is admitted first. least_served: the trajectory that has generated least, so that the long ones show early. "
        "by_arrival: the one that began first.",
    )


@dataclass
class Admission:
    """`heddle.admission.*`: how many turns are in flight per replica; the rest wait in the router, most urgent first."""

    per_slot: float = option(
        4.0,
        "Without heddle.residents: turns in flight per slot (rollout.max_num_seqs) of a replica from which on new trajectories wait; 0: no "
        "bound, as in stock verl.",
    )
    hold_s: float = option(
        600.0, "Seconds without a completed turn after which a replica counts as silent: turns held that long go in whatever the bound."
    )


@dataclass
class Offload:
    """`heddle.offload.*`: what an engine's KV cache evicts is kept in its host's memory and read back instead of computed: vLLM's own
    KV offloading (kv_offloading_size), which needs no plugin; this sizes it. Resident sets rest beside it. Not run on a GPU yet."""

    enable: bool = option(False, "Keep evicted KV cache on the host, emptied with every weight update. Needs CUDA.")
    gib: float | None = option(None, "GiB for each replica; null: host_share of what its host has free when engines start, in equal parts.")
    host_share: float = option(
        0.4, "Share of the host's free memory that all replicas on it take together; it is pinned for the whole run."
    )


@dataclass
class Place:
    """`heddle.place.*`: on which replica a trajectory runs, and whether it moves. Off: it pays where lengths are predicted well, or where
    KV cache is short, and mostly does what verl does elsewhere (`bench/placement`)."""

    enable: bool = option(
        False,
        "Plan by expected remaining length, from the second step on, with step times learnt from the run's own turns; off: verl's own rule "
        "places. Needs two replicas.",
    )
    moves: bool = option(True, "Trajectories may change replica between turns, where the whole step is expected to end sooner by it.")
    transport: str = option(
        "prewarm",
        "How a context gets to its new replica. prewarm: a one-token request there while the tool runs; none: read again when the turn "
        "comes, unless a KV connector of vLLM (engine_kwargs.vllm.kv_transfer_config) finds it.",
    )


@dataclass
class Layout:
    """`heddle.layout.*`: rollout replicas of several tensor-parallel degrees on the trainer's GPUs, and another cut of the GPUs from one
    step to the next. Needs rollout.tensor_model_parallel_size=1, which the cut replaces."""

    enable: bool = option(False, "Cut the GPUs into replicas by layout.fixed, layout.schedule, or by plan; off: verl's equal replicas.")
    fixed: list[int] = field(
        default_factory=list,
        metadata={"help": "Degrees in the order of the GPUs, for the whole run: [4,2,1,1]. Empty: planned, unless there is a schedule."},
    )
    schedule: Any = field(
        default=None,
        metadata={"help": "Degrees by the training step from which they hold, {1: [1,1,1,1], 50: [2,1,1]}; null: none. Goes before fixed."},
    )
    times: str = option(
        "",
        "For the plan: model and GPU whose step times to plan with, as verl-heddle plan takes them: qwen3-14b/h200, or /models/mine/l40s.",
    )
    margin: float = option(0.05, "For the plan: share of the step's expected seconds that another layout has to save.")
    horizon_steps: int = option(8, "For the plan: steps over which a change has to earn what it costs.")
    engines: int = option(
        2,
        "Engines a GPU holds at most, the one in use and others that sleep, each of which keeps some memory; beyond that the one out of "
        "use for longest is shut down, and launched again when it is wanted.",
    )


@dataclass
class Shape:
    """`heddle.shape.*`: spare samples per prompt; a group ends with its n-th usable one, and what it cannot keep is stopped."""

    enable: bool = option(
        False, "Sample prompts with long tails more often than n, train on n of the samples, stop the rest. Changes what is trained on."
    )
    spare: float | None = option(
        None,
        "Spare samples per prompt in the mean; null: as many as pay by the forecast, for prompts visited before, from the second step on.",
    )
    uniform: bool = option(False, "Every prompt gets the same number of spare samples (needs spare); false: those that need them.")
    most: float = option(2.0, "Samples of a prompt at most, as a multiple of n.")
    longest: int = option(1, "Of the n kept, so many from the long end; 0: the n shortest.")
    patience: float | None = option(
        None,
        "How long a long slot is waited for, as a multiple of the tokens with which the step's last group is expected to be full; inf: "
        "always; null: as long as it costs next to nothing by the forecast.",
    )
    unseen: bool = option(
        False, "Whether the forecast may give spare samples to prompts never visited: of them only the pool is known, so all get the same."
    )
    objective: str = option("tail", "What spare samples are given for: tail, the expected end of the group; spread, the paper's rule.")
    price: float = option(1.0, "Seconds of the step that a second of extra work has to save.")
    length_bias: float = option(
        0.25,
        "Bound on how much shorter the kept may be than what they stand for, in the mean over a step's prompts, as a share of the length; "
        "1: no bound. Crossed, shaping rests.",
    )
    prompt_bias: float = option(0.6, "The same for a single prompt: it gets no more spare samples than that.")
    mixed_loss: float = option(
        0.2, "Bound on the share of groups of mixed reward that selection may lose; 1: no bound. Crossed, shaping rests."
    )
    rest_steps: int = option(20, "Steps of plain sampling after a bound was crossed; then shaping is tried again.")
    control_every: int = option(0, "Every so many-th prompt of a step is sampled plainly, to compare with; 0: none.")
    corrected: bool = option(
        False, "Weight each kept sample's advantage for the selection; with `algorithm.adv_estimator=heddle_grpo` in place of `grpo`."
    )


@dataclass
class Tools:
    """`heddle.tools.*`: the watchdog over tool calls; what goes wrong becomes a tool message, and the trajectory goes on."""

    enable: bool = option(True, "Guard every tool call. Off, a tool that hangs hangs the step, as in stock verl.")
    call_s: float = option(600.0, "A tool call to return, in seconds; after it the call is cancelled and the model reads that it failed.")
    trajectory_s: float = option(
        3600.0, "Tool time of one trajectory, the sum over its calls, in seconds; after it every call fails at once."
    )
    retries: int = option(1, "How often a failed call of a tool named in heddle.tools.idempotent is made again.")
    idempotent: list[str] = field(
        default_factory=list, metadata={"help": "Names of the tools that may be called twice without harm, such as a search."}
    )
    max_chars: int = option(200_000, "Characters of a tool's answer before verl's own, shorter cut (multi_turn.max_tool_response_length).")
    threads: int = option(64, "Plain functions running at a time per worker; each has a thread.")
    max_abandoned: int = option(32, "Calls of one tool that hang in a worker and cannot be ended, before its further calls fail at once.")


@dataclass
class Trace:
    """`heddle.trace.*`: the record of every trajectory's life."""

    enable: bool = option(True, "Write every trajectory of the run as one JSON line, ready for replay in the simulator.")
    dir: str = option("${trainer.default_local_dir}/heddle", "Where trace.jsonl goes.")
    segment_mb: float = option(
        256.0,
        "Size in MB at which trace.jsonl is closed and compressed as trace.0001.jsonl.gz, trace.0002.jsonl.gz, ...; 0: never. Readers of "
        "trace.jsonl read them with it.",
    )
    workload: str | None = option("${trainer.project_name}", "Name written in each line's `workload`.")


@dataclass
class Twin:
    """`heddle.twin.*`: what each step would have taken under the other rule, simulated beside the trainer's update."""

    enable: bool = option(
        True,
        "Tell on W&B (heddle/twin/*) what a synchronous step would have taken under stock verl, with +plugin=observe under heddle. Costs a "
        "process at the lowest priority on the trainer's host. Rests with heddle.shape and heddle.layout.",
    )
    budget_s: float = option(120.0, "Seconds after which a step is given up.")


@dataclass
class Deadlines:
    """`heddle.deadlines.*`: how long we wait for another process before going on without it, in seconds."""

    start_s: float = option(600.0, "The router to come up at the start of a run; after it the run goes on as stock verl.")
    router_s: float = option(30.0, "An answer of the router; after it the worker routes the turn itself by verl's rule.")
    cancel_s: float = option(30.0, "A cancelled request to leave its engine; after it we stop asking and count it.")
    collect_s: float = option(30.0, "The workers' records at the end of a step; after it the step's heddle metrics are incomplete.")


@dataclass
class Options:
    """`heddle.*`."""

    observe: bool = option(False, "Only watch: verl's own rules decide everything, heddle measures. Set by +plugin=observe.")
    auto: bool = option(
        True,
        "Let resident sets rest, and verl's own rule place turns, while the twin expects steps to end sooner so: by what it says of both "
        "for the last steps, and by how far that was off. Synchronous trainers only; needs heddle.twin.",
    )
    poll_interval_s: float = option(
        0.1, "How often the trainer looks whether the batch is complete. verl's fixed 2 s rounds every rollout up by up to 2 s."
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
        """Turns ordered by predicted length, as the help of `heddle.priority.order` says to use it; `others` are sections."""
        sections: dict[str, Any] = {
            "priority": Priority(order="longest"),
            "preempt": Preempt(enable=True),
            "residents": Residents(enable=False),
        }
        return cls(**(sections | others))

    @property
    def predicts(self) -> bool:
        """Whether some decision asks how long trajectories will be."""
        return not self.observe and (self.place.enable or (self.priority.enable and self.priority.order == "longest"))

    @property
    def judges(self) -> bool:
        """Whether the twin judges steps; samples that are stopped and replicas of several degrees are beyond it."""
        return self.twin.enable and (self.observe or not (self.shape.enable or self.layout.enable))

    @property
    def admits(self) -> bool:
        """Whether replicas keep resident sets."""
        return not self.observe and self.residents.enable and not self.place.enable

    @property
    def chooses(self) -> bool:
        """Whether resident sets rest where the twin says that they do not pay."""
        return self.auto and self.judges and self.admits

    def decisions(self, rests: bool = False) -> dict[str, Any]:
        """What of this decides about turns, for the trace: `preempt` (its settings; False: off), `residents` (their order; False: off, or
        they rest) and `per_slot` (0: no bound)."""
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
    """Yield (key, default, help) of every option, depth first in the order of declaration."""
    node = Options() if node is None else node
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}.{item.name}")
        else:
            yield f"{prefix}.{item.name}", value, item.metadata["help"]


def check(options: Options) -> list[str]:
    """What is wrong with the values, one plain line each; an empty list when all is well."""
    problems = []
    if options.priority.quantum_tokens < 1:
        problems.append(f"heddle.priority.quantum_tokens must be at least 1, got {options.priority.quantum_tokens}")
    if options.priority.order not in ORDERS:
        problems.append(f"heddle.priority.order must be one of {', '.join(ORDERS)}, got {options.priority.order}")
    if options.residents.order not in RESIDENT_ORDERS:
        problems.append(f"heddle.residents.order must be one of {', '.join(RESIDENT_ORDERS)}, got {options.residents.order}")
    if not 0 <= options.priority.refresh_s <= 3600:
        problems.append(f"heddle.priority.refresh_s must lie between 0 and 3600 seconds, got {options.priority.refresh_s}")
    if options.preempt.margin < 1:
        problems.append(f"heddle.preempt.margin must be at least 1, or equal turns would preempt each other, got {options.preempt.margin}")
    for name in ("max_preemptions", "min_steps", "ageing_per_s"):
        value = getattr(options.preempt, name)
        if not 0 <= value < float("inf"):
            problems.append(f"heddle.preempt.{name} must not be negative, got {value}")
    if options.admission.per_slot and not options.admission.per_slot >= 1:
        problems.append(
            f"heddle.admission.per_slot must be at least 1, or 0 for no bound, got {options.admission.per_slot}: slots would idle"
        )
    if not options.admission.hold_s > 0:
        problems.append(f"heddle.admission.hold_s must be positive seconds, got {options.admission.hold_s}")
    if not options.twin.budget_s > 0:
        problems.append(f"heddle.twin.budget_s must be positive seconds, got {options.twin.budget_s}")
    if options.offload.gib is not None and not options.offload.gib > 0:
        problems.append(f"heddle.offload.gib must be positive, or null, got {options.offload.gib}")
    if not 0 < options.offload.host_share <= 0.9:
        problems.append(f"heddle.offload.host_share must lie above 0 and at most at 0.9, got {options.offload.host_share}")
    if options.place.transport not in TRANSPORTS:
        problems.append(f"heddle.place.transport must be one of {', '.join(TRANSPORTS)}, got {options.place.transport}")
    if not 0 <= options.layout.margin < 1:
        problems.append(f"heddle.layout.margin must be a share, 0 to below 1, got {options.layout.margin}")
    for name in ("horizon_steps", "engines"):
        if getattr(options.layout, name) < 1:
            problems.append(f"heddle.layout.{name} must be at least 1, got {getattr(options.layout, name)}")
    if not _is_schedule(options.layout.schedule):
        problems.append(
            f"heddle.layout.schedule must map training steps, from 1, to lists of degrees, as {{1: [1,1], 5: [2]}}, "
            f"got {options.layout.schedule!r}"
        )
    if not 0.005 <= options.poll_interval_s <= 60:
        problems.append(f"heddle.poll_interval_s must lie between 0.005 and 60 seconds, got {options.poll_interval_s}")
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
        problems.append("heddle.trace.dir is empty: name a folder, or set heddle.trace.enable=false")
    return problems


def _is_schedule(given: Any) -> bool:
    if given is None:
        return True
    if not isinstance(given, dict) or not all(isinstance(step, int) and step >= 1 for step in given):
        return False
    return all(isinstance(layout, list) and all(isinstance(tp, int) for tp in layout) for layout in given.values())
