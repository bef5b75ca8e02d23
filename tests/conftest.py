"""Fixtures of the tests with real engines, what they are made of is in `engines.py`; and how property tests draw their examples.

The same examples every time, so that a test fails where the code has changed; HYPOTHESIS_PROFILE=explore draws new ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import skips
from engines import prepared, runner
from hypothesis import settings
from preloaded import Preloaded
from wheel_site import Installed, installed

settings.register_profile("steady", derandomize=True)
settings.register_profile("explore")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

pytest_configure = skips.register


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
