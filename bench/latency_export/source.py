"""AIConfigurator as a function: milliseconds of one decode step, of one prefill. The only file here that imports it.

Wanted in the environment: `aiconfigurator==0.12.0` and `aiconfigurator-core==0.12.0` (Apache-2.0; CPU only, 850 MB).
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sizes import STEP_TOKENS

WANTED = "0.12.0"
VLLM = "0.24.0"
"""Newest vLLM the tables of that version cover on Hopper."""

TPS = (1, 2, 4, 8)

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A GPU as AIConfigurator calls it (`system`, measured with vLLM `vllm`) and as torch sees it."""

    system: str
    memory_bytes: int
    aliases: tuple[str, ...]
    vllm: str = VLLM


GPUS = {
    # Memory is what torch prints in its out-of-memory errors, a little less than the nominal 80 and 141 GB.
    "H100": Gpu("h100_sxm", int(79.18 * GIB), ("h100_sxm", "H100 80GB", "NVIDIA H100 80GB HBM3")),
    "H200": Gpu("h200_sxm", int(139.80 * GIB), ("h200_sxm", "H200 141GB", "NVIDIA H200")),
}

MODELS = {
    # Path that AIConfigurator resolves, and names of checkpoints with the same shape.
    "Qwen3-8B": ("Qwen/Qwen3-8B", ("Qwen3-8B-Base",)),
    # Not among the bundled configs: its config.json lies beside this file; all of its kernels are interpolated from the same op tables.
    "Qwen3-14B": (str(Path(__file__).parent / "Qwen3-14B"), ("Qwen3-14B-Base",)),
    "Qwen3-32B": ("Qwen/Qwen3-32B", ()),
    "Qwen3-30B-A3B": (
        "Qwen/Qwen3-30B-A3B",
        ("Qwen3-30B-A3B-Base", "Qwen3-30B-A3B-Instruct-2507", "Qwen3-30B-A3B-Thinking-2507", "Qwen3-Coder-30B-A3B-Instruct"),
    ),
}


class Source:
    """Latency of one model on one GPU at one tensor-parallel degree, mixture of experts split by tensor parallelism.

    `path`: a model that AIConfigurator bundles, or a folder with a config.json; its precision is that of the config.
    """

    def __init__(self, gpu: Gpu, path: str, tp: int, experts: bool) -> None:
        logging.disable(logging.WARNING)  # it announces fallback tables of models that are not asked for here
        from aiconfigurator.sdk import config, models, perf_database  # here: only this environment of its own has it, and --help needs none
        from aiconfigurator.sdk.backends.factory import get_backend
        from aiconfigurator.sdk.inference_session import InferenceSession

        self._runtime = config.RuntimeConfig
        self._database = perf_database.get_database(gpu.system, "vllm", gpu.vllm)
        split = {"moe_tp_size": tp, "moe_ep_size": 1} if experts else {}
        self._model = models.get_model(path, config.ModelConfig(tp_size=tp, **split), "vllm")
        self._backend = get_backend("vllm")
        self._session = InferenceSession(self._model, self._database, self._backend)

    def decode_ms(self, batch: int, context: int) -> float:
        """One decode step of `batch` sequences with `context` tokens each."""
        asked = self._runtime(batch_size=batch, isl=context, osl=2)
        return float(self._session.run_static_latency_only(asked, "static_gen", stride=1))

    def prefill_ms(self, new: int, context: int) -> float:
        """Prefill of `new` tokens of one sequence after `context` cached ones, in one piece."""
        asked = self._runtime(batch_size=1, isl=new + context, osl=2, prefix=context)
        return float(self._session.run_static_latency_only(asked, "static_ctx"))

    def overhead_bytes(self) -> int:
        """Memory of a GPU that is neither weights nor KV cache: activations of a full step, communication buffers, CUDA context and graphs.

        AIConfigurator's estimate; its 3.5 GiB for context and graphs are, in its own words, raised "for safer deployment".
        """
        parts = self._backend._get_memory_usage(self._model, self._database, 1, 1, STEP_TOKENS, 1, num_tokens=STEP_TOKENS, max_seq_len=1)
        return int((parts["activations"] + parts["nccl"] + parts["others"]) * GIB)


def shape(model: str) -> dict[str, Any]:
    """The Hugging Face config of a model, bundled or beside this file."""
    path = Path(MODELS[model][0])
    if not path.is_dir():
        import aiconfigurator_core

        bundled = Path(aiconfigurator_core.__file__).parent / "model_configs"
        return dict(json.loads((bundled / f"{MODELS[model][0].replace('/', '--')}_config.json").read_text()))
    return dict(json.loads((path / "config.json").read_text()))


def check_version() -> None:
    """Stop where another version would silently give other numbers."""
    have = {name: version(name) for name in ("aiconfigurator", "aiconfigurator-core")}
    if set(have.values()) != {WANTED}:
        raise SystemExit(f"this exporter was checked with aiconfigurator {WANTED}, found {have}")
