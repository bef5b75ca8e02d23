"""Real runs against each other: `verl-heddle compare` starts them, keeps what is finished, and reads what they recorded.

This room starts processes and reads clocks, like `verl_plugin` and `report`; it imports neither verl, Ray, vLLM nor torch. The runs are
ordinary verl commands: nothing here is inside them.
"""
