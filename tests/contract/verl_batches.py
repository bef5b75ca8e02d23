"""A batch of prompts as verl's trainer makes it, and verl's worker with nothing but its way of starting them."""

from __future__ import annotations

from omegaconf import OmegaConf
from verl.utils import tensordict_utils as tu

from verl_heddle.verl_plugin.agent_loop import HeddleWorker

STEP = 7


def batch(prompts, validate=False, **more):
    """The batch, and the chat messages of its prompts; `uid`s are u0, u1, ..."""
    raw = [[{"role": "user", "content": text}] for text in prompts]
    made = tu.get_tensordict({"uid": [f"u{n}" for n in range(len(prompts))], "raw_prompt": raw, "index": list(range(len(prompts))), **more})
    tu.assign_non_tensor_data(made, "global_steps", STEP)
    if validate:
        tu.assign_non_tensor_data(made, "validate", True)
    return made, raw


class BareWorker(HeddleWorker):
    """Without engines and actors; `samples` is `rollout.n`. Give it an `_run_agent_loop`."""

    def __init__(self, samples: int):
        sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
        more = {"n": samples, "calculate_log_probs": False, "val_kwargs": {"n": 1, **sampling}, "agent": {"default_agent_loop": "x"}}
        self.config = OmegaConf.create({"actor_rollout_ref": {"rollout": {**more, **sampling}}})
        self.background_tasks = set()
