"""An environment that holds our wheel, every other distribution of this one, and no checkout.

Everything in site-packages but our own entries is linked, so nothing is downloaded. Editable installs do not work in it: their finders
are entered by files named after the package, which are left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("verl_heddle", "configs", "hydra_plugins")
"""Folders that the wheel is made of."""
OURS = ("verl_heddle", "__editable__", "hydra_plugins")
"""How entries of site-packages begin that are ours, or an editable install's."""


@dataclass(frozen=True)
class Installed:
    """`python`: of the environment. `site`: its site-packages, of which only our wheel is no link."""

    wheel: Path
    python: Path
    site: Path

    @property
    def environment(self) -> dict[str, str]:
        """Variables to start it with: nothing that leads to a checkout."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "RAY_ADDRESS")}
        return kept | {"PATH": f"{self.python.parent}{os.pathsep}{kept['PATH']}"}

    def run(self, *words: str, folder: Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run its Python in a folder."""
        command = [str(self.python), *words]
        return subprocess.run(command, cwd=folder, env=self.environment, capture_output=True, text=True, timeout=timeout_s)


def installed(folder: Path) -> Installed:
    """Build the wheel and install it. It takes about ten seconds."""
    source, built = folder / "source", folder / "dist"  # a build leaves files beside its sources
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(built), str(source)]
    subprocess.run([*pip, *build], check=True, timeout=300, cwd=folder)
    shutil.rmtree(source)
    (wheel,) = built.glob("*.whl")

    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=60)
    python = venv / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))
    for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(path).iterdir():
            if not entry.name.startswith(OURS):
                (site / entry.name).symlink_to(entry)
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True, timeout=300, cwd=folder)
    return Installed(wheel, python, site)
