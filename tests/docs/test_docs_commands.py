"""Every command on the pages is executed: as it stands where that is cheap, else in a cheap form that still fails on a typing error.

| command | what is done with it |
|---|---|
| `verl-heddle simulate`, `plan` | run, with two prompts of two samples |
| `verl-heddle explain`, `overrides`, `doctor`, `trace` | run |
| `verl-heddle compare` | run on a finished comparison; a new one with --dry-run |
| `python -m verl.trainer.main_ppo` | composed by verl's own entry point (`--cfg job`), not trained |
| `recipes/*/run.sh` | run up to Python: the data it asks for is made (generated, no model), what it would train is composed and checked |
| `make X` | `make -n X` |
| `pip install X` | name (or `.`) and extras are this package's; installing is tests/unit's wheel tests |
| `python -m recipes.sandbox` | run |
| `python bench/*.py` | `--help`, and the options are among those it tells |

A command that is none of these fails, so that nobody adds one that is not checked.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from docs_pages import COMMANDED, ROOT, Command, commands
from preloaded import Preloaded

EVERY = [command for page in COMMANDED for command in commands(page)]
SMALL = ["--prompts", "2", "--samples", "2", "--seeds", "1", "--jobs", "1"]


@dataclass(frozen=True)
class Shell:
    """Where commands are typed: `place` has what the pages name, `tmp` is empty, `python` is what the word stands for."""

    place: Path
    tmp: Path
    python: Preloaded

    def call(self, words: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
        from compare_cases import environment

        known = environment(**{"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "MODEL": "Qwen/Qwen3-0.6B", **more})
        if words[0] == "python":
            return self.python.run(words[1:], folder, known)
        return subprocess.run(words, capture_output=True, text=True, timeout=180, cwd=folder, env=known)

    def heddle(self, command: Command, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
        assert command.words[0] == "verl-heddle"
        words = ["python", "-m", "verl_heddle.cli", command.words[1], *more, *command.words[2:]]
        return self.call(words, folder, **command.environment)


def good(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def simulate(command: Command, shell: Shell) -> None:
    out = good(shell.heddle(command, shell.place, *SMALL))
    assert "stock" in out and "no schedule " in out


def plan(command: Command, shell: Shell) -> None:
    assert "python -m verl.trainer.main_ppo" in good(shell.heddle(command, shell.place, *SMALL))


def explain(command: Command, shell: Shell) -> None:
    assert "That trajectory, turn by turn" in good(shell.heddle(command, shell.place))


def compare(command: Command, shell: Shell) -> None:
    goes_on = "--recipe" not in command.words and "--" not in command.words
    if goes_on and "--pairs" not in command.words:
        done = shell.heddle(command, shell.place)
        assert good(done) and "0 runs executed, 4 kept" in done.stderr
    else:  # real runs of a recipe are tests/e2e's
        assert good(shell.heddle(command, shell.place if goes_on else shell.tmp, "--dry-run")).count("# pair ") >= 2


def told(command: Command, shell: Shell) -> None:
    assert len(good(shell.heddle(command, shell.place))) > 500


def trained(command: Command, shell: Shell) -> None:
    words = [*command.words[1:], f"hydra.run.dir={shell.tmp}", "--cfg", "job"]
    composed = good(shell.call(["python", *words], shell.tmp))
    assert "actor_rollout_ref:" in composed and ("\nheddle:" in composed) == any("plugin=" in word for word in command.words)


def recipe(command: Command, shell: Shell) -> None:
    from verl_heddle.verl_plugin.lint import lint
    from verl_heddle.verl_plugin.overrides import arguments_of, compose

    assert os.access(ROOT / command.words[0], os.X_OK), "can be called as it stands"
    python, record = shell.tmp / "python", shell.tmp / "record"
    python.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]), file=open({str(record)!r}, 'a'))\n")
    python.chmod(0o755)
    good(shell.call(["bash", *command.words], ROOT, **{**command.environment, "PYTHON": str(python), "OUT": str(shell.tmp / "out")}))
    prepare, train = (json.loads(line) for line in record.read_text().splitlines())
    prepared(prepare, shell)
    words = [word for word in arguments_of(train) if not word.startswith("hydra.") or word.startswith("hydra.searchpath")]
    config = compose(words)
    assert [finding for finding in lint(config) if finding.fatal] == []
    for name in ("GPUS", "NODES"):
        key = {"GPUS": "n_gpus_per_node", "NODES": "nnodes"}[name]
        assert config.trainer[key] == int(command.environment.get(name, config.trainer[key]))


def prepared(words: list[str], shell: Shell) -> None:
    """Run a recipe's prepare.py without a model; data of the hub only as far as the hub."""
    done = shell.call(["python", *(word for word in words if word != "--model")], shell.tmp)
    if "--data" in words and words[words.index("--data") + 1] != "generated":
        assert done.returncode == 2 and "lies on the Hugging Face hub and HF_HUB_OFFLINE is set" in done.stderr, done.stderr
    else:
        assert "train.parquet" in good(done)


def make(command: Command, shell: Shell) -> None:
    assert good(shell.call(["make", "-n", *command.words[1:]], ROOT))


def pip(command: Command, shell: Shell) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for word in command.words[2:]:
        name, extras = re.fullmatch(r"([\w.-]+)(?:\[([\w,]+)\])?", word).groups()
        assert name in (".", setup["metadata"]["name"]) and set((extras or "").split(",")) <= {"", *setup["options.extras_require"]}


def sandbox(command: Command, shell: Shell) -> None:
    done = shell.call(["python", *command.words[1:]], shell.place, PYTHONPATH=str(ROOT))
    assert good(done) and ("level:" in done.stdout or "ok after" in done.stderr)


def bench(command: Command, shell: Shell) -> None:
    told = good(shell.call(["python", *command.words[1:2], "--help"], ROOT))
    assert all(word.partition("=")[0] in told for word in command.words[2:] if word.startswith("-"))


def traced(command: Command, shell: Shell) -> None:
    assert good(shell.heddle(command, shell.place))


CLASSES = (
    (r"verl-heddle trace ", traced),
    (r"verl-heddle simulate ", simulate),
    (r"verl-heddle plan ", plan),
    (r"verl-heddle explain ", explain),
    (r"verl-heddle compare ", compare),
    (r"verl-heddle (overrides|doctor)\b", told),
    (r"python -m verl\.trainer\.main_ppo ", trained),
    (r"recipes/\w+/run\.sh\b", recipe),
    (r"make ", make),
    (r"pip install ", pip),
    (r"python -m recipes\.sandbox\b", sandbox),
    (r"python bench/[\w/]+\.py\b", bench),
)


def class_of(words: list[str]):
    """The check of a command, None for one of no known class."""
    return next((check for pattern, check in CLASSES if re.match(pattern, " ".join(words))), None)


def test_commands_are_found_and_an_unknown_one_is_noticed():
    assert len(EVERY) > 25 and {class_of(command.words) for command in EVERY} >= {check for _, check in CLASSES}
    assert class_of(["verl-heddle", "dance"]) is None and class_of(["rm", "-rf", "outputs"]) is None


@pytest.mark.parametrize("command", EVERY, ids=str)
def test_command(command, place, tmp_path, preloaded):
    if find_spec("verl") is None:
        pytest.skip("verl is not here")
    check = class_of(command.words)
    assert check is not None, "this command is of no class that is checked: add a cheap form of it here, or leave it out"
    check(command, Shell(place, tmp_path, preloaded))
