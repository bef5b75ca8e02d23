"""The agent-loop manager: verl's own, in the task runner, with our workers and client. It configures the router, assigns spare samples,
announces each batch, and collects the workers' records at the end of a step.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
from verl.utils.ray_utils import auto_await

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import LatencyModel
from verl_heddle.shape.groups import Visit
from verl_heddle.traces.columns import Columns
from verl_heddle.trajectory import Trajectory
from verl_heddle.verl_plugin import advantage, checkpoint, layouts
from verl_heddle.verl_plugin.agent_loop import HeddleWorker
from verl_heddle.verl_plugin.client import HeddleAsyncClient, HeddleClient
from verl_heddle.verl_plugin.layout_choice import Chooser
from verl_heddle.verl_plugin.lint import derives_from_sync, model_heads
from verl_heddle.verl_plugin.log import log, log_once
from verl_heddle.verl_plugin.prompts import facts_of_batch, first_turns, validates, weights_of
from verl_heddle.verl_plugin.settings import options_of
from verl_heddle.verl_plugin.shaping import Planner
from verl_heddle.verl_plugin.step_times import StepTimes

SINCE_START = ("preempted_", "recomputed_", "winners_", "refused_")
"""Prefixes of the scheduler's cumulative counts (`vllm_scheduler`). Its other numbers are gauges; of those `requests` is reported."""

STALE_STEPS = 64
"""Under an asynchronous trainer, trajectories that began this many steps ago count as lost; verl's default staleness threshold is 8."""

MANAGER: HeddleAgentLoopManager | None = None
"""The manager of this process; the sampler, which verl builds in the same process, collects through it."""


class HeddleAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager with our workers and client. See `AgentLoopManagerTQ` for the arguments."""

    def __init__(self, config: Any, llm_client: Any, *args: Any, **kwargs: Any) -> None:
        self.options = options_of(config)
        self.sync = derives_from_sync(str(config.trainer.v1.trainer_mode))
        """Whether a batch is complete before the next one begins."""
        self.router = llm_client._load_balancer
        rollout = config.actor_rollout_ref.rollout
        self._deterministic = bool(rollout.get("full_determinism", False))
        self._cap_tokens = int(rollout.response_length)
        self.fleet: dict[str, Replica] = {}
        self.servers: dict[str, Any] = {}
        """Actor handles of `fleet`, by name; shared with the client."""
        self.rests = False
        """Whether resident sets are suspended (`heddle.auto`)."""
        self._paused: dict[str, bool] = {}
        """Replicas paused by a weight update -> whether they have left for the trainer and refuse requests."""
        self.learnt: bytes | None = None
        """The router's last reported length model, to restore a restarted router from."""
        self._learnt_asked: Any = None
        self._latency: LatencyModel | None = None
        self._configure_router(self.options.deadlines.start_s)  # its process imports verl first
        self._replicas, self._replicas_lost = len(self.fleet), 0
        """Replicas at the start of the run, and how many of them have died."""
        self._samples = (int(rollout.n), int(rollout.val_kwargs.n))
        self._step_times = StepTimes()
        shapes = self.options.shape.enable and not self.options.observe
        self.planner = Planner(self.options.shape, self._samples[0], self._cap_tokens) if shapes else None
        """None when shaping is off."""
        advantage.SHAPER = None if self.planner is None else self.planner.shaper
        self._visits: list[Visit] = []
        self._last: list[Trajectory] = []
        """Records of the finished step."""
        checkpoint.restore(self, config)
        client = HeddleClient if self.sync else HeddleAsyncClient
        super().__init__(
            config, client(config=config, load_balancer_handle=self.router, servers=self.servers, options=self.options), *args, **kwargs
        )
        self.agent_loop_workers_class = ray.remote(HeddleWorker)  # after super(), which sets verl's own
        self._plans = not self.options.observe and self.options.place.enable and len(self.servers) > 1
        self._router_lost, self._try_router_s = False, 0.0
        self._fallbacks = 0
        """Turns placed by workers without the router, since the start of the run."""
        self._troubles: Counter[str] = Counter()
        self._silent = 0
        self._weights = -1
        self.layouts = layouts.LAYOUTS
        """None: verl's own replicas."""
        if self.layouts is not None:
            self.layouts.changed = self._relaid
            heads = model_heads(str(config.actor_rollout_ref.model.path))
            self.chooser = Chooser(self.options.layout, rollout, self.layouts.gpus, int(config.trainer.n_gpus_per_node), *heads)

    @classmethod
    @auto_await
    async def create(cls, *args: Any, **kwargs: Any) -> Any:
        """Start the workers; on any failure of ours, fall back to verl's own manager."""
        global MANAGER
        try:
            instance = cls(*args, **kwargs)
            await instance._init_agent_loop_workers()
            MANAGER = instance
            return instance
        except Exception as error:
            log(f"OFF, training continues with verl's own agent-loop manager: {type(error).__name__}: {error}")
            stock = AgentLoopManagerTQ(*args, **kwargs)
            await stock._init_agent_loop_workers()
            return stock

    def generate_sequences(self, prompts: Any) -> None:
        """Dispatch a batch; see `AgentLoopManagerTQ.generate_sequences`."""
        self._recover("engines", lambda: self._repair_engines(prompts))
        if self._router_lost and (self.sync or time.monotonic() >= self._try_router_s):  # asynchronous trainers call this for every prompt
            self._try_router_s = time.monotonic() + self.options.deadlines.router_s
            self._recover("router", self._try_router)
        facts = facts_of_batch(prompts) if self._plans or (self.planner is not None and not validates(prompts)) else None
        if self.planner is not None:
            try:
                prompts = self.planner.share_out(prompts, list(self.fleet.values()), facts)
            except Exception as error:
                log_once(f"prompts are sampled plainly ({type(error).__name__}: {error})")
        if self._plans:
            try:
                self.router.batch_expected.remote(first_turns(prompts, *self._samples, facts))
            except Exception as error:
                log_once(f"trajectories are placed one at a time, not as a batch ({type(error).__name__}: {error})")
        super().generate_sequences(prompts)

    def _recover(self, what: str, attempt: Callable[[], None]) -> None:
        """Failed recovery changes nothing: the step continues under verl's own rule, which needs neither router nor layout."""
        try:
            attempt()
        except Exception as error:
            self._troubles[f"recovery_{what}"] += 1
            log_once(f"recovery of {what} failed ({type(error).__name__}: {error}); the step continues without it")

    def _repair_engines(self, prompts: Any) -> None:
        if self.layouts is not None and (weights := weights_of(prompts)) != self._weights:
            self._weights = weights  # just loaded, and no request is in flight
            self.layouts.repair(weights)

    def collect(self) -> tuple[Columns, Counter[str]]:
        """Records since the last call and counts since the start. A worker that misses the deadline is skipped and counted."""
        refs = [worker.collect.remote() for worker in self.agent_loop_workers]
        ready, late = ray.wait(refs, num_returns=len(refs), timeout=self.options.deadlines.collect_s)
        records = Columns()
        counts: Counter[str] = Counter()
        self._silent += len(late)
        for ref in ready:
            try:
                some, trouble, visits = ray.get(ref, timeout=self.options.deadlines.collect_s)
            except Exception as error:
                log_once(f"a worker's records are lost ({type(error).__name__})")
                self._silent += 1
                continue
            records.extend(some)
            counts.update(trouble)
            self._visits += visits
        counts["worker_silent"] = self._silent
        counts.update(self._troubles)
        self._router_lost = self._router_lost or counts["fallback_router"] > self._fallbacks
        self._fallbacks = counts["fallback_router"]
        return records, counts

    def step_ended(self, step: int, train: Columns) -> dict[str, float]:
        """Report a complete batch to the router; returns the router's counts since the start of the run."""
        times = self._router_times or self.planner is not None
        needed = times or self.layouts is not None
        self._last = records = list(train.records()) if needed else []  # building them takes a second at 10,000 trajectories
        if times:
            degrees = {name: replica.tp for name, replica in self.fleet.items()}
            whole = [record for record in records if not any(turn.legs for turn in record.steps)]  # a leg is a request of its own
            self._step_times.learn(whole, degrees, self._step_times_known)
        if self.layouts is not None:
            self.layouts.wanted = self.chooser.next(step + 1, records, self.layouts.layout, self.layouts.reshard_s)
        try:
            oldest = step if self.sync else step - STALE_STEPS
            counts = ray.get(self.router.step_ended.remote(oldest), timeout=self.options.deadlines.router_s)
        except Exception:
            self._router_lost = True
            return {}
        self._note_learnt()
        self._note_losses(int(counts.get("replicas_lost", 0)))
        return counts

    def _note_losses(self, lost: int) -> None:
        """Log how many replicas have died. They are not relaunched: verl's trainer ranks, server list and metrics are fixed at the start,
        and the trainer holds the memory a new engine needs. Engines of a layout are ours and are relaunched (`layouts.Layouts.repair`)."""
        if lost > self._replicas_lost and self.layouts is None:
            left = max(0, self._replicas - lost)
            rest = f"{left} are left for the rest of the run (only heddle.layout relaunches engines)"
            log(f"{lost} of {self._replicas} replicas have died; {rest}")
        self._replicas_lost = max(lost, self._replicas_lost)

    def _note_learnt(self) -> None:
        """Store the router's answer to the last request for its length model, and ask again; it answers during the trainer's update."""
        try:
            if self._learnt_asked is not None:
                ready, _ = ray.wait([self._learnt_asked], timeout=0)
                if not ready:
                    return
                asked, self._learnt_asked = self._learnt_asked, None
                self.learnt = ray.get(asked) or self.learnt
            if not self.options.observe:
                self._learnt_asked = self.router.learnt.remote()
        except Exception as error:  # the router died meanwhile
            self._learnt_asked = None
            log_once(f"the router's length model is kept as of an earlier step ({type(error).__name__})")

    def shaped(self, step: int) -> dict[str, float]:
        """Metrics of shaping for a complete step, after `step_ended`; empty when shaping is off."""
        visits, self._visits = self._visits, []
        records, self._last = self._last, []
        return {} if self.planner is None else self.planner.step_ended(step, records, visits)

    @property
    def _router_times(self) -> bool:
        """Whether the router decides by the engines' step times."""
        return self._plans or self.options.admits

    def _step_times_known(self, latency: LatencyModel) -> None:
        self._latency = latency
        if self.planner is not None:
            self.planner.latency = latency
        if self._router_times:
            self.router.step_times_known.remote(latency)

    def engine_counts(self) -> Counter[str]:
        """Sum of the engines' scheduler counts since their start, and the `requests` in them; without engines that miss the deadline."""
        refs = {server.heddle_counts.remote(): name for name, server in self.servers.items()}
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=self.options.deadlines.collect_s)
        total: Counter[str] = Counter()
        for ref in ready:
            try:
                counts = ray.get(ref, timeout=self.options.deadlines.collect_s)
                total.update({name: count for name, count in counts.items() if name.startswith((*SINCE_START, "requests"))})
            except ActorDiedError:  # no request found it out
                del self.servers[refs[ref]], self.fleet[refs[ref]]
                self.router.replica_lost.remote(refs[ref])
            except Exception as error:
                log_once(f"an engine does not report its counts ({type(error).__name__}: {error})")
        return total

    def engine_seconds(self) -> dict[str, dict[str, float]]:
        """Seconds since the start that each engine in rotation was `busy`, and `paused` by weight updates; without engines that miss the
        deadline."""
        refs = {self.servers[name].heddle_seconds.remote(): name for name in self.in_rotation()}
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=self.options.deadlines.collect_s)
        found = {}
        for ref in ready:
            try:
                found[refs[ref]] = ray.get(ref, timeout=self.options.deadlines.collect_s)
            except Exception as error:
                log_once(f"an engine does not report how busy it is ({type(error).__name__}: {error})")
        return found

    def _configure_router(self, deadline_s: float) -> None:
        """Send the router the user's options and the fleet."""
        servers = self.servers or ray.get(self.router.handles.remote(), timeout=deadline_s)
        self._know(servers, deadline_s)
        settings = (self.options, self._deterministic, self._rotation, self._cap_tokens, self.learnt)
        ray.get(self.router.configure.remote(*settings), timeout=deadline_s)
        for name in self._paused:
            self.router.paused.remote(name)
        if self.rests:
            self.router.rest.remote(True)

    def rest(self, rests: bool) -> None:
        """Suspend or resume resident sets from the next step on."""
        self.rests = rests
        self.router.rest.remote(rests)

    def paused(self, name: str, leaves: bool = False) -> None:
        """A weight update pauses this replica's engine and aborts its requests; `leaves`: the trainer takes its GPUs."""
        self._paused[name] = leaves
        self.router.paused.remote(name)
        if leaves:
            self._tell_workers()

    def resumed(self, name: str) -> None:
        """The replica's engine runs again."""
        left = self._paused.pop(name, None)
        if left is not None:
            self.router.resumed.remote(name)
        if left:
            self._tell_workers()

    def in_rotation(self) -> list[str]:
        """Replicas that serve requests, now or after a pause: all but those lent to the trainer."""
        return [name for name in self.servers if not self._paused.get(name)]

    def _tell_workers(self) -> list[Any]:
        """Send the workers the replicas in rotation, in case they lose the router."""
        servers = {name: self.servers[name] for name in self.in_rotation()}
        return [worker.servers_are.remote(servers) for worker in self.agent_loop_workers]

    @property
    def _rotation(self) -> dict[str, tuple[Replica, Any]]:
        return {name: (self.fleet[name], self.servers[name]) for name in self.in_rotation()}

    def _know(self, servers: dict[str, Any], deadline_s: float) -> None:
        """Set the fleet to these servers, as they describe themselves; dead ones are dropped."""
        asked = {name: server.heddle_facts.remote() for name, server in servers.items()}
        fleet = {}
        for name, ref in asked.items():
            try:
                facts = ray.get(ref, timeout=deadline_s)
                fleet[name] = Replica(name, **facts)
            except ActorDiedError:
                log_once(f"replica {name} has died; the run continues without it")
        self.fleet = fleet
        found = {name: servers[name] for name in fleet}
        self.servers.clear()
        self.servers.update(found)

    def _relaid(self, servers: dict[str, Any]) -> None:
        """The layout changed between steps. Never raises, since the engines wait for their weights."""
        self._recover("layout", lambda: self._tell_fleet(servers))

    def _tell_fleet(self, servers: dict[str, Any]) -> None:
        deadline_s = self.options.deadlines.collect_s
        self._know(servers, deadline_s)
        try:
            ray.get(self.router.fleet_is.remote(self._rotation), timeout=self.options.deadlines.router_s)
        except Exception:
            self._router_lost = True
        sent = self._tell_workers()
        ray.wait(sent, num_returns=len(sent), timeout=deadline_s)  # a worker that misses this asks the router later

    def _try_router(self) -> None:
        """Between steps, check whether the router answers; if so, send the workers back to it.

        A router that was merely late has kept its state. One restarted by Ray is configured, with the length model of its predecessor.
        """
        deadline_s = self.options.deadlines.router_s
        try:
            if not ray.get(self.router.configured.remote(), timeout=deadline_s):
                self._note_learnt()  # the dead process may have answered
                self._learnt_asked = None
                self._configure_router(deadline_s)
                if self._latency is not None and self._router_times:
                    self.router.step_times_known.remote(self._latency)
            elif self.layouts is not None:  # it may have missed a change
                ray.get(self.router.fleet_is.remote(self._rotation), timeout=deadline_s)
        except Exception:
            return
        sent = [worker.router_is_back.remote() for worker in self.agent_loop_workers]
        ray.wait(sent, num_returns=len(sent), timeout=self.options.deadlines.collect_s)
        self._router_lost = False
        log("the router is back")
