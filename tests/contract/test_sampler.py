"""Our replay buffer is configured as verl configures its own, with and without DAPO filtering and refill."""

import copy
import json
from functools import cache
from typing import ClassVar

import pytest
from omegaconf import OmegaConf

pytest.importorskip("verl")

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from verl_heddle.verl_plugin import gate
from verl_heddle.verl_plugin.overrides import compose

CASES = {
    "plain": [],
    "gen batch": ["+data.gen_batch_size=2"],
    "DAPO": ["algorithm.filter_groups.enable=true", "algorithm.filter_groups.max_inflight_gen_batches=3"],
    "refill": ["trainer.v1.sampler.sync_refill_failed_groups=true"],
}


@cache
def resolved(*overrides):
    config = compose(overrides)
    OmegaConf.resolve(config)
    return config


class Trainer:
    """As much of verl's trainer as its own `_build_replay_buffer` reads."""

    _build_replay_buffer = PPOTrainer._build_replay_buffer
    _resolve_filter_groups_metric = PPOTrainer._resolve_filter_groups_metric

    def __init__(self, overrides, mode="sync"):
        base = ["data.train_batch_size=8", "trainer.default_local_dir=/tmp/x", "actor_rollout_ref.rollout.name=vllm"]
        self.config = copy.deepcopy(resolved(*base, f"trainer.v1.trainer_mode={mode}", *overrides))
        self.trainer_mode = mode

    def _add_prompts_to_generate(self, count):
        return count


ATTRIBUTES = [
    "trainer_mode",
    "max_off_policy_threshold",
    "max_off_policy_strategy",
    "filter_groups_metric",
    "train_batch_size",
    "gen_batch_size",
    "max_inflight_gen_batches",
    "sync_refill_failed_groups",
]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
@pytest.mark.parametrize("active", [True, False])
def test_configured_like_verls_own(name, mode, active, monkeypatch):
    if mode != "sync" and name == "gen batch":
        pytest.skip("no batch sizes when asynchronous")
    theirs = Trainer(CASES[name], mode)._build_replay_buffer()
    monkeypatch.setattr(gate, "_active", active)
    ours = Trainer([*CASES[name], "+plugin=heddle"], mode)._build_replay_buffer()
    assert isinstance(ours, ReplayBuffer if mode == "sync" else ReplayBufferAsync)
    assert {key: getattr(ours, key) for key in ATTRIBUTES} == {key: getattr(theirs, key) for key in ATTRIBUTES}
    assert ours.refill_fn(3) == 3
    assert ours.poll_interval == (0.1 if active else theirs.poll_interval)


def test_dapo_without_a_metric_is_refused_as_by_verl(monkeypatch):
    monkeypatch.setattr(gate, "_active", True)
    overrides = ["algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=null"]
    with pytest.raises(ValueError, match="metric must be set"):
        Trainer(overrides)._build_replay_buffer()
    with pytest.raises(ValueError, match="metric must be set"):
        Trainer([*overrides, "+plugin=heddle"])._build_replay_buffer()


def test_lost_metrics_are_counted_not_raised(monkeypatch, capsys):
    from verl_heddle.options import Options
    from verl_heddle.verl_plugin import manager as agent_loops
    from verl_heddle.verl_plugin.sampler import _Watch

    class Broken:
        def collect(self):
            raise OSError("gone")

    monkeypatch.setattr(agent_loops, "MANAGER", Broken())
    watch = _Watch(Options())
    assert watch.step(1, "train") == {"heddle/metrics_failures": 1}
    assert watch.step(1, "val") == {}
    assert watch.step(1, "train") == {"heddle/metrics_failures": 3}
    assert capsys.readouterr().err.count("OSError") == 1


def test_a_full_disk_costs_the_trace_not_the_metrics(monkeypatch, tmp_path, capsys):
    from collections import Counter

    from verl_heddle.fleet import Replica
    from verl_heddle.options import Options, Trace
    from verl_heddle.traces.columns import Columns
    from verl_heddle.verl_plugin import manager as agent_loops
    from verl_heddle.verl_plugin.sampler import _Watch

    class Manager:
        sync, rests = True, False
        servers = ("r0",)
        fleet: ClassVar = {"r0": Replica("r0", tp=2, slots=8)}
        """What the engine says of itself."""
        layouts = None
        config = OmegaConf.create(
            {
                "actor_rollout_ref": {
                    "rollout": {
                        "tensor_model_parallel_size": 2,
                        "max_num_seqs": 256,
                        "scheduling_policy": "priority",
                        "gpu_memory_utilization": 0.5,
                    }
                }
            }
        )

        def collect(self):
            return Columns.of([recorded()]), Counter({"fallback_router": 3, "prewarm/done": 2})

        def step_ended(self, step, records):
            return {"held": 2 * step, "failed_fit": 1, "fit_s": 0.5, "fit_rows": 300, "place/quality": 0.8, "residents/rent": 3 * step}

        def shaped(self, step):
            return {"spare": 1.5}

        def engine_counts(self):
            return Counter(preempted_by_rule=5)

    monkeypatch.setattr(agent_loops, "MANAGER", Manager())
    good = _Watch(Options(trace=Trace(dir=str(tmp_path), workload="w")))
    metrics = good.step(1, "train")
    assert metrics["heddle/trajectories"] == 1 and metrics["heddle/fallbacks/total"] == 4 and metrics["heddle/metrics_failures"] == 0
    assert good.step(1, "train")["heddle/fallbacks/total"] == 0, "counted in the step they happened in"
    assert (
        metrics["heddle/router/held"] == 2
        and metrics["heddle/preempt/preempted_by_rule"] == 5
        and metrics["heddle/predict/fit_rows"] == 300
        and metrics["heddle/place/quality"] == 0.8
        and metrics["heddle/residents/rent"] == 3
        and metrics["heddle/place/prewarm_done"] == 2
    )
    good.flush()
    lines = (tmp_path / "trace.jsonl").read_text().splitlines()
    assert len(lines) == 2
    known = {"tp": 2, "slots": 8, "replicas": 1, "order": "priority"}
    assert known.items() <= json.loads(lines[0])["meta"].items(), "what simulating the run needs to know of its engines"
    full = _Watch(Options(trace=Trace(dir="/dev/full/x", workload="w")))
    metrics = full.step(1, "train")
    assert metrics["heddle/trajectories"] == 1
    full.flush()
    assert full.step(2, "train")["heddle/metrics_failures"] >= 1
    assert "trace lines of a step are lost" in capsys.readouterr().err


def test_where_the_twin_says_that_resident_sets_lose_they_rest_from_the_next_step_on(monkeypatch, tmp_path, capsys):
    """The twin's process is a fake that answers a step late; tests/e2e/test_compare.py has the real one."""
    from collections import Counter

    from verl_heddle.options import Options, Trace
    from verl_heddle.traces.columns import Columns
    from verl_heddle.verl_plugin import manager as agent_loops
    from verl_heddle.verl_plugin.sampler import _Watch

    class Twin:
        failures = 0

        def __init__(self):
            self.asked, self.answer = [], {}

        def ask(self, number, step, meta):
            self.asked.append(meta["residents"])
            self.told = lambda: {"step": number, "error": 0.01, "stock_s": 90.0, "heddle_s": 100.0, "speedup": 0.9}

        def told(self):
            return {}

    class Manager:
        sync, rests, servers, layouts = True, False, ("r0",), None
        fleet: ClassVar = {}
        config = OmegaConf.create(
            {"actor_rollout_ref": {"rollout": {"tensor_model_parallel_size": 1, "max_num_seqs": 8, "gpu_memory_utilization": 0.5}}}
        )

        def collect(self):
            return Columns.of([recorded()]), Counter()

        def step_ended(self, step, records):
            return {}

        def shaped(self, step):
            return {}

        def engine_counts(self):
            return Counter()

        def rest(self, rests):
            self.rests = rests

    manager = Manager()
    monkeypatch.setattr(agent_loops, "MANAGER", manager)
    watch = _Watch(Options(trace=Trace(dir=str(tmp_path))))
    watch._twin = twin = Twin()
    metrics = [watch.step(number, "train") for number in range(1, 6)]
    watch.flush()
    assert [one["heddle/auto/rests"] for one in metrics] == [0, 0, 0, 1, 1], "three steps are judged, each a step late"
    assert manager.rests and twin.asked == ["least_served"] * 4 + [False], "of a step the twin hears by which rule it ran"
    lines = [json.loads(line)["meta"]["residents"] for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert lines == ["least_served"] * 4 + [False]
    assert metrics[-1]["heddle/auto/gain"] == pytest.approx(0.9) and metrics[-1]["heddle/twin/step"] == 4
    assert capsys.readouterr().err.count("after step 3 resident sets rest") == 1


class Clock:
    """A replay buffer's time: listing all keys takes `look_s`, and what is slept goes by."""

    def __init__(self, monkeypatch, look_s, looks):
        from verl.trainer.ppo.v1 import replay_buffer

        from verl_heddle.verl_plugin import sampler

        self.now = self.listing = self.slept = 0.0
        self.look_s, self.left, self.longest = look_s, looks, 0.0
        monkeypatch.setattr(replay_buffer.tq, "kv_list", self.list)
        monkeypatch.setattr(replay_buffer.tq, "kv_clear", lambda **_: None)
        monkeypatch.setattr(replay_buffer.time, "sleep", self.sleep)
        monkeypatch.setattr(sampler.time, "monotonic", lambda: self.now)

    def list(self):
        self.now += self.look_s
        self.listing += self.look_s
        self.left -= 1
        status = "running" if self.left else "finished"
        prompt = {"is_prompt": True, "status": status, "global_steps": 1}
        return {"train": {"u0": prompt, "u0_0_0": {"status": "success"}}}

    def sleep(self, seconds):
        self.now += seconds
        self.slept += seconds
        self.longest = max(self.longest, seconds)


@pytest.mark.parametrize("look_s", [0.0001, 0.02, 0.192, 5.0])
@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
def test_looking_takes_a_small_share_of_the_time(look_s, mode, monkeypatch):
    """verl lists every key; with 11,000 of them that takes 0.2 s of the process that serves the workers."""
    monkeypatch.setattr(gate, "_active", True)
    buffer = Trainer(["+plugin=heddle", "heddle.trace.enable=false"], mode)._build_replay_buffer()
    clock = Clock(monkeypatch, look_s, looks=50)
    batch, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=1)
    assert batch.keys == ["u0_0_0"]
    share = clock.listing / (clock.listing + clock.slept)
    assert share < 0.06 or clock.longest == 2.0, share
    assert 0.1 <= clock.longest <= 2.0 and (clock.longest == 0.1 or look_s > 0.005)


def test_the_last_step_waits_for_its_lines_and_no_other_does(monkeypatch):
    from verl_heddle.verl_plugin.sampler import _Watch

    flushed = []
    monkeypatch.setattr(gate, "_active", True)
    monkeypatch.setattr(_Watch, "flush", lambda self: flushed.append(self))
    trainer = Trainer(["+plugin=heddle", "heddle.trace.enable=false"])
    buffer = trainer._build_replay_buffer()
    for total, step in ((None, 3), (4, 3), (4, 4)):
        trainer.total_training_steps = total
        Clock(monkeypatch, 0.01, looks=1)
        buffer.sample(global_steps=step, partition_id="train", batch_size=1)
        assert len(flushed) == (total == step)


def test_windows_of_an_asynchronous_trainer(monkeypatch):
    """No step's makespan; what ends during validation belongs to the window, and replicas that come and go are not mixed up."""
    from collections import Counter

    from verl_heddle.options import Options, Trace
    from verl_heddle.traces.columns import Columns
    from verl_heddle.verl_plugin import manager as agent_loops
    from verl_heddle.verl_plugin.sampler import _Watch

    engines = [{"r0": (10.0, 5.0), "r1": (100.0, 0.0)}, {"r0": (12.0, 6.0)}]

    class Manager:
        sync = False
        servers = ("r0", "r1")

        def collect(self):
            return Columns.of([recorded()]), Counter()

        def step_ended(self, step, records):
            return {"held": 2}

        def shaped(self, step):
            return {}

        layouts = None

        def engine_counts(self):
            return Counter(requests=7)

        def engine_seconds(self):
            return {name: {"busy": busy, "paused": paused} for name, (busy, paused) in engines.pop(0).items()}

    monkeypatch.setattr(agent_loops, "MANAGER", Manager())
    watch, now = _Watch(Options(trace=Trace(enable=False))), [111.0]
    monkeypatch.setattr("verl_heddle.verl_plugin.sampler.time.time", lambda: now[0])
    assert watch.step(1, "val") == {}
    first = watch.step(2, "train", ["u_0_0"])
    assert (first["heddle/window_s"], first["heddle/trajectories"]) == (11.0, 2), "from the first start on"
    assert first["heddle/trained/tokens"] == 5 and first["heddle/age_steps/mean"] == 1.0
    now[0] += 4.0
    second = watch.step(3, "train", [])
    assert (second["heddle/window_s"], second["heddle/trajectories"]) == (4.0, 1)
    assert (second["heddle/engines/busy_share"], second["heddle/engines/paused_share"]) == (0.5, 0.25)
    assert not {name for name in first | second if "makespan" in name or "idle_share" in name or "requests_left" in name}
    assert second["heddle/metrics_failures"] == 0


def recorded():
    from verl_heddle.traces.recorder import Recorder
    from verl_heddle.trajectory import Decision, Outcome, Reason, TrajectoryId

    recorder = Recorder(TrajectoryId("p", "u", 0, 1), 0.0, 100.0)
    recorder.turn_asked(0.1)
    recorder.turn_done(10, 5, Decision("r0", 0, Reason.STICKY), 0.1, 0.2, 1.0, None)
    return recorder.finish(Outcome.FINISHED, 1.0, 101.0, "verl", "w", None)
