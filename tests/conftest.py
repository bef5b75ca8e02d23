"""Fixtures of the tests with real engines; what they are made of is in `engines.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import prepared, runner


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """Folder with the math recipe's data and tiny model."""
    return prepared("math", tmp_path_factory.mktemp("math"))


@pytest.fixture(scope="session")
def train(workspace):
    """Run the math recipe, see `runner`."""
    return runner("math", workspace)
