"""Every bench script starts: `--help` from anywhere, and a small run where one takes seconds and needs no engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAIN = re.compile('^if __name__ == "__main__"', re.M)
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "bench").rglob("*.py") if MAIN.search(path.read_text()))
SMALL = {
    "bench/placement/scenarios.py": ["--quick", "--json", "out.json"],
    "bench/auto/cost.py": ["--quick"],
    "bench/auto/run.py": ["--quick"],
    "bench/modes/run.py": ["--quick"],
    "bench/published/run.py": ["--quick"],
    "bench/quick/run.py": ["--quick", "--json", "out.json"],
    "bench/residents/run.py": ["--quick"],
    "bench/sandbox.py": ["--runs", "2"],
    "bench/schedule/simulated.py": ["--quick", "--traces", "none"],
    "bench/shaping/forecast.py": ["--quick"],
    "bench/shaping/run.py": ["--quick", "--json", "out.json"],
    "bench/simulate_speed/run.py": ["--most-gpus", "16", "--policies", "stock", "--json", "out.json"],
}
"""What a small run is; the others start engines or a Ray, or work for minutes."""


def start(script: str, words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / script), *words], capture_output=True, text=True, cwd=folder, timeout=600)


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_starts(script, tmp_path, preloaded):
    done = preloaded.run([str(ROOT / script), "--help"], tmp_path, os.environ)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SMALL)
def test_a_small_run(script, tmp_path):
    done = start(script, SMALL[script], tmp_path)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert "--json" not in SMALL[script] or (tmp_path / "out.json").stat().st_size > 0


def test_small_runs_are_of_scripts_that_are_there():
    assert set(SMALL) <= set(SCRIPTS) and len(SCRIPTS) > 25
