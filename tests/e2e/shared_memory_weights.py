"""A checkpoint engine for one machine without GPUs: rank 0 of the trainer writes the weights to shared memory, rollout workers read them.

verl's own engines need devices. Named by `rollout.checkpoint_engine.custom_backend_module`, found through PYTHONPATH.
"""

import asyncio
import os
import tempfile

import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry


@CheckpointEngineRegistry.register("shm")
class SharedMemoryWeights(CheckpointEngine):
    def __init__(self, bucket_size, is_master=False, **kwargs):
        self.is_master, self.number, self.folder = is_master, 0, None

    def prepare(self):
        if self.is_master and self.folder is None:
            self.folder = tempfile.mkdtemp(prefix="heddle-weights-", dir="/dev/shm")
        return self.folder

    @classmethod
    def build_topology(cls, actor_wg_world_size, rollout_world_size, metadata):
        folder = metadata[0]
        return {"folder": [folder] * actor_wg_world_size}, {"folder": [folder] * rollout_world_size}

    def init_process_group(self, folder):
        self.folder, self.number = folder, self.number + 1
        self.path = os.path.join(folder, f"{self.number}.pt")

    def finalize(self):
        if self.is_master:
            os.remove(self.path)

    async def send_weights(self, weights, global_steps=None):
        if not self.is_master:
            for _ in weights:
                pass
            return {}
        torch.save([(name, tensor.detach().cpu().clone()) for name, tensor in weights], self.path + ".part")
        os.rename(self.path + ".part", self.path)
        return {}

    async def receive_weights(self, global_steps=None):
        while not os.path.exists(self.path):
            await asyncio.sleep(0.01)
        for name, tensor in torch.load(self.path):
            yield name, tensor
