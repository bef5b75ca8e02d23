"""Simulates whole training runs: when a trainer asks for rollouts, what it waits for, and how its weight updates affect them.

`simulate` plays one batch from its first start to its last end, which covers a synchronous step. verl's asynchronous trainers ask for the
next prompts while earlier ones are in flight, and every weight update interrupts them; this package plays the same engines and policies
under such trainers.
"""
