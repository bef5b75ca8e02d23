"""Training with the flag from the wheel, on real engines: every process of the run finds the plugin without a checkout."""

from __future__ import annotations

import shutil

import pytest
from engines import ROOT, runner

pytestmark = pytest.mark.e2e


def test_two_steps_with_the_flag_from_the_wheel(wheel, workspace, tmp_path):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    train = runner("math", workspace, root=tmp_path, python=wheel.python)
    outside = {"PYTHONPATH": "", "PATH": wheel.environment["PATH"]}
    run = train("wheel", "+plugin=heddle", steps=2, env=outside)
    assert run.code == 0, run.log[-3000:]
    assert run.steps.keys() == {1, 2} and run.steps[2]["heddle/fallbacks/total"] == 0
    assert " on (verl " in run.said[0] and run.trace.exists()
