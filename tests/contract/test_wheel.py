"""The built wheel holds everything a user needs beside verl: the flag works from it as it does from a checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files beside its sources
    for name in ("verl_heddle", "configs", "hydra_plugins"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--no-build-isolation", "--target", str(folder / "site"), str(source)]
    subprocess.run(pip, check=True, timeout=300, cwd=folder)
    return folder / "site"


def test_the_flag_composes_from_the_wheel(installed, tmp_path):
    code = (
        "import verl_heddle, hydra_plugins.verl_heddle_searchpath as plugin\n"
        "from verl_heddle.verl_plugin.overrides import compose\n"
        "from verl_heddle.latency import available\n"
        "config = compose(['+plugin=heddle', '+machine=cpu', 'actor_rollout_ref.rollout.name=vllm', 'data.train_files=x'])\n"
        "print(verl_heddle.__file__, plugin.CONFIGS, config.actor_rollout_ref.rollout.router_config_path, sorted(available())[0])"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    module, configs, router, _gpu = done.stdout.split()
    assert Path(module).is_relative_to(installed) and Path(configs).is_relative_to(installed) and Path(router).is_relative_to(installed)
    assert Path(router).read_text().strip() == "router_class: verl_heddle.verl_plugin.gate.Router"
    assert list(installed.glob("verl_heddle-*.dist-info/entry_points.txt"))
