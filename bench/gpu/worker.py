"""What the weight-loading measurement adds to vLLM's worker (`worker_extension_cls`): take weights from another process's memory.

On a GPU the sender shares each tensor by CUDA IPC, so nothing crosses the host; on a CPU by a file in shared memory. Either way the
worker maps the sender's memory and copies it over its own parameters, which is what a weight sync from a trainer on the same card does.
"""

from __future__ import annotations

import pickle
import time
from typing import Any


class WeightReceiver:
    """Mixed into the worker by vLLM."""

    model_runner: Any

    def bench_shapes(self) -> list[tuple[str, list[int], str]]:
        """Name, shape and dtype of every parameter."""
        return [(name, list(one.shape), str(one.dtype).removeprefix("torch.")) for name, one in self.model_runner.model.named_parameters()]

    def bench_take(self, packed: bytes) -> tuple[int, float]:
        """Copy the tensors over the parameters of the same names; returns bytes and seconds, the copy finished."""
        import torch

        own, began, size = dict(self.model_runner.model.named_parameters()), time.monotonic(), 0
        with torch.no_grad():
            for name, kind, handle in pickle.loads(packed):
                sent = _mapped(kind, handle, own[name])
                own[name].copy_(sent)
                size += sent.numel() * sent.element_size()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return size, time.monotonic() - began

    def bench_sum(self) -> float:
        """Sum of the first values of every parameter: changes when weights do."""
        return float(sum(one.detach().flatten()[:8].float().sum().item() for one in self.model_runner.model.parameters()))


def _mapped(kind: str, handle: Any, like: Any) -> Any:
    """The sender's tensor in this process."""
    if kind == "cuda_ipc":
        rebuild, arguments = handle
        return rebuild(*arguments)
    import torch

    path, count = handle
    return torch.from_file(path, shared=True, size=count, dtype=like.dtype).view_as(like)


def share(tensors: dict[str, Any], folder: str) -> bytes:
    """The sender's side: what `bench_take` is given. `tensors` must live until it has returned; `folder` is used on a CPU only."""
    import torch

    packed = []
    for index, (name, tensor) in enumerate(tensors.items()):
        if tensor.is_cuda:
            from torch.multiprocessing.reductions import reduce_tensor

            packed.append((name, "cuda_ipc", reduce_tensor(tensor)))
        else:
            path = f"{folder}/weights{index}"
            torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten())
            packed.append((name, "file", (path, tensor.numel())))
    return pickle.dumps(packed)
