"""`--help` of every command is instant: it imports nothing that takes time."""

from __future__ import annotations

import subprocess
import sys

from verl_heddle.cli import MODULES

HEAVY = ("numpy", "yaml", "jinja2", "omegaconf", "hydra", "xgboost", "matplotlib", "wandb", "torch", "ray", "vllm", "verl")

CODE = f"""
import contextlib, io, sys
before = set(sys.modules)
from verl_heddle.cli import MODULES, main
for words in ([], *([name] for name in MODULES)):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    assert "usage: verl-heddle" in text.getvalue() and len(text.getvalue()) > 200, words
print(sorted(set({HEAVY!r}) & (set(sys.modules) - before)))
"""


def test_help_imports_nothing_that_takes_time():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]" and len(MODULES) == 7
