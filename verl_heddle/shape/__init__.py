"""What to sample and what to finish: redundancy budgets, dual-end selection, and their effect on the gradient.

`shaper.Shaper` is the entry point: events in, decisions out, no clock and no randomness. Source: DARTS (arXiv 2605.30859); each module
states where it differs.
"""
