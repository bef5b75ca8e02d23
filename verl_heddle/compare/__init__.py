"""Paired comparison of real training runs: `verl-heddle compare` starts them, keeps the finished ones, and reads their traces and metrics.

Like `verl_plugin` and `report`, this package may start processes and read clocks. It imports neither verl, Ray, vLLM nor torch. The runs
are ordinary verl commands; no code of this package runs inside them.
"""
