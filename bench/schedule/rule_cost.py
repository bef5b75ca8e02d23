"""What the preemption rule costs the engine in each step, on vLLM's real scheduler with many requests and no model.

    python bench/schedule/rule_cost.py --running 1024 --waiting 3072 --steps 40

Prints JSON, one line a case: `rule_ms` mean and worst milliseconds of the rule in a step, `schedule_ms` the mean of a whole
`schedule()` call, `victims` the most in one step. Cases: the best waiting request is refused by priority (`margin`), because every victim
has lost its place often enough (`capped`), because its context has no room (`no_room`); or every waiting request wins (`wins`).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from statistics import mean
from typing import Any

BLOCK = 16
CASES = {
    "margin": ({}, 0, 32),
    "capped": ({"max_preemptions": 0}, -50, 32),
    "no_room": ({"min_steps": 0}, -50, 60_000),
    "wins": ({"min_steps": 0}, -50, 32),
}
"""Case -> (settings of the rule, priority of who waits, where 0 is that of who runs, prompt tokens of the first who waits)."""


def scheduler(folder: str, case: str, running: int) -> Any:
    """vLLM's scheduler with our rule, as the engine core builds it."""
    import torch
    from transformers import Qwen2Config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from verl_heddle.verl_plugin.vllm_scheduler import HeddleScheduler

    os.environ |= {"HEDDLE_PREEMPT": json.dumps(CASES[case][0]), "HF_HUB_OFFLINE": "1"}
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape["max_position_embeddings"] = 65536
    Qwen2Config(architectures=["Qwen2ForCausalLM"], **shape).save_pretrained(folder)
    limits = {"max_model_len": 65536, "max_num_seqs": running, "max_num_batched_tokens": 65536, "block_size": BLOCK}
    arguments = EngineArgs(model=folder, skip_tokenizer_init=True, dtype="float32", scheduling_policy="priority", **limits)
    config = arguments.create_engine_config()
    blocks = running * 6 + 64  # room for who runs, and for no context of 60,000 tokens besides with 1,024 of them
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kv = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    outputs = StructuredOutputManager(config)
    return HeddleScheduler(vllm_config=config, kv_cache_config=kv, structured_output_manager=outputs, block_size=BLOCK, log_stats=True)


def measured(case: str, running: int, waiting: int, steps: int) -> dict[str, Any]:
    """Run a case for some steps."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher, sampling = get_request_block_hasher(BLOCK, sha256), SamplingParams(max_tokens=1000, ignore_eos=True)
    _, priority, prompt = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        made = scheduler(folder, case, running)

    def add(name: str, number: int, tokens: int, priority: int) -> None:
        made.add_request(
            Request(name, [number % 500] * tokens, sampling, None, priority=priority, block_hasher=hasher, arrival_time=number)
        )

    rule_s: list[float] = []
    make_way = made._make_way

    def timed() -> list[Any]:
        began = time.perf_counter()
        held: list[Any] = make_way()
        rule_s.append(time.perf_counter() - began)
        return held

    made._make_way = timed
    schedule_s, victims = [], [0]
    for i in range(running):
        add(f"run{i}", i, 32, 0)
    for step in range(steps + 10):
        if step == 10:
            rule_s.clear(), schedule_s.clear()
            for i in range(waiting):
                add(f"wait{i}", running + i, 32 if i else prompt, priority)
        before, began = made.tally["preempted_by_rule"], time.perf_counter()
        out = made.schedule()
        schedule_s.append(time.perf_counter() - began)
        victims.append(made.tally["preempted_by_rule"] - before)
        names = list(out.num_scheduled_tokens)
        sampled = [[7] if made.requests[name].num_computed_tokens >= made.requests[name].num_tokens else [] for name in names]
        made.update_from_output(out, ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled))
    rule_ms = {"mean": round(1000 * mean(rule_s), 3), "worst": round(1000 * max(rule_s), 3)}
    why = {name: count for name, count in made.counts().items() if name.startswith("refused_") and count}
    return {"case": case, "rule_ms": rule_ms, "schedule_ms": round(1000 * mean(schedule_s), 3), "victims": max(victims), **why}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=1024, metavar="N", help="requests in slots")
    parser.add_argument("--waiting", type=int, default=3072, metavar="N", help="requests that wait")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="engine steps")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    asked = parser.parse_args()
    for case in asked.cases:
        print(json.dumps(measured(case, asked.running, asked.waiting, asked.steps)), flush=True)


if __name__ == "__main__":
    main()
