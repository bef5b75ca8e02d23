"""The twin estimates after every step how long it would have taken under the other rule: `heddle/twin/*` on W&B, without an A/B run.

The simulator plays the recorded step twice, as it ran and under the other rule (stock verl's with `+plugin=heddle`, heddle's with
`+plugin=observe`), on engines calibrated from the step itself. Errors that both plays share cancel in their ratio. The error of the first
play is reported as `error`; above `MOST_ERROR` the twin does not judge. It runs in its own process at the lowest priority during the
trainer's update, and is stopped when it takes too long. Source: issue 17; compared with pairs of real runs by bench/residents/real.py.
"""

MOST_ERROR = 0.25
"""Largest relative error of the simulated makespan; beyond it the simulator does not model these engines, tools or machine."""
