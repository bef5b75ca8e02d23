"""Whole runs of training, simulated: when a trainer asks for rollouts, what it waits for, and what its weight updates do to them.

`simulate` plays one batch from its first start to its last end, which is all there is to a synchronous step. verl's asynchronous trainers
ask for the next prompts while earlier ones are under way, and interrupt them with every weight update: here the same engines and policies
are played under them.
"""
