"""What is skipped is shown with its reason, and only for listed reasons; on one core and on several."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from skips import ALLOWED, FILE_VARIABLE

ON = {"one process": [], "two workers": ["-p", "xdist", "-n", "2", "--dist", "loadfile"]}


@pytest.fixture(params=ON)
def options(request):
    return ON[request.param]


def run(folder: Path, reason: str, options: list[str]) -> subprocess.CompletedProcess[str]:
    (folder / "test_one.py").write_text(f"import pytest\ndef test_is_left_out(): pytest.skip({reason!r})\ndef test_runs(): pass\n")
    (folder / "test_whole.py").write_text("import pytest\npytest.skip('no public traces here', allow_module_level=True)\n")
    (folder / "conftest.py").write_text("from skips import register as pytest_configure\n")
    ours = {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", FILE_VARIABLE: str(folder / "skipped")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")} | ours
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)


def test_a_listed_reason_is_shown_and_kept(tmp_path, options):
    done = run(tmp_path, "only root changes its user", options)
    assert done.returncode == 0, done.stdout
    lines = ["1 skipped, no public traces here: test_whole.py", "1 skipped, only root changes its user: test_one.py"]
    assert [line for line in done.stdout.splitlines() if " skipped, " in line and ":" in line] == lines
    assert (tmp_path / "skipped").read_text().splitlines() == lines


def test_another_reason_fails_the_run(tmp_path, options):
    done = run(tmp_path, "it is Sunday", options)
    assert done.returncode == 1 and "'it is Sunday' is no reason to skip" in done.stdout and "1 passed" in done.stdout


@pytest.mark.parametrize("reason", ALLOWED)
def test_reasons_are_short(reason):
    assert len(reason.split()) <= 5
