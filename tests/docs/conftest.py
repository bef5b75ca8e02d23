"""A folder that has what the pages name: a comparison `cmp`, traces of runs, a program."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from docs_pages import EXAMPLE, ROOT

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compare"))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Made with the fake trainer and the simulator; steps enough for every step that is named."""
    from compare_cases import compare
    from test_explain import recorded

    folder = tmp_path_factory.mktemp("docs")
    done = compare("--out", str(folder / "cmp"), "--pairs", "2", "--steps", "3", "--no-wandb", FAKE_STEP_S="0")
    assert done.code == 0, done.err
    for run in ("checkpoints/p/e/heddle", "your-run/heddle"):
        (folder / run).mkdir(parents=True)
        recorded(folder / run, steps=12, prompts=2, median_tokens=60)
    said = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is four. " * 20}]
    (folder / "chats.jsonl").write_text(f"{json.dumps({'messages': said})}\n" * 8)
    (folder / "program.py").write_text("print(1)\n")
    (folder / "my-model").mkdir()
    (folder / "my-model" / "config.json").write_text((ROOT / "bench" / "latency_export" / "Qwen3-14B" / "config.json").read_text())
    for name, text in EXAMPLE.findall((ROOT / "CONTRIBUTING.md").read_text()):
        (folder / name).write_text(text)
    return folder
