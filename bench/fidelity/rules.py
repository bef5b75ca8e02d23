"""KV-bound runs on vLLM's own scheduler and block pool, on a virtual clock: what the simulator's *rules* get wrong, and no more.

    python bench/fidelity/rules.py           all configurations of `KV_BOUND`, five seeds; minutes; writes JSON and README's table

No model runs: vLLM's scheduler (the plugin's, with its rule where a configuration has preemption on arrival) decides every step of two
replicas, a step takes what the simulator's own law says, and the same orchestrator decides where turns go. So step times are exact, nobody
disturbs, and what differs is admission, eviction, preemption and counting of KV cache in blocks. It says nothing of real step times.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.fidelity.configurations import BATCH_TOKENS, BLOCK_TOKENS, KV_BOUND, REPLICAS, Configuration
from bench.fidelity.model import MAX_CONTEXT, VOCABULARY
from bench.fidelity.predict import Machine, predict, summary
from bench.fidelity.replay import identity, words
from bench.fidelity.run import facts
from bench.fidelity.table import README, rules_table
from bench.marked import fill
from bench.provenance import save
from verl_heddle.fleet import Replica
from verl_heddle.latency import LatencyModel
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.trajectory import Outcome, TrajectoryEnd, TurnEnd, TurnStart

RESULT = ROOT / "bench/results/cpu/fidelity_rules.json"
SEEDS = range(5)
OVERHEAD_S = 0.015
STEP_TIMES = LatencyModel.affine(0.0073, 0.00063, 1.45e-6, prefill_per_token_s=6.7e-5, prefill_base_s=0.0073)
"""The middle of what was calibrated on the engines of this bench (README.md)."""


def scheduler(folder: Path, configuration: Configuration, kv_tokens: int) -> Any:
    """As the engine core builds it, with that many tokens of KV cache."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from verl_heddle.verl_plugin.vllm_scheduler import HeddleScheduler

    arguments = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=MAX_CONTEXT,
        max_num_seqs=configuration.slots,
        max_num_batched_tokens=BATCH_TOKENS,
        block_size=BLOCK_TOKENS,
        scheduling_policy=configuration.order,
    )
    config = arguments.create_engine_config()
    config.scheduler_config.async_scheduling = False
    blocks = kv_tokens // BLOCK_TOKENS + 1  # vLLM keeps one for itself
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kv = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    outputs = StructuredOutputManager(config)
    built = HeddleScheduler(vllm_config=config, kv_cache_config=kv, structured_output_manager=outputs, block_size=BLOCK_TOKENS)
    if configuration.preempt and built.rule is None:
        raise RuntimeError(f"preemption on arrival is off: {built.off}")
    built.rule = built.rule if configuration.preempt else None
    built._epoch = 0.0
    return built


@dataclass
class Engine:
    """One replica: a scheduler, and the requests in it by name."""

    scheduler: Any
    live: dict[str, tuple[int, int, Any]] = field(default_factory=dict)
    planned: Any = None

    def begin(self) -> float:
        """Plan a step; its seconds, 0 for one in which nothing is computed."""
        self.planned = self.scheduler.schedule()
        batch = context = 0
        extra = 0.0
        for name, tokens in self.planned.num_scheduled_tokens.items():
            request = self.live[name][2]
            before = request.num_computed_tokens - tokens  # vLLM counts a step's tokens as computed once they are scheduled
            if request.num_computed_tokens == request.num_tokens:
                batch += 1
                context += request.num_tokens
            if tokens > 1:
                extra += STEP_TIMES.prefill_s(1, tokens, before) - STEP_TIMES.prefill_s(1, 1, before)
        if not self.planned.num_scheduled_tokens:
            return 0.0
        return float(extra + (STEP_TIMES.decode_s(1, batch, context / batch) if batch else STEP_TIMES.prefill_s(1, 1)))

    def finish(self) -> list[tuple[int, int, Any]]:
        """The step is over; the turns that ended with it."""
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(self.planned.num_scheduled_tokens)
        ready = [self.live[name][2].num_computed_tokens == self.live[name][2].num_tokens for name in names]
        tokens = [[(index * 31 + len(names)) % (VOCABULARY - 300) + 270] if whole else [] for index, whole in enumerate(ready)]
        output = ModelRunnerOutput(req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)}, sampled_token_ids=tokens)
        self.scheduler.update_from_output(self.planned, output)
        self.planned = None
        return [self.live.pop(name) for name in list(self.live) if self.live[name][2].is_finished()]


def replay(folder: Path, configuration: Configuration, seed: int) -> tuple[list[float], int]:
    """When each trajectory ended, and how many turns lost their slot."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
    work, history = configuration.work(seed)
    held = configuration.kv_tokens(seed) or MAX_CONTEXT * len(work)
    engines = {name: Engine(scheduler(folder, configuration, held)) for name in REPLICAS}
    policy = Orchestrator(configuration.options(seed))
    policy.replicas_added(Replica(name, slots=configuration.slots, kv_tokens=held) for name in REPLICAS)
    for end in history:
        policy.trajectory_ended(end, 0.0)
    contexts = [words(f"{item.prompt_id}", item.prompt_tokens or 1) for item in work]
    made, ends, lost = [0] * len(work), [0.0] * len(work), 0
    number = count()
    events: list[tuple[float, int, str, Any]] = [(0.0, next(number), "turn", (index, 0)) for index in range(len(work))]

    def push(at: float, what: str, about: Any) -> None:
        heapq.heappush(events, (at, next(number), what, about))

    while events:
        now, _, what, about = heapq.heappop(events)
        if what == "turn":
            index, turn = about
            item, who = work[index], identity(work[index], 0)
            contexts[index] += words(f"{who.key} {turn}", item.steps[turn].input_tokens or 0)
            decision = policy.turn_started(TurnStart(who, who.key, turn, len(contexts[index]), made[index]), now)
            push(now + OVERHEAD_S, "submit", (index, turn, decision))
            continue
        if what == "end":
            ends[about] = now
            policy.trajectory_ended(TrajectoryEnd(identity(work[about], 0), Outcome.FINISHED, made[about], len(work[about].steps)), now)
            continue
        if what == "submit":
            index, turn, decision = about
            engine, name = engines[decision.replica], f"{index}-{turn}-{0:08x}"
            sampling = SamplingParams(max_tokens=work[index].steps[turn].output_tokens, ignore_eos=True)
            request = Request(
                name, list(contexts[index]), sampling, None, priority=decision.priority, arrival_time=now, block_hasher=hasher
            )
            engine.live[name] = index, turn, request
            engine.scheduler.add_request(request)
            about = decision.replica
        engine = engines[about]
        if what == "step":
            for index, turn, request in engine.finish():
                lost += request.num_preemptions
                item, who = work[index], identity(work[index], 0)
                contexts[index] = list(request.all_token_ids)
                made[index] += item.steps[turn].output_tokens or 0
                policy.turn_finished(TurnEnd(who, who.key, about, turn, item.steps[turn].output_tokens or 0), now)
                later = now + (item.steps[turn].tool_latency_s or 0.0)
                push(later, *(("turn", (index, turn + 1)) if turn + 1 < len(item.steps) else ("end", index)))
        while engine.planned is None and engine.live:
            if (took := engine.begin()) > 0.0:
                push(now + took, "step", about)
            else:
                engine.finish()  # the only candidate threw itself out
    return ends, lost


def compared(folder: Path, configuration: Configuration, seed: int) -> dict[str, Any]:
    """One run both ways, errors as in `predict.compare`."""
    ends, lost = replay(folder, configuration, seed)
    result = predict(configuration, seed, Machine(STEP_TIMES, {"route_s": OVERHEAD_S}))
    return {
        "configuration": configuration.name,
        "seed": seed,
        "makespan_s": max(ends),
        "predicted_s": result.makespan_s,
        "makespan_error": result.makespan_s / max(ends) - 1.0,
        "finish_errors": [round(float(told / real - 1.0), 4) for told, real in zip(result.finish_s, ends, strict=True)],
        "preemptions": lost,
        "predicted_preemptions": result.preemptions,
    }


def measured(configurations: Sequence[Configuration] = KV_BOUND, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Every configuration with every seed."""
    from transformers import Qwen2Config

    with TemporaryDirectory() as folder:
        shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        Qwen2Config(architectures=["Qwen2ForCausalLM"], max_position_embeddings=MAX_CONTEXT, **shape).save_pretrained(folder)
        rows = [compared(Path(folder), one, seed) for one in configurations for seed in seeds]
    names = [one.name for one in configurations]
    by_name = {name: summary([row for row in rows if row["configuration"] == name]) for name in names}
    return {"overall": summary(rows), "configurations": by_name, "runs": rows}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    result = facts() | measured()
    save(RESULT, result)
    fill(README, "rules", rules_table(result))
    print(rules_table(result))


if __name__ == "__main__":
    main()
