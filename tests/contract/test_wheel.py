"""The wheel alone, beside no checkout, is all a user needs: every module, every data file, every command, the flag."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from preloaded import Preloaded
from wheel_site import ROOT, SOURCES

pytest.importorskip("verl")
sys.path.insert(0, str(ROOT / "tests" / "compare"))


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    """Git says what the files are: a package or a kind of data file that nobody listed is missed here."""
    listed = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        files = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    else:  # a downloaded archive has no history
        files = {str(path.relative_to(ROOT)) for name in SOURCES for path in (ROOT / name).rglob("*") if path.is_file()}
        files = {name for name in files if "__pycache__" not in name}
    expected = {f"verl_heddle/{name}" if name.startswith("configs/") else name for name in files}
    inside = {name for name in zipfile.ZipFile(wheel.wheel).namelist() if ".dist-info/" not in name}
    assert sorted(expected - inside) == [] and sorted(inside - expected) == []


@pytest.fixture(scope="module")
def python(wheel) -> Iterator[Preloaded]:
    """The wheel's Python, which has imported verl."""
    python = Preloaded("verl.trainer.main_ppo", python=wheel.python, environment=wheel.environment)
    yield python
    python.close()


def test_every_module_of_it_can_be_imported(wheel, python, tmp_path):
    code = (
        "import pkgutil, sys, verl_heddle\n"
        "from importlib import import_module\n"
        "bad = {}\n"
        "for found in pkgutil.walk_packages(verl_heddle.__path__, 'verl_heddle.', onerror=lambda name: None):\n"
        "    try:\n"
        "        import_module(found.name)\n"
        "    except BaseException as error:\n"
        "        bad[found.name] = repr(error)\n"
        "print(verl_heddle.__file__)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = python.run(["-c", code], tmp_path, wheel.environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path(done.stdout.split()[-1]).is_relative_to(wheel.site)


def test_the_flag_composes(wheel, python, tmp_path):
    code = (
        "import verl_heddle, hydra_plugins.verl_heddle_searchpath as plugin\n"
        "from verl_heddle.verl_plugin.overrides import compose\n"
        "from verl_heddle.latency import available\n"
        "config = compose(['+plugin=heddle', '+machine=cpu', 'actor_rollout_ref.rollout.name=vllm', 'data.train_files=x'])\n"
        "print(verl_heddle.__file__, plugin.CONFIGS, config.actor_rollout_ref.rollout.router_config_path, sorted(available())[0])"
    )
    done = python.run(["-c", code], tmp_path, wheel.environment)
    assert done.returncode == 0, done.stderr
    module, configs, router, _gpu = done.stdout.split()
    assert all(Path(path).is_relative_to(wheel.site) for path in (module, configs, router))
    assert Path(router).read_text().strip() == "router_class: verl_heddle.verl_plugin.gate.Router"
    assert list(wheel.site.glob("verl_heddle-*.dist-info/entry_points.txt"))


WORK = ["--workload", "math", "--model", "qwen3-8b", "--gpu", "h200", "--gpus", "2", "--prompts", "4", "--samples", "2", "--seeds", "1"]
VERL = ["python", "-m", "verl.trainer.main_ppo", "actor_rollout_ref.rollout.name=vllm"]
COMMANDS = {
    "doctor": ["doctor", "--", *VERL, "+plugin=heddle", "+machine=cpu"],
    "overrides": ["overrides"],
    "simulate": ["simulate", *WORK, "--out", "sim"],
    "plan": ["plan", *WORK, "--html", "plan.html"],
    "explain": ["explain", "run/heddle", "--json", "explain.json"],
    "compare": ["compare", "--dry-run", "--out", "cmp", "--steps", "2", "--", *VERL, "+machine=cpu"],
    "trace": ["trace", "describe", "run/heddle"],
}


def test_every_command_is_tried():
    from verl_heddle.cli import MODULES

    assert COMMANDS.keys() == MODULES.keys()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that has a recorded run."""
    from test_explain import recorded

    folder = tmp_path_factory.mktemp("place")
    (folder / "run" / "heddle").mkdir(parents=True)
    recorded(folder / "run" / "heddle", steps=2, median_tokens=60)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(wheel, python, place, name):
    script = wheel.python.with_name("verl-heddle")
    done = python.run([str(script), *COMMANDS[name]], place, wheel.environment)
    assert done.returncode in ((0, 1) if name == "doctor" else (0,)), done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stdout + done.stderr
    made = {"simulate": place / "sim", "plan": place / "plan.html", "explain": place / "explain.json"}
    assert name not in made or made[name].exists()
    if name == "explain":
        assert json.loads(made[name].read_text())
