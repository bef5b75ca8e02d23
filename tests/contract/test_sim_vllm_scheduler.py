"""The simulated engine against vLLM's real scheduler (no model, no GPU): every request gets its last token in the same step.

vLLM's `Scheduler` is driven by a loop that samples a made-up token for every request whose prefill is complete. The simulator
runs the same requests with steps of one second. Queue order, chunked prefill, admission, preemption under KV pressure, the prefix
cache over turns and over a group's prompt all decide in which step a request ends, so equal steps mean equal rules. KV blocks of
one token: the simulator counts tokens.

Three things differ by design, all of them only when KV is short, and are kept out of the comparison: a prompt's last block that a
sibling has a copy of; KV of a prefill in several chunks (taken at admission, by vLLM chunk by chunk); and the step that vLLM
denies to requests standing behind one that threw itself out.
"""

import heapq
import json
import random
from itertools import count

import pytest

pytest.importorskip("vllm")

from verl_heddle.fleet import Replica
from verl_heddle.simulate import EngineOptions, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.trajectory import Decision, Reason, Trajectory, Turn

SEEDS = 40

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}


class OneSecond:
    """Latency model: every step takes a second, whatever is in it."""

    def decode_s(self, tp, batch, context):
        return 1.0

    def prefill_s(self, tp, new, context=0):
        return 1.0

    def kv_tokens(self, tp):
        return None

    def fits(self, tp):
        return True


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


def make_scheduler(model, order, slots, batch_tokens, capacity, caching):
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    arguments = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=slots,
        max_num_batched_tokens=batch_tokens,
        scheduling_policy=order,
        block_size=1,
        enable_prefix_caching=caching,
    )
    config = arguments.create_engine_config()
    config.scheduler_config.async_scheduling = False
    blocks = capacity + 1  # vLLM keeps one for itself
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=1, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kv = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    manager = StructuredOutputManager(config)
    return Scheduler(vllm_config=config, kv_cache_config=kv, structured_output_manager=manager, block_size=1)


def vllm_steps(scheduler, work, ranks, arrivals):
    """The step after which each trajectory ends, how many preemptions there were, and whether a running request was denied a step."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(1, sha256)
    rng = random.Random(0)
    number = count()
    prompts = {}
    tokens = [list(prompts.setdefault(item.prompt_id, rng.choices(range(10, 900), k=item.prompt_tokens))) for item in work]
    events = [(at, next(number), index, 0) for index, at in enumerate(arrivals)]
    heapq.heapify(events)
    live, ends = {}, [0] * len(work)
    preemptions = step = 0
    denied = False
    while events or live:
        while events and events[0][0] <= step:
            _, order, index, turn = heapq.heappop(events)
            if turn == len(work[index].steps):
                ends[index] = step
                continue
            made = work[index].steps[turn]
            tokens[index] += rng.choices(range(10, 900), k=made.input_tokens)
            sampling = SamplingParams(max_tokens=made.output_tokens, ignore_eos=True)
            name = f"{index}-{turn}"
            at = step + order * 1e-6  # simultaneous arrivals keep their order
            request = Request(name, list(tokens[index]), sampling, None, priority=ranks[index], block_hasher=hasher, arrival_time=at)
            live[name] = (index, turn, request)
            scheduler.add_request(request)
        if not live:
            step = events[0][0] if events else step
            continue
        planned = scheduler.schedule()
        denied |= len(planned.num_scheduled_tokens) < len(scheduler.running)
        names, sampled = list(planned.num_scheduled_tokens), []
        for name in names:
            request = live[name][2]
            computed = request.num_computed_tokens
            sampled.append([rng.randrange(10, 900)] if computed == request.num_tokens else [])
        scheduler.update_from_output(
            planned, ModelRunnerOutput(req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)}, sampled_token_ids=sampled)
        )
        step += planned.total_num_scheduled_tokens > 0  # a step in which the only candidate threw itself out takes no time
        for name in [name for name in live if live[name][2].is_finished()]:
            index, turn, request = live.pop(name)
            preemptions += request.num_preemptions
            tokens[index] = list(request.all_token_ids)
            heapq.heappush(events, (step + int(work[index].steps[turn].tool_latency_s), next(number), index, turn + 1))
    return ends, preemptions, denied


class Ranked(Stock):
    """Stock with a fixed priority for each trajectory."""

    def __init__(self, ranks):
        super().__init__()
        self.ranks = ranks

    def turn_started(self, turn, now):
        return Decision(super().turn_started(turn, now).replica, self.ranks[turn.trajectory.key], Reason.STICKY)


def invent(seed):
    rng = random.Random(seed)
    work = []
    for group in range(rng.randint(1, 6)):
        prompt = rng.choice([1, 7, 40, 120])
        for trial in range(rng.randint(1, 4)):
            turns = tuple(
                Turn(rng.choice([0, 3, 30]) if i else 0, rng.choice([1, 2, 9, 40]), "tool", float(rng.randint(1, 12)))
                for i in range(rng.randint(1, 4))
            )
            work.append(Trajectory("test", "test", f"p{group}", trial, prompt, turns))
    return rng, work


@pytest.mark.parametrize("order", ["fcfs", "priority"])
@pytest.mark.parametrize("room", ["ample", "short"])
@pytest.mark.parametrize("caching", [True, False], ids=["cache", "nocache"])
def test_every_request_ends_in_the_same_step(model, order, room, caching):
    preempted = compared = 0
    for seed in range(SEEDS):
        rng, work = invent(seed)
        slots, batch_tokens = rng.randint(2, 6), rng.choice([16, 64, 512])
        if room == "short":
            work, batch_tokens = [item for item in work if item.trial == 0], 512
        longest = max(item.prompt_tokens + sum(t.input_tokens + t.output_tokens for t in item.steps) for item in work)
        capacity = 4000 if room == "ample" else longest + rng.randint(0, 60)
        ranks = [rng.randint(0, 3) for _ in work]
        arrivals = [rng.choice([0, 0, 3, 17]) for _ in work]
        theirs, preemptions, denied = vllm_steps(
            make_scheduler(model, order, slots, batch_tokens, capacity, caching), work, ranks, arrivals
        )
        policy = Ranked({f"0:{item.prompt_id}_{item.trial}": rank for item, rank in zip(work, ranks, strict=True)})
        options = EngineOptions(order, batch_tokens, 1, prefix_cache=caching)
        ours = simulate(
            work, [Replica("r", 1, slots, capacity)], OneSecond(), policy, engine=options, arrivals_s=[float(a) for a in arrivals]
        )
        if denied and room == "short":
            continue
        assert ours.finish_s.tolist() == theirs, f"seed {seed}"
        assert ours.preemptions == preemptions
        preempted += preemptions
        compared += 1
    assert compared >= 0.9 * SEEDS
    assert (preempted > 0) == (room == "short")
