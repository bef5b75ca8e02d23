"""Trajectory-level rollout orchestration for verl: one flag, no fork. See README.md."""

__version__ = "0.1.0"
