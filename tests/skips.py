"""Every skipped test is shown with its reason at the end of a run, and a reason that is not listed here fails the run."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

ALLOWED = (
    "no public traces here",
    "only root changes its user",
    "no batch sizes when asynchronous",
)
"""Reasons to skip, of at most five words: what no set-up can bring. What a set-up can bring is needed, and its test fails."""

FILE_VARIABLE = "HEDDLE_SKIPPED"
"""Environment: a file to append the skips to, for a run that is made of several."""


class Skips:
    """Pytest plugin."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[str, str]] = Counter()

    def add(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """Count a skip by (reason, file)."""
        if report.skipped and not hasattr(report, "wasxfail"):
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._seen[text.removeprefix("Skipped: "), report.nodeid.partition("::")[0]] += 1

    pytest_runtest_logreport = pytest_collectreport = add

    @property
    def unlisted(self) -> list[str]:
        """Reasons that are not allowed."""
        return sorted({reason for reason, _ in self._seen if reason not in ALLOWED})

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unlisted and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        lines = [f"{count} skipped, {reason}: {file}" for (reason, file), count in sorted(self._seen.items())]
        for line in lines:
            terminalreporter.write_line(line)
        for reason in self.unlisted:
            terminalreporter.write_line(f"FAILED: {reason!r} is no reason to skip, see tests/skips.py", red=True)
        if lines and (path := os.environ.get(FILE_VARIABLE)):
            with Path(path).open("a") as file:
                file.write("".join(f"{line}\n" for line in lines))


def register(config: pytest.Config) -> None:
    """Keep the skips of this run; under pytest-xdist in the main process, which hears of every worker's."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Skips(), "heddle-skips")
