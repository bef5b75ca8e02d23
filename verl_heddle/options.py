"""Everything a user can set under `heddle.*`, with its default and what it does. The typed schema of the flag.

`Options` is registered with Hydra, so `heddle.priority.quantum_tokens=many` is refused while the command line is being read. `check`
holds what types cannot say. `verl-heddle overrides` and the docs page are made from the `help` texts here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field with the text that `verl-heddle overrides` prints."""
    return field(default=default, metadata={"help": help})


@dataclass
class Priority:
    """`heddle.priority.*`: which waiting turn vLLM runs first."""

    enable: bool = option(
        True, "Hand vLLM a priority per turn, longest predicted remaining first. Needs rollout.scheduling_policy=priority."
    )
    quantum_tokens: int = option(64, "Predictions that differ by less than this count as equal; ties run first come, first served.")


@dataclass
class Trace:
    """`heddle.trace.*`: the record of every trajectory's life."""

    enable: bool = option(True, "Write every trajectory of the run as one JSON line, ready for replay in the simulator.")
    dir: str = option("${trainer.default_local_dir}/heddle", "Where trace.jsonl goes.")
    workload: str = option("${trainer.project_name}", "Name written in each line's `workload`.")


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
    poll_interval_s: float = option(
        0.1, "How often the trainer looks whether the batch is complete. verl's fixed 2 s rounds every rollout up by up to 2 s."
    )
    seed: int = option(0, "Seed of the router's random tie-breaks.")
    priority: Priority = field(default_factory=Priority)
    trace: Trace = field(default_factory=Trace)
    deadlines: Deadlines = field(default_factory=Deadlines)


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
    if not 0.005 <= options.poll_interval_s <= 60:
        problems.append(f"heddle.poll_interval_s must lie between 0.005 and 60 seconds, got {options.poll_interval_s}")
    for item in fields(options.deadlines):
        value = getattr(options.deadlines, item.name)
        if not value > 0:
            problems.append(f"heddle.deadlines.{item.name} must be positive seconds, got {value}")
    if options.trace.enable and not options.trace.dir:
        problems.append("heddle.trace.dir is empty: name a folder, or set heddle.trace.enable=false")
    return problems
