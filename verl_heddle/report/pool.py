"""Run (arm, draw) simulations in one or more processes and report progress. Results do not depend on the number of processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from verl_heddle.report.draws import Draw
from verl_heddle.report.play import Run, bound, measured, play
from verl_heddle.report.setting import Setting
from verl_heddle.simulate import Bound

MAX_JOBS = 8
"""Default limit on processes: each holds its own copy of the draws."""

Wanted = tuple[str, int]
"""A rule (`rules.rule_of`) and a tensor-parallel degree."""

Progress = Callable[[int, int, str], None]
"""Called with (simulations done, total, name of the last one)."""

_Task = tuple[str, int, int]


class Pool:
    """A context manager; `bounds` and `runs` may be called any number of times.

    Args:
        jobs: processes; None: one per CPU, at most `MAX_JOBS`.
        arms: total number of arms to run, including the bound; used only for `progress`.
    """

    def __init__(
        self, setting: Setting, draws: Sequence[Draw], arms: int, jobs: int | None = None, progress: Progress | None = None
    ) -> None:
        self._shared = (setting, tuple(draws))
        self._draws = len(draws)
        self._total, self._done = arms * len(draws), 0
        self._progress = progress or (lambda done, total, what: None)
        requested = min(len(os.sched_getaffinity(0)), MAX_JOBS) if jobs is None else jobs
        self._jobs = min(requested, self._total)
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        if self._jobs > 1:
            self._executor = ProcessPoolExecutor(self._jobs, initializer=_start, initargs=self._shared)
        else:
            _share(*self._shared)
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=kind is None, cancel_futures=True)

    def bounds(self) -> tuple[tuple[Bound, ...], ...]:
        """Lower bounds by draw and step."""
        done = self._all([("bound", 0)])
        return tuple(tuple(done["bound", 0, index]) for index in range(self._draws))

    def runs(self, wanted: Sequence[Wanted]) -> dict[Wanted, tuple[Run, ...]]:
        """Runs by arm, then draw."""
        done = self._all(wanted)
        return {(name, tp): tuple(done[name, tp, index] for index in range(self._draws)) for name, tp in wanted}

    def _all(self, wanted: Sequence[Wanted]) -> dict[_Task, Any]:
        tasks = [(name, tp, index) for index in range(self._draws) for name, tp in wanted]
        if self._executor is None:
            return {task: self._report(task, _work(task)) for task in tasks}
        futures = {self._executor.submit(_work, task): task for task in tasks}
        return {futures[future]: self._report(futures[future], future.result()) for future in as_completed(futures)}

    def _report(self, task: _Task, value: Any) -> Any:
        self._done += 1
        name, tp, _ = task
        self._progress(self._done, self._total, name if name == "bound" else f"{name} tp={tp}")
        return value


_shared: tuple[Setting, Sequence[Draw]]


def _share(setting: Setting, draws: Sequence[Draw]) -> None:
    """Called once per process, so that a task carries a draw's index instead of the draw."""
    global _shared
    _shared = (setting, draws)


def _start(setting: Setting, draws: Sequence[Draw]) -> None:
    """Initialize a worker process; the parent handles interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _share(setting, draws)


def _work(task: _Task) -> Any:
    name, tp, index = task
    setting, draws = _shared
    draw = draws[index]
    return bound(setting, draw) if name == "bound" else measured(tp, setting, draw, play(name, tp, setting, draw))
