"""Simulate one arm on one draw: build its policy, teach it the history, and measure the result.

One policy object runs all steps of a draw in order, as in a real run. Numbers are means over the steps, so that a split still adds up to
the makespan and throughput is all tokens over all seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from verl_heddle.fleet import Replica
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.predict.predictor import recall
from verl_heddle.report.draws import Draw, Step
from verl_heddle.report.rules import rule_of
from verl_heddle.report.setting import Setting
from verl_heddle.schedule.preempt import Rule as PreemptRule
from verl_heddle.simulate import Bound, EngineOptions, Policy, Result, lower_bound, simulate
from verl_heddle.simulate.baselines import LptOracle, Stock
from verl_heddle.trajectory import Decision, Prewarm, ToolStart, Trajectory, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart

TAIL = ("queue_s", "prefill_s", "generate_s", "tool_s", "other_s")
"""Keys of a tail split, in the order of a turn."""


@dataclass(frozen=True, slots=True)
class Last:
    """The trajectory that ended last in the draw's slowest step. Times in seconds; `tail` as in `Result.split`."""

    tokens: int
    turns: int
    makespan_s: float
    tail: Mapping[str, float]
    alone_s: float
    """Its time with a replica of the same degree to itself, tools included."""

    @property
    def shared_s(self) -> float:
        """Time lost to others on its replica: makespan less waiting and `alone_s`. At least 0, because a shared prompt can speed it up."""
        return max(0.0, self.makespan_s - self.tail["queue_s"] - self.alone_s)


@dataclass(frozen=True, slots=True)
class Run:
    """Numbers of one arm on one draw, means over its steps. `tail` splits the makespan by what the trajectory that ended last was doing."""

    seed: int
    tp: int
    makespan_s: float
    tokens: float
    tail: Mapping[str, float]
    migrations: float
    preemptions: float
    recomputed_tokens: float
    idle_share: float
    queue_share: float
    """Share of all trajectory time spent waiting for a slot or for KV cache."""
    last: Last
    sync_s: float = 0.0
    """Weight sync before each step, not included in the makespan."""

    @property
    def step_s(self) -> float:
        """Weight sync plus makespan."""
        return self.sync_s + self.makespan_s

    @property
    def throughput_tok_s(self) -> float:
        """Generated tokens per second of makespan."""
        return self.tokens / self.makespan_s


def play(name: str, tp: int, setting: Setting, draw: Draw) -> list[Result]:
    """Simulate the draw's steps under rule `name` (`rule_of`) on replicas of degree `tp`; returns results by step.

    Raises:
        ValueError: there is no such rule, or `simulate` rejects its input.
    """
    rule = rule_of(name)
    fleet = setting.mixed_fleet() if rule.mixed and setting.mixed else setting.fleet(tp)
    engine = setting.engine(rule.order) if rule.options is None else engine_for(rule.options, setting)
    if rule.tier:
        engine = replace(engine, tier=setting.tier)
    policy = rule.make(draw.seed) if rule.make else None
    split = halves(draw.steps) if draw.crossed else []
    if rule.options:
        policy = Orchestrator(replace(rule.options, seed=draw.seed), cap_tokens=draw.cap_tokens)
        teach(policy, draw)
        policy.step_times_known(setting.latency)
    results = []
    for number, step in enumerate(draw.steps):
        decider = policy if policy is not None else LptOracle(step, draw.seed)
        if isinstance(policy, Orchestrator) and split:
            decider = CrossFitted(policy, split[number])
        results.append(_stepped(step, fleet, setting, decider, engine, len(draw.before) + number))
    return results


def _stepped(step: Step, fleet: Sequence[Replica], setting: Setting, policy: Policy, engine: EngineOptions, number: int) -> Result:
    return simulate(step, fleet, setting.latency, policy, engine=engine, step=number, tools_at_once=setting.tools_at_once)


def preempt_rule(options: Options) -> PreemptRule:
    """The rule of preemption on arrival for these options, as the plugin's scheduler receives it."""
    settings = asdict(options.preempt)
    del settings["enable"]
    return PreemptRule.of(settings)


def engine_for(options: Options, setting: Setting) -> EngineOptions:
    """Engine settings as the plugin uses them with these options."""
    engine = setting.engine("priority")
    return replace(engine, preempt=preempt_rule(options)) if options.priority.enable and options.preempt.enable else engine


def teach(policy: Orchestrator, draw: Draw) -> None:
    """Feed the orchestrator's predictor the previous epoch step by step and fit its model, as between the steps of a run.

    The epoch is not simulated: that would advance the router's random tie-breaks, and heddle would differ from stock by chance even if it
    made the same decisions.
    """
    if policy.predictor is None:
        return
    split = halves(draw.before) if draw.crossed else []
    for number, step in enumerate(draw.before):
        observed: Sequence[Trajectory] = step
        if split:
            observed = [replace(item, prompt_id=_half_name(item.prompt_id, 1 - split[number][item.prompt_id, item.trial])) for item in step]
        recall(policy.predictor, observed, number)
    if not split:  # trees trained on a trajectory must not predict it
        policy.predictor.adopt(policy.predictor.fit_job().run())


def bound(setting: Setting, draw: Draw) -> list[Bound]:
    """The lower bound of each step of the draw, over all layouts."""
    engine = setting.engine("fcfs")
    return [
        lower_bound(step, setting.gpus, setting.latency, setting.bound_tps, slots=setting.slots, kv_tokens=setting.kv_tokens, engine=engine)
        for step in draw.steps
    ]


def measured(tp: int, setting: Setting, draw: Draw, results: Sequence[Result]) -> Run:
    """The numbers of one arm on one draw."""
    number = len(results)
    rows = [result.summary() for result in results]
    times = sum(float((result.finish_s - result.start_s).sum()) for result in results)
    worst = max(results, key=lambda result: result.makespan_s)
    return Run(
        seed=draw.seed,
        tp=tp,
        makespan_s=sum(result.makespan_s for result in results) / number,
        tokens=sum(result.tokens for result in results) / number,
        tail={key: sum(row["last"][key] for row in rows) / number for key in TAIL},
        migrations=sum(row["migrations"] for row in rows) / number,
        preemptions=sum(row["preemptions"] for row in rows) / number,
        recomputed_tokens=sum(row["recomputed_tokens"] for row in rows) / number,
        idle_share=max(0.0, sum(row["idle_share"] * row["makespan_s"] for row in rows) / sum(row["makespan_s"] for row in rows)),
        queue_share=sum(float(result.queue_s.sum()) for result in results) / times if times > 0 else 0.0,
        last=_last(tp, setting, worst),
        sync_s=max(setting.sync_s(entry.replica.tp) for entry in worst.replicas),
    )


def _last(tp: int, setting: Setting, result: Result) -> Last:
    item = result.source[result.last]
    replica = next(entry.replica for entry in result.replicas if entry.replica.tp == tp)
    alone = simulate([item], [replica], setting.latency, Stock(), engine=setting.engine("fcfs"))
    return Last(
        tokens=item.output_tokens,
        turns=len(item.steps),
        makespan_s=result.makespan_s,
        tail=result.split(),
        alone_s=alone.makespan_s,
    )


def halves(steps: Sequence[Step]) -> list[dict[tuple[str, int | str], int]]:
    """The half of each trajectory of each step; a prompt's trajectories alternate between halves over all its visits."""
    seen: Counter[str] = Counter()
    result = []
    for step in steps:
        half = {}
        for item in step:
            half[item.prompt_id, item.trial] = seen[item.prompt_id] % 2
            seen[item.prompt_id] += 1
        result.append(half)
    return result


def _half_name(prompt: str, half: int) -> str:
    return f"{prompt}|{half}"


class CrossFitted:
    """Wraps an orchestrator and presents each prompt as two, so that no trajectory is predicted from itself.

    In the previous epoch a trajectory was recorded under the name of the prompt's other half (`teach`); now it runs under the name of its
    own half. Everything else passes through unchanged.
    """

    def __init__(self, inner: Orchestrator, half: Mapping[tuple[str, int | str], int]) -> None:
        self._inner, self._half = inner, half
        self._true_keys: dict[str, str] = {}
        self._known_keys: dict[str, str] = {}

    def _known_as(self, identity: TrajectoryId) -> TrajectoryId:
        half = self._half[identity.prompt, identity.sample]
        known = replace(identity, prompt=_half_name(identity.prompt, half), uid=_half_name(identity.uid, half))
        self._true_keys[known.key], self._known_keys[identity.key] = identity.key, known.key
        return known

    def _true_name(self, request: str) -> str:
        key, _, turn = request.rpartition(":")
        return f"{self._true_keys[key]}:{turn}"

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Pass through."""
        self._inner.replicas_added(replicas)

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Pass through."""
        self._inner.replicas_removed(names)

    def batch_expected(self, batch: Sequence[TurnStart], now: float) -> None:
        """Pass through under the halves' names."""
        self._inner.batch_expected([replace(turn, trajectory=self._known_as(turn.trajectory)) for turn in batch], now)

    def prewarms(self, now: float) -> list[Prewarm]:
        """Pass through; returned names are true names."""
        return [replace(order, trajectory=self._true_keys[order.trajectory]) for order in self._inner.prewarms(now)]

    def transferred(self, key: str, now: float) -> None:
        """Pass through under the half's name."""
        self._inner.transferred(self._known_keys[key], now)

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """Pass through under the half's name."""
        return self._inner.turn_started(replace(turn, trajectory=self._known_as(turn.trajectory)), now)

    def tool_started(self, start: ToolStart, now: float) -> None:
        """Pass through under the half's name."""
        self._inner.tool_started(replace(start, trajectory=self._known_as(start.trajectory)), now)

    def admitted(self, now: float) -> list[tuple[str, str]]:
        """Pass through; returned names are true names."""
        return [(self._true_name(request), replica) for request, replica in self._inner.admitted(now)]

    def tick(self, now: float) -> None:
        """Pass through."""
        self._inner.tick(now)

    def due_s(self, now: float) -> float:
        """Pass through."""
        return self._inner.due_s(now)

    def reprioritised(self, now: float) -> dict[str, dict[str, int]]:
        """Pass through; returned names are true names."""
        tables = self._inner.reprioritised(now)
        return {replica: {self._true_name(request): value for request, value in table.items()} for replica, table in tables.items()}

    @property
    def refresh_due_s(self) -> float | None:
        """Pass through."""
        return self._inner.refresh_due_s

    def turn_finished(self, turn: TurnEnd, now: float) -> Any:
        """Pass through under the half's name."""
        return self._inner.turn_finished(replace(turn, trajectory=self._known_as(turn.trajectory)), now)

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> Any:
        """Pass through under the half's name."""
        return self._inner.trajectory_ended(replace(end, trajectory=self._known_as(end.trajectory)), now)
