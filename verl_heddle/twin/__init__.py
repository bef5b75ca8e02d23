"""After every step: what would it have taken under the other rule? `heddle/twin/*` on W&B, without an A/B run.

The simulator plays the recorded step twice, as it ran and under the other rule (stock verl's under `+plugin=heddle`, heddle's under
`+plugin=observe`), on engines whose speed is calibrated from the step itself. What it gets wrong in both cancels in their ratio; what it
gets wrong of the step that ran is shown as `error`, and above `MOST_ERROR` it does not judge. It runs in a process of its own at the lowest
priority, beside the trainer's update, and is stopped when it takes too long. Source: issue 17; held against pairs of real runs by
bench/residents/real.py.
"""

MOST_ERROR = 0.25
"""Of the makespan that the simulator makes of the step as it ran: beyond it engines, tools or machine are not as it knows them."""
