"""The two places where the experiments run: `h200`, and `rehearsal` on a CPU with a tiny model. Same code, other sizes.

A profile holds every number an experiment uses, so that a result can be read with its `settings` beside it. The prior of a profile is what
is known of step times before anything was measured: for the H200 the shipped table (no host work in it), for the rehearsal the formula that
bench/fidelity fitted on two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bench.gpu.shapes import QWEN3, TINY, TINY_POLICY, Shape
from bench.schedule.work import WORKLOADS
from verl_heddle.latency import LatencyModel, load
from verl_heddle.traces import Workload

CPU_ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONDONTWRITEBYTECODE": "",
}
"""As `+machine=cpu` sets it."""

GPU_ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0"}
"""Neither flashinfer nor DeepGEMM is in the bundle; both would only matter to sampling with top-p and to FP8."""

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""No waiting for a network that is not there."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A replayed step: `prompts` groups of `samples` (+ `spare` where redundancy is asked about) on `replicas` engines."""

    workload: Workload
    prompts: int
    samples: int
    slots: int
    kv_tokens: int
    replicas: int = 1
    spare: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """A GRPO run of the math recipe with a random policy; `overrides` beside the recipe's own."""

    shape: Shape
    steps: int
    rows: int
    mean_tokens: int
    gpus: int
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """See the module. Tokens, seconds, shares of GPU memory."""

    name: str
    device: str
    shape: Shape
    prior: Callable[[], LatencyModel]
    prior_source: str
    dtype: str
    environment: dict[str, str]
    max_model_len: int
    block_tokens: int
    batch_tokens: int
    quantum_tokens: int
    sleeps: bool
    """Whether vLLM's sleep mode frees memory here."""
    neighbours: float
    """How much slower a step is while another engine shares the device: processes take turns on the SMs of a GPU."""
    memory_share: float
    tau_batches: tuple[int, ...]
    tau_contexts: tuple[int, ...]
    tau_kv_tokens: int
    tau_tokens: int
    prefills: tuple[tuple[int, int], ...]
    """(new tokens, cached context)."""
    schedule: Scenario
    place: Scenario
    shape_: Scenario
    sleep_shapes: tuple[Shape, ...]
    endtoend: EndToEnd
    times: dict[str, tuple[float, float]]
    """Least and most seconds of each experiment."""

    def settings(self) -> dict[str, Any]:
        """What every result tells of it."""
        return {
            "model": self.shape.name,
            "dtype": self.dtype,
            "block_tokens": self.block_tokens,
            "batch_tokens": self.batch_tokens,
            "max_model_len": self.max_model_len,
        }


def h200() -> Profile:
    """One H200. Sizes are chosen so that all experiments fit two commands of ten minutes."""
    agentic = replace(
        WORKLOADS["agentic"],
        median_tokens=400.0,
        prompt_tokens=800.0,
        input_tokens=250.0,
        cap_tokens=2500,
        tool_mean_s=0.3,
        max_turns=12,
        max_input_tokens=1000,
    )
    one_turn = replace(agentic, name="one_turn", median_turns=1.0, turns_per_length=0.0, turns_sigma=0.0, max_turns=1, sample_sigma=0.6)
    return Profile(
        name="h200",
        device="H200",
        shape=QWEN3["Qwen3-8B"],
        prior=lambda: load("H200", "Qwen3-8B"),
        prior_source="the shipped latency table, Qwen3-8B on H200 (engine steps alone, no host work)",
        dtype="bfloat16",
        environment=OFFLINE | GPU_ENVIRONMENT,
        max_model_len=36_864,
        block_tokens=16,
        batch_tokens=8192,
        quantum_tokens=64,
        sleeps=True,
        neighbours=2.0,
        memory_share=0.85,
        tau_batches=(256, 128, 64, 32, 16, 8, 4, 1),
        tau_contexts=(1024, 4096, 8192, 32_768),
        tau_kv_tokens=560_000,
        tau_tokens=64,
        prefills=((512, 0), (2048, 0), (8192, 0), (512, 8192), (2048, 8192), (2048, 32_768)),
        schedule=Scenario(agentic, prompts=64, samples=1, slots=16, kv_tokens=40_960),
        place=Scenario(agentic, prompts=32, samples=1, slots=8, kv_tokens=65_536, replicas=2, seeds=(0, 1)),
        shape_=Scenario(one_turn, prompts=12, samples=8, slots=128, kv_tokens=400_000, spare=2, seeds=(0, 1)),
        sleep_shapes=(QWEN3["Qwen3-0.6B"], QWEN3["Qwen3-8B"]),
        endtoend=EndToEnd(
            QWEN3["Qwen3-0.6B"],
            steps=3,
            rows=16,
            mean_tokens=400,
            gpus=1,
            overrides=(
                "+size=qwen3-0.6b",
                "data.train_batch_size=16",
                "actor_rollout_ref.actor.ppo_mini_batch_size=16",
                "data.max_response_length=3072",
                "actor_rollout_ref.rollout.max_model_len=5120",
                "actor_rollout_ref.rollout.max_num_seqs=32",
                "actor_rollout_ref.rollout.gpu_memory_utilization=0.4",
                "actor_rollout_ref.rollout.free_cache_engine=true",
                "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=16384",
                "actor_rollout_ref.rollout.agent.num_workers=2",
                "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384",
                "actor_rollout_ref.actor.use_torch_compile=false",
                "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
                "actor_rollout_ref.model.use_remove_padding=false",
                "++actor_rollout_ref.model.override_config.attn_implementation=sdpa",
                "reward.num_workers=2",
                "++ray_kwargs.ray_init.include_dashboard=false",
                "++ray_kwargs.ray_init.num_cpus=12",
            ),
        ),
        times={
            "smoke": (60, 180),
            "tau": (90, 210),
            "schedule": (100, 240),
            "place": (120, 240),
            "endtoend": (220, 420),
            "shape": (80, 150),
            "sleep": (80, 200),
            "fidelity": (5, 30),
        },
    )


def rehearsal() -> Profile:
    """A CPU: every line of the experiments runs, no figure of it says anything about a GPU."""
    agentic = replace(WORKLOADS["agentic"], median_tokens=120.0, cap_tokens=600, tool_mean_s=0.2)
    one_turn = replace(WORKLOADS["one_turn"], median_tokens=90.0, cap_tokens=400, sample_sigma=0.6)
    return Profile(
        name="rehearsal",
        device="cpu",
        shape=TINY,
        prior=lambda: LatencyModel.affine(0.0073, 0.00063, 1.45e-6, prefill_per_token_s=6.7e-5, name="tiny on a CPU"),
        prior_source="the formula bench/fidelity fitted to its own model on two cores",
        dtype="float32",
        environment=OFFLINE | CPU_ENVIRONMENT,
        max_model_len=2048,
        block_tokens=32,
        batch_tokens=2048,
        quantum_tokens=16,
        sleeps=False,
        neighbours=1.0,
        memory_share=0.1,
        tau_batches=(8, 4, 1),
        tau_contexts=(64, 512),
        tau_kv_tokens=16_000,
        tau_tokens=24,
        prefills=((128, 0), (512, 0), (128, 512)),
        schedule=Scenario(agentic, prompts=14, samples=1, slots=4, kv_tokens=3072, seeds=(0,)),
        place=Scenario(agentic, prompts=12, samples=1, slots=3, kv_tokens=8192, replicas=2, seeds=(0,)),
        shape_=Scenario(one_turn, prompts=4, samples=3, slots=8, kv_tokens=8192, spare=1, seeds=(0,)),
        sleep_shapes=(TINY,),
        endtoend=EndToEnd(
            TINY_POLICY,
            steps=2,
            rows=4,
            mean_tokens=40,
            gpus=1,
            overrides=(
                "+machine=cpu",
                "data.train_batch_size=4",
                "actor_rollout_ref.actor.ppo_mini_batch_size=4",
                "data.max_response_length=256",
                "actor_rollout_ref.rollout.max_num_seqs=8",
            ),
        ),
        times={
            "smoke": (20, 150),
            "tau": (20, 150),
            "schedule": (20, 200),
            "place": (30, 220),
            "endtoend": (60, 600),
            "shape": (20, 150),
            "sleep": (20, 150),
            "fidelity": (2, 30),
        },
    )


PROFILES = {"h200": h200, "rehearsal": rehearsal}
