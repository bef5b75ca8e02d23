"""Which tests pytest-xdist keeps on one core: those of a file, and of files that share what takes long to make."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

TOGETHER = {
    "tests/compare/": "the finished comparison",
    "tests/docs/": "preloaded",
    "tests/contract/test_config.py": "preloaded",
    "tests/contract/test_patches.py": "preloaded",
    "tests/unit/test_bench_starts.py": "preloaded",
}
"""How a test's name begins -> what it shares with the others of the same value."""


class ByFile(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return next((shared for beginning, shared in TOGETHER.items() if nodeid.startswith(beginning)), super()._split_scope(nodeid))
