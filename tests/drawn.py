"""How many examples a property test draws."""

from __future__ import annotations

from hypothesis import settings

EXPLORING = 20


def examples(count: int) -> settings:
    """`count` in every run of the tests, `EXPLORING` times as many under HYPOTHESIS_PROFILE=explore."""
    return settings(max_examples=count * (EXPLORING if settings.get_current_profile_name() == "explore" else 1))
