"""Beside verl and vLLM we bring no second copy of what is theirs."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

from verl_heddle.verl_plugin.doctor import shared_files

ROOT = Path(__file__).parents[2]
RESOLVE_S = 300


def test_verl_vllm_and_we_resolve_to_one_nccl(tmp_path):
    """verl's own extra for GPUs plus our requirements, resolved as on a GPU machine; nothing is installed. Needs the package index."""
    ours = configparser.ConfigParser()
    ours.read(ROOT / "setup.cfg")
    (tmp_path / "wanted.txt").write_text("verl[vllm]==0.9.1\n" + ours["options"]["install_requires"])
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "-q",
        "--python-platform",
        "linux",
        "--no-header",
        "--no-annotate",
        "wanted.txt",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=RESOLVE_S)
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^([\w.-]+)==", done.stdout, re.M)
    assert {"verl", "vllm", "torch"} <= set(names)
    assert len([name for name in names if "nccl" in name]) == 1, done.stdout
    assert shared_files(set(names)) == []


def test_doctor_names_distributions_that_overwrite_each_other():
    (both,) = shared_files({"xgboost", "xgboost-cpu", "nvidia-nccl-cu13", "xgboost-ray"})
    assert both.startswith("xgboost and xgboost-cpu both install the module xgboost")
    (two,) = shared_files({"xgboost", "nvidia-nccl-cu12", "nvidia-nccl-cu13"})
    assert two.startswith("nvidia-nccl-cu12 and nvidia-nccl-cu13 both install libnccl.so.2")
    assert shared_files({"xgboost"}) == shared_files({"xgboost-cpu"}) == []
    assert shared_files({"torch"}) == ["xgboost is missing: no prediction; pip install xgboost-cpu"]
