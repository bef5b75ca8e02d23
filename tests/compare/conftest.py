"""One comparison of the fake trainer for all tests that only read it."""

from __future__ import annotations

import pytest
from compare_cases import compare


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(folder, what the call left): two arms and the bare one, 2 pairs of 4 steps, W&B offline."""
    out = tmp_path_factory.mktemp("compare") / "cmp"
    return out, compare("--out", str(out), "--pairs", "2", "--steps", "4", "--stock-bare", FAKE_STEP_S="0")
