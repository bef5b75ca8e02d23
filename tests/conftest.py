"""Fixtures of the tests with real engines, what they are made of is in `engines.py`; and how property tests draw their examples.

The same examples every time, so that a test fails where the code has changed; HYPOTHESIS_PROFILE=explore draws new ones.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import skips
from engines import prepared, runner
from hypothesis import settings
from omegaconf import OmegaConf
from preloaded import Preloaded
from wheel_site import Installed, installed

settings.register_profile("steady", derandomize=True, deadline=None)  # a busy machine is no failure
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def pytest_configure(config: pytest.Config) -> None:
    skips.register(config)
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        # Ray joins the cluster that was started last, of those with the same folder.
        os.environ["RAY_TMPDIR"] = str(Path("/tmp") / f"heddle-{os.getuid()}-{worker}")
        Path(os.environ["RAY_TMPDIR"]).mkdir(exist_ok=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.option.dist != "loadfile":
        return None
    from side_by_side import ByFile

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def yaml_parsed_once() -> Iterator[None]:
    """Hydra parses every file of verl's configuration each time it composes: what was parsed is kept, by the text."""
    load = OmegaConf.load
    parsed = cache(lambda text: pickle.dumps(load(io.StringIO(text))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", lambda file: pickle.loads(parsed(file.read())) if hasattr(file, "read") else load(file))
        yield


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """Folder with the math recipe's data and tiny model."""
    return prepared("math", tmp_path_factory.mktemp("math"))


@pytest.fixture(scope="session")
def train(workspace):
    """Run the math recipe, see `runner`."""
    return runner("math", workspace)


@pytest.fixture(scope="session")
def preloaded() -> Iterator[Preloaded]:
    """Python that has imported verl and what verl imports; see `Preloaded.run`."""
    python = Preloaded("verl.trainer.main_ppo")
    yield python
    python.close()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Installed:
    """Our wheel in an environment beside no checkout."""
    return installed(tmp_path_factory.mktemp("wheel"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Kept for `pytest_unconfigure`."""
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """All is reported: a process that had Ray and engines in it ends without taking its interpreter down, where their native code has
    crashed after the last test had passed."""
    if "ray" in sys.modules and not hasattr(config, "workerinput") and STATUS in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[STATUS])


STATUS = pytest.StashKey[int]()
