"""What to sample and what to finish: redundancy budgets, dual-end selection, and what they do to the gradient.

`shaper.Shaper` is the door: events in, decisions out, no clock and no randomness. Source: DARTS (arXiv 2605.30859); what differs from it is
said in each file.
"""
