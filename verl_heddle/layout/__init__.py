"""Tensor-parallel layouts: feasibility, price, and the planner that chooses one between steps."""
