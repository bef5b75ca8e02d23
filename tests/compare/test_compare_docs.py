"""Every command in docs/compare.md and docs/explain.md is run as it stands there, in a folder that has what it names."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compare_cases import environment

DOCS = Path(__file__).resolve().parents[2] / "docs"


def commands(page: str) -> list[str]:
    """Lines of the page's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(), re.S)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """A comparison called cmp and a run's trace where verl's defaults would put one, the first long enough for every step that is named."""
    from test_explain import recorded

    place = tmp_path_factory.mktemp("docs")
    shutil.copytree(finished[0], place / "cmp", ignore=shutil.ignore_patterns("wandb"))
    trace = place / "checkpoints" / "p" / "e" / "heddle"
    trace.mkdir(parents=True)
    recorded(trace, steps=12, median_tokens=60)
    return place


def run(line: str, folder: Path, *more: str) -> subprocess.CompletedProcess:
    words = shlex.split(line)
    assert words[0] == "verl-heddle"
    typed = [sys.executable, "-m", "verl_heddle.cli", words[1], *more, *words[2:]]
    return subprocess.run(typed, capture_output=True, text=True, timeout=120, cwd=folder, env=environment(WANDB_MODE="offline"))


@pytest.mark.parametrize("line", commands("explain.md"))
def test_explain(line, folder):
    done = run(line, folder)
    assert done.returncode == 0 and "Its life, turn by turn" in done.stdout, done.stderr
    if "--json" in line:
        assert (folder / "why.json").stat().st_size > 1000


@pytest.mark.parametrize("line", commands("compare.md"))
def test_compare(line, folder, tmp_path):
    if line.startswith("verl-heddle explain"):
        assert run(line, folder).returncode == 0
        return
    goes_on = "--recipe" not in line and "--" not in shlex.split(line)
    more = () if goes_on and "--pairs" not in line else ("--dry-run",)  # real runs of a recipe are tests/e2e's
    done = run(line.replace("<your overrides>", "actor_rollout_ref.rollout.name=vllm"), folder if goes_on else tmp_path, *more)
    assert done.returncode == 0, done.stderr
    assert ("0 runs made, 6 kept" in done.stderr) if not more and "--dry-run" not in line else done.stdout.count("# pair ") >= 6
