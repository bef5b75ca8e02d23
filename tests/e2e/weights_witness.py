"""Looked over the trainer ranks' shoulders: after every weight update each engine's shards are compared with what the trainer sent.

verl imports this module where it builds the model's config (`actor_rollout_ref.model.external_lib`). Rank 0 of each engine keeps the
tensors that pass, lets every worker of the engine write its shards down (`VLLM_ALLOW_INSECURE_SERIALIZATION=1`, for a function as a
message), and adds a line of JSON to the file HEDDLE_WITNESS. HEDDLE_KILL_AFTER names a step: after its weight update rank 0 kills its
engine's server, if the engine is of two workers.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path

import cloudpickle
import ray
import torch

from verl_heddle.verl_plugin import trainer_rank

cloudpickle.register_pickle_by_value(sys.modules[__name__])
HEADS, KV_HEADS = 2, 2
"""Of the recipes' tiny model."""
STACKED = {"qkv_proj": (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)), "gate_up_proj": (("gate_proj", 1), ("up_proj", 1))}
BY_COLUMN = ("o_proj", "down_proj")
WHOLE = ("norm.weight",)


def write_down(worker, folder):
    """Runs in a vLLM worker."""
    shards = {name: tensor.detach().clone() for name, tensor in worker.model_runner.model.named_parameters()}
    torch.save((worker.rank, shards), os.path.join(folder, f"{worker.rank}.pt"))


def expected(name, sent, rank, tp):
    """The shard of a parameter of vLLM's that worker `rank` of `tp` should hold, made from the trainer's tensors."""
    for stacked, parts in STACKED.items():
        if stacked in name:
            return torch.cat([sent[name.replace(stacked, part)].chunk(tp)[rank] for part, _ in parts])
    if name.endswith(WHOLE):
        return sent[name]
    if any(part in name for part in BY_COLUMN):
        return sent[name].chunk(tp, dim=1)[rank]
    return sent[name]  # a vocabulary, which vLLM pads: see `wrong`


def wrong(name, shard, sent, rank, tp):
    """Whether a worker's parameter is not what was sent."""
    want = expected(name, sent, rank, tp)
    if "embed_tokens" in name or "lm_head" in name:
        want = want[rank * len(shard) : (rank + 1) * len(shard)]
        shard = shard[: len(want)]
    return not torch.equal(shard.cpu(), want.cpu())


Adapter = trainer_rank.ServerAdapter
_update = Adapter.update_weights


async def update_weights(self, weights, global_steps=None, **kwargs):
    sent = {}

    async def passing():
        if inspect.isasyncgen(weights):
            async for name, tensor in weights:
                sent[name] = tensor.detach().clone()
                yield name, tensor
        else:
            for name, tensor in weights:
                sent[name] = tensor.detach().clone()
                yield name, tensor

    await _update(self, passing(), global_steps=global_steps, **kwargs)
    if self.rollout_rank or self._gone:
        return
    report = Path(os.environ["HEDDLE_WITNESS"])
    folder = report.parent / f"shards-{global_steps}-{self.replica_rank}"
    folder.mkdir(exist_ok=True)
    await self.server_handle.collective_rpc.remote(write_down, args=(str(folder),))
    found = dict(torch.load(path) for path in sorted(folder.glob("*.pt")))
    bad = [name for rank, shards in found.items() for name, shard in shards.items() if wrong(name, shard, sent, rank, len(found))]
    line = {"step": global_steps, "engine": self.replica_rank, "tp": len(found), "parameters": sum(map(len, found.values())), "wrong": bad}
    with report.open("a") as file:
        file.write(json.dumps(line) + "\n")
    if len(found) == 2 and global_steps == int(os.environ.get("HEDDLE_KILL_AFTER", -1)):
        ray.kill(self.server_handle)
        print(f"ENGINE KILLED after the weights of step {global_steps}", flush=True)


Adapter.update_weights = update_weights
