"""What is heddle worth under verl's trainers on real engines that are short of KV? `verl-heddle compare` on a CPU, with replayed lengths.

    python bench/modes/real.py                              five pairs under colocate_async, about 50 minutes
    python bench/modes/real.py --modes separate_async       the other one; results that are there stay
    python bench/modes/real.py --quick                      one pair of three steps; prints only

Real verl training of a small deep policy; trajectories of several turns with tools (sleeps) by an agent loop that asks for given lengths,
so that both arms generate the same. Tokens trained on per second; beside it the simulator's forecast (`verl_heddle.training`), with step
times and the trainer's seconds from a synchronous run. Uses the whole machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.marked import fill
from bench.provenance import save
from bench.schedule.pairs import facts, outside_s
from bench.schedule.work import WORKLOADS
from verl_heddle.fleet import Replica
from verl_heddle.latency import LatencyModel, calibrate
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.simulate import EngineOptions
from verl_heddle.simulate.baselines.stock import Stock
from verl_heddle.simulate.workload import walk
from verl_heddle.traces import generate, read, write
from verl_heddle.training.play import train
from verl_heddle.training.trainer import Trainer
from verl_heddle.trajectory import Trajectory

RESULT = ROOT / "bench/results/cpu/modes.json"
README = Path(__file__).with_name("README.md")
PROMPTS, SAMPLES, REPLICAS, SLOTS = 6, 4, 2, 24
BLOCK_TOKENS, BATCH_TOKENS = 32, 2048
PROMPT_TOKENS, RESPONSE_TOKENS = 192, 1408
KV_SHARE = 0.25
"""Of the contexts of one batch at their ends: what the KV cache of both replicas holds."""
STEPS, SKIP, SPARE = 4, 1, 3
"""Of a run; of them warm-up; batches more that are asked for ahead."""
POLICY = {"layers": 12, "hidden_size": 128, "intermediate_size": 384, "heads": 4, "steps": 1}
"""Deep and narrow: an engine's step is many small kernels, as on a GPU, and a training step is seconds. What it says does not matter."""
WORKLOAD = replace(
    WORKLOADS["agentic"],
    median_tokens=100.0,
    prompt_sigma=0.6,
    median_turns=20.0,
    prompt_tokens=120.0,
    input_tokens=50.0,
    max_input_tokens=75,
    cap_tokens=250,
    max_turns=26,
    tool_mean_s=0.15,
)
"""As many turns as a coding agent has, each short: what stock reads again is then more than what an update reads. Chosen by its forecast,
before any real run; with six longer turns the forecast is 1.00x, since an update on a CPU takes as long as the rollouts."""

ARMS = ("stock", "heddle")
MODES: dict[str, tuple[str, ...]] = {
    "colocate_async": ("trainer.v1.trainer_mode=colocate_async", f"trainer.n_gpus_per_node={REPLICAS}"),
    "separate_async": (
        *("trainer.v1.trainer_mode=separate_async", "trainer.v1.separate_async.parameter_sync_step=1", "trainer.n_gpus_per_node=1"),
        *("actor_rollout_ref.rollout.nnodes=1", f"actor_rollout_ref.rollout.n_gpus_per_node={REPLICAS}"),
        *(f"ray_kwargs.ray_init.num_gpus={REPLICAS + 1}", "actor_rollout_ref.rollout.checkpoint_engine.backend=shm"),
        "++actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=shared_memory_weights",
    ),
}
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests/e2e")])


def groups(seed: int = 0) -> list[list[Trajectory]]:
    """The samples of every prompt, in the order in which the trainer asks for them; all fit the context."""
    made: dict[str, list[Trajectory]] = {}
    for item in generate(WORKLOAD, (STEPS + SPARE) * PROMPTS, SAMPLES, seed):
        made.setdefault(item.prompt_id, []).append(fitting(replace(item, prompt_tokens=min(item.prompt_tokens or 1, PROMPT_TOKENS))))
    return list(made.values())


def fitting(item: Trajectory) -> Trajectory:
    """As many turns as verl's response length takes."""
    room, kept = RESPONSE_TOKENS, []
    for turn in item.steps:
        room -= (turn.input_tokens or 0) + (turn.output_tokens or 0)
        if room < 0:
            break
        kept.append(turn)
    return replace(item, steps=tuple(kept))


def kv_tokens(plays: Sequence[Sequence[Trajectory]]) -> int:
    """KV cache of a replica, in whole blocks; the longest context fits."""
    ends = [max(context + output for context, _, output in walk(item)) for group in plays for item in group]
    batch = PROMPTS * SAMPLES * sum(ends) / len(ends)
    wanted = max(KV_SHARE * batch / REPLICAS, max(ends) + BLOCK_TOKENS)
    return -(-round(wanted) // BLOCK_TOKENS) * BLOCK_TOKENS


def prepare(folder: Path, plays: Sequence[Sequence[Trajectory]]) -> None:
    """Policy, rows, the trace of what is played, and the list of agent loops."""
    from recipes.math.prepare import lesson
    from recipes.tiny.files import write_rows
    from recipes.tiny.model import build

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "policy" / "config.json").exists():
        build(folder / "policy", replace(lesson(), training=POLICY))
    rows = [
        {
            "prompt": [{"role": "user", "content": group[0].prompt_id}],
            "data_source": "replay",
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": index},
            "agent_name": "replay",
        }
        for index, group in enumerate(plays)
    ]
    write_rows(folder / "train.parquet", rows)
    write(folder / "played.jsonl", [item for group in plays for item in group])
    loops = [{"name": "replay", "_target_": "bench.modes.replay_loop.ReplayLoop", "path": str(folder / "played.jsonl")}]
    (folder / "loops.yaml").write_text(json.dumps(loops))  # JSON is YAML


def command(folder: Path, held: int) -> list[str]:
    """verl's, without mode, plugin and number of steps."""
    rollout, vllm = "actor_rollout_ref.rollout", "+actor_rollout_ref.rollout.engine_kwargs.vllm"
    return [
        *(sys.executable, "-W", "ignore", "-m", "verl.trainer.main_ppo", f"hydra.searchpath=[file://{ROOT}/recipes/config]"),
        *("+recipe=math", "+machine=cpu", f"actor_rollout_ref.model.path={folder}/policy"),
        *(f"data.train_files={folder}/train.parquet", f"data.val_files={folder}/train.parquet", f"data.train_batch_size={PROMPTS}"),
        *(f"data.max_prompt_length={PROMPT_TOKENS}", f"data.max_response_length={RESPONSE_TOKENS}"),
        *(f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=12"),
        *("actor_rollout_ref.actor.optim.lr=0", f"{rollout}.log_prob_micro_batch_size_per_gpu=12"),
        *(f"{rollout}.n={SAMPLES}", f"{rollout}.max_num_seqs={SLOTS}", f"{rollout}.max_model_len={PROMPT_TOKENS + RESPONSE_TOKENS + 1}"),
        *(f"{rollout}.max_num_batched_tokens={BATCH_TOKENS}", f"{rollout}.agent.agent_loop_config_path={folder}/loops.yaml"),
        *(f"{vllm}.num_gpu_blocks_override={held // BLOCK_TOKENS}", f"{vllm}.block_size={BLOCK_TOKENS}"),
        f"reward.custom_reward_function.path={ROOT}/bench/modes/replay_loop.py",
        *("trainer.total_epochs=4", "trainer.test_freq=-1", f"++ray_kwargs.ray_init.runtime_env.env_vars.PYTHONPATH='{PYTHONPATH}'"),
    ]


def learn(folder: Path, words: Sequence[str]) -> tuple[LatencyModel, float, float]:
    """Step times, the seconds a turn spends outside of the engine, and the trainer's seconds, from a synchronous run under verl's rule."""
    out = folder / "learn"
    told = out / "metrics.jsonl"
    told.unlink(missing_ok=True)
    out.mkdir(exist_ok=True)
    overrides = [
        *(
            "+plugin=observe",
            "heddle.trace.enable=true",
            "trainer.v1.trainer_mode=sync",
            f"trainer.n_gpus_per_node={REPLICAS}",
            "trainer.total_training_steps=3",
        ),
        *("trainer.logger=[console,file]", f"heddle.trace.dir={out}", f"trainer.default_local_dir={out}", f"hydra.run.dir={out}/hydra"),
    ]
    with open(out / "train.log", "w") as log:
        subprocess.run([*words, *overrides], check=True, stdout=log, stderr=subprocess.STDOUT, timeout=1200, env=environment(told))
    records = [item for item in read(out / "trace.jsonl") if item.meta["step"] > 1]
    steps = [line["data"] for line in map(json.loads, told.read_text().splitlines()) if line["step"] > 1]
    update_s = median(step["timing_s/step"] - step["timing_s/gen"] for step in steps)
    return calibrate(records), outside_s(records), update_s


def environment(metrics: Path) -> dict[str, str]:
    """Of verl's processes."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE")}
    return kept | {"PYTHONPATH": PYTHONPATH, "VERL_FILE_LOGGER_PATH": str(metrics), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def forecast(arm: str, mode: str, plays: Sequence[Sequence[Trajectory]], held: int, learnt: tuple[LatencyModel, float, float]) -> float:
    """Tokens trained on per second in the simulator."""
    latency, overhead_s, update_s = learnt
    policy = Stock(0) if arm == "stock" else Orchestrator(Options())
    if isinstance(policy, Orchestrator):
        policy.step_times_known(latency)
    order = "fcfs" if arm == "stock" else "priority"
    engine = EngineOptions(order, batch_tokens=BATCH_TOKENS, block_tokens=BLOCK_TOKENS, turn_overhead_s=overhead_s)  # type: ignore[arg-type]
    fleet = [Replica(f"replica_{number}", slots=SLOTS, kv_tokens=held) for number in range(REPLICAS)]
    return train(plays, fleet, latency, policy, Trainer(mode, PROMPTS, update_s, steps=STEPS), engine, SKIP).tokens_per_s  # type: ignore[arg-type]


def measured(mode: str, folder: Path, words: Sequence[str], pairs: int, steps: int) -> dict[str, Any]:
    """The pairs, by `compare`."""
    out = folder / mode
    options = ["--out", str(out), "--pairs", str(pairs), "--steps", str(steps), "--warmup", str(SKIP), "--no-wandb"]
    typed = [sys.executable, "-m", "verl_heddle.cli", "compare", *options, "--", *words, *MODES[mode]]
    done = subprocess.run(typed, env=environment(out / "none"), timeout=7200)
    if done.returncode:
        raise SystemExit(f"compare ended with {done.returncode}; finished runs are kept in {out}: start again to go on")
    answer: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return answer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair of three steps; nothing written")
    parser.add_argument("--pairs", type=int, default=5, help="of runs (5)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["colocate_async"], help="which (colocate_async)")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench_modes", help="folder of the runs; finished ones are kept")
    args = parser.parse_args(argv)
    plays, folder = groups(), args.out.resolve()
    held = kv_tokens(plays)
    prepare(folder, plays)
    words = command(folder, held)
    learnt = learn(folder, words)
    for mode in args.modes:
        expected = {arm: forecast(arm, mode, plays, held, learnt) for arm in ARMS}
        print(f"{mode}: forecast {expected['heddle'] / expected['stock']:.2f}x, trainer {learnt[2]:.1f} s a step", flush=True)
        answer = measured(mode, folder, words, 1 if args.quick else args.pairs, 3 if args.quick else STEPS)
        if not args.quick:
            store(mode, told(answer, expected, held, learnt[2]))


def told(answer: dict[str, Any], expected: dict[str, float], held: int, update_s: float) -> dict[str, Any]:
    """What is kept of a comparison."""
    arms = {arm["name"]: arm for arm in answer["arms"]}
    return {
        "ratio": arms["heddle"]["trained_ratio"],
        "windows": {name: arm["windows"] for name, arm in arms.items()},
        "forecast_tokens_per_s": expected,
        "kv_tokens": held,
        "update_s": update_s,
    }


def store(mode: str, row: dict[str, Any]) -> None:
    """Beside what is there of the other mode."""
    kept = json.loads(RESULT.read_text())["modes"] if RESULT.exists() else {}
    result = facts(
        "two engines and the trainer on two cores", slots=SLOTS, prompts=PROMPTS, samples=SAMPLES, steps=STEPS, kv_share=KV_SHARE
    )
    kept[mode] = {"date": result["date"], **row}
    save(RESULT, result | {"modes": kept}, kept=True)
    fill(README, "real", table(kept))


def table(modes: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| trainer | trained tokens/s: stock, heddle | forecast | ratio (95 %) | pairs | forecast | read again | paused |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for mode, row in modes.items():
        ratio, expected = row["ratio"], row["forecast_tokens_per_s"]
        stock, heddle = (row["windows"][arm] for arm in ARMS)
        cells = [
            mode,
            f"{stock['trained_tokens_per_s']:.0f}, {heddle['trained_tokens_per_s']:.0f}",
            f"{expected['stock']:.0f}, {expected['heddle']:.0f}",
            f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
            " ".join(f"{pair['value']:.2f}" for pair in ratio["by_pair"]),
            f"{expected['heddle'] / expected['stock']:.2f}",
            *(f"{stock[share]:.0%}, {heddle[share]:.0%}" for share in ("read_again_share", "paused_share")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
