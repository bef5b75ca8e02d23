"""Fit a latency model to a recorded run: step times that explain how long its turns took.

Step law: an engine step reads the weights once, advances every decoding sequence by one token and prefills the tokens that just arrived
(chunked prefill): `a + b*batch + c*batch*context + p*new`. A turn of `N` output tokens spans N steps, the first being its own prefill, so

    gen_s = a*N + b*sum(batch) + c*sum(batch*context) + p*(tokens prefilled meanwhile, its own and others')

with the sums over its steps. This is linear in the four unknowns. A prefill alone takes `a + p*new`.
Batch law (`batch_history`): a turn is in the batch from the end of its prefill to its last token, and its context grows linearly over that
interval by its output tokens. Between two events (a turn joining or leaving) the batch is constant and the total context is linear in
time, so means over a turn's interval are differences of prefix sums.
Solver: non-negative least squares on *relative* errors, which bounds the influence of a stalled turn. The sums run over steps, not time,
and steps are denser while the batch is small, so a few passes weight time by the previous pass's step rate. Each tensor-parallel degree
is fitted separately.
Limits: a run whose batch never changes cannot separate a from b (`FitQuality.max_batch` is the largest batch seen); turns without engine
statistics count their queueing as generation; preempted, aborted and resumed turns load the replica but are not fitted.
Source: derived here; the four terms are what a step reads (weights, KV) and computes (decoded tokens, prefilled tokens) once each.
Cost: O(turns log turns) per pass. `step_times` fits a run in progress: it bounds the number of turns and rejects a poor fit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from verl_heddle.latency.model import AffineDecode, AffinePrefill, Engine, FitQuality, LatencyModel
from verl_heddle.trajectory import Trajectory

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Work:
    """One turn as seen by its replica, in tokens and seconds on a common clock."""

    begin_s: float
    """Time at which it left the queue."""
    end_s: float
    new_tokens: float
    """Prompt tokens prefilled, that is, not cached."""
    context_tokens: float
    """All tokens in the context before the first output token."""
    output_tokens: float
    usable: bool = True
    """Whether the fit uses its duration. Unusable turns still load the replica."""


@dataclass(frozen=True, slots=True)
class BatchHistory:
    """Per-turn arrays of shape [turns], in input order."""

    batch: Array
    """Decoding sequences, itself included: mean over the turn's decode steps."""
    total_context: Array
    """Sum of their contexts in tokens: mean over the same steps."""
    prefilled_tokens: Array
    """Tokens prefilled during the turn: its own and those of turns that began within it."""


def batch_history(works: Sequence[Work], parameters: Sequence[float] | Array) -> BatchHistory:
    """Reconstruct the load on the replica during each turn.

    Args:
        works: the turns of one replica, at least one.
        parameters: the current estimate of (a, b, c, p); zeros weight all times equally and ignore prefill time.
    """
    a, b, c, p = map(float, parameters)
    origin = min(work.begin_s for work in works)  # small numbers keep the prefix sums precise
    begin = np.array([work.begin_s for work in works]) - origin
    end = np.array([work.end_s for work in works]) - origin
    new, context, output = (np.array([getattr(work, name) for work in works]) for name in ("new_tokens", "context_tokens", "output_tokens"))
    # A prefill cannot outlast its turn. Capping the estimate at half the turn leaves time to decode.
    decode = begin + np.minimum(a + p * new, 0.5 * (end - begin))
    rate = output / (end - decode)

    order = np.argsort(np.concatenate([decode, end]), kind="stable")
    times = np.concatenate([decode, end])[order]
    sign = np.concatenate([np.ones(len(works)), -np.ones(len(works))])[order]
    turn = np.concatenate([np.arange(len(works))] * 2)[order]
    middle, length = 0.5 * (times[:-1] + times[1:]), np.diff(times)
    count = np.maximum(np.cumsum(sign)[:-1], 1.0)
    slope = np.cumsum(sign * rate[turn])[:-1]
    offset = np.cumsum(sign * (context - rate * decode)[turn])[:-1]
    total = np.maximum(offset + slope * middle, 0.0)

    step = a + b * count + c * total
    weight = length / step if step.min() > 0 else length
    reached = {
        name: np.concatenate([[0.0], np.cumsum(weight * part)]) for name, part in (("steps", 1.0), ("count", count), ("total", total))
    }
    first, last = np.searchsorted(times, decode, "left"), np.searchsorted(times, end, "left")
    steps = np.maximum(reached["steps"][last] - reached["steps"][first], 1e-300)
    batch = (reached["count"][last] - reached["count"][first]) / steps
    mean_total = (reached["total"][last] - reached["total"][first]) / steps

    by_begin = np.argsort(begin, kind="stable")
    tokens = np.concatenate([[0.0], np.cumsum(new[by_begin])])
    # A slot is often reused in the step that frees it, and clocks differ, so starts within half a step before an edge count as after it.
    half_step = 0.5 * (end - begin) / np.maximum(output, 1.0)
    low, high = (np.searchsorted(begin[by_begin], edge - half_step, "left") for edge in (begin, end))
    return BatchHistory(np.maximum(batch, 1.0), mean_total, tokens[high] - tokens[low])


MIN_TURNS = 20
"""Usable turns per degree: five per unknown."""

PASSES = 6
"""The step weights converge to 1e-3 in three or four passes."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """One row per fitted turn: the four sums of the step law, the recorded seconds, and its mean batch and context."""

    sums: Array
    seconds: Array
    batch: Array
    context: Array


def calibrate(
    records: Iterable[Trajectory],
    tps: Mapping[str, int] | int = 1,
    *,
    base: LatencyModel | None = None,
    name: str = "calibrated",
) -> LatencyModel:
    """The affine latency model that best explains a recorded run, with its residuals in `engines[tp].fit`.

    Args:
        records: trajectories recorded live by `verl_heddle.traces`: turns with `replica`, `start_s`, `gen_s`, `ctx_tokens` and
            `output_tokens`, and `meta["start_s"]`, all on one clock. The more the batch varies, the better. Leave out a run's first step
            (compilation).
        tps: tensor-parallel degree by replica name, or one degree for all.
        base: supplies memory, weight-load times and the engines of degrees that were not recorded. The host time per step measured at
            the recorded degrees is added to those engines.

    Raises:
        ValueError: some degree has fewer than `MIN_TURNS` usable turns (the message says how many more are needed and why turns were
            left out), or `tps` lacks a replica.
    """
    by_tp = _by_tp(records, tps)
    engines = dict(base.engines) if base else {}
    host_times = []
    for tp, replicas in sorted(by_tp.items()):
        fitted = _fit(replicas)
        if tp in engines:
            if engines[tp].fit is None:
                host_times.append(host_s(engines[tp], fitted, replicas))
            fitted = replace(engines[tp], decode=fitted.decode, prefill=fitted.prefill, fit=fitted.fit, host_s=0.0)
        engines[tp] = fitted
    turns = sum(len(works) for replicas in by_tp.values() for works in replicas)
    model = LatencyModel(name, engines, f"calibrated on {turns} recorded turns")
    if host_times and any(engine.fit is None for engine in engines.values()):
        model = model.with_host(max(host_times), f"{base.name if base else name} at other degrees, calibrated")
    return model


def calibrate_host(table: LatencyModel, records: Iterable[Trajectory], tp: int) -> LatencyModel:
    """`table` with host time per step measured from a recorded run on replicas of degree `tp`.

    Raises:
        ValueError: as `calibrate`, or the table lacks the degree.
    """
    replicas = _by_tp(records, tp)[tp]
    if tp not in table.engines:
        raise ValueError(f"latency model {table.name} covers tensor-parallel degrees {list(table.tps)}, not {tp}")
    measured = host_s(table.engines[tp], _fit(replicas), replicas)
    return table.with_host(measured, f"calibrated on {sum(map(len, replicas))} turns of this run")


def _by_tp(records: Iterable[Trajectory], tps: Mapping[str, int] | int) -> dict[int, list[list[Work]]]:
    """The turns of each replica, by degree.

    Raises:
        ValueError: as `calibrate`.
    """
    by_replica: dict[str, list[Work]] = defaultdict(list)
    skipped: Counter[str] = Counter()
    for trajectory in records:
        for index in range(len(trajectory.steps)):
            work = _work(trajectory, index)
            if isinstance(work, str):
                skipped[work] += 1
            else:
                by_replica[trajectory.steps[index].replica or ""].append(work)
    by_tp: dict[int, list[list[Work]]] = defaultdict(list)
    for replica, works in sorted(by_replica.items()):
        if not isinstance(tps, int) and replica not in tps:
            raise ValueError(f"tps gives no tensor-parallel degree for replica {replica!r}, only for {sorted(tps)}")
        by_tp[tps if isinstance(tps, int) else tps[replica]].append(works)
    _require_enough(by_tp, skipped)
    return by_tp


def _work(trajectory: Trajectory, index: int) -> Work | str:
    """The turn's load on its replica, or the reason it cannot be used."""
    turn = trajectory.steps[index]
    start = trajectory.meta.get("start_s")
    if turn.replica is None or start is None or turn.start_s is None or not turn.gen_s or turn.gen_s <= 0:
        return "no replica, start_s or gen_s"
    if turn.output_tokens is None or turn.ctx_tokens is None:
        return "no output_tokens or ctx_tokens"
    begin = start + turn.start_s + (turn.route_s or 0.0) + 0.5 * (turn.transport_s or 0.0) + (turn.queue_s or 0.0)
    if turn.cached_tokens is not None:
        new = turn.ctx_tokens - turn.cached_tokens
    elif index and trajectory.steps[index - 1].replica == turn.replica and not turn.ctx_reset and turn.input_tokens is not None:
        new = turn.input_tokens  # no engine statistics; its previous turn is most likely still in the prefix cache
    else:
        new = turn.ctx_tokens
    return Work(
        begin_s=begin,
        end_s=begin + turn.gen_s,
        new_tokens=float(max(1, new)),
        context_tokens=float(turn.ctx_tokens),
        output_tokens=float(turn.output_tokens),
        usable=turn.output_tokens > 0 and not turn.preemptions,
    )


def _require_enough(by_tp: Mapping[int, Sequence[Sequence[Work]]], skipped: Counter[str]) -> None:
    usable = {tp: sum(work.usable for works in replicas for work in works) for tp, replicas in by_tp.items()}
    short = {tp: count for tp, count in usable.items() if count < MIN_TURNS}
    if usable and not short:
        return
    left_out = [f"{count} turns with {reason}" for reason, count in sorted(skipped.items())]
    unfit = sum(not work.usable for replicas in by_tp.values() for works in replicas for work in works)
    if unfit:
        left_out.append(f"{unfit} turns preempted or without output")
    wanted = [f"tp={tp} has {count}: record {MIN_TURNS - count} more" for tp, count in sorted(short.items())] or [
        f"there are none: record {MIN_TURNS}"
    ]
    excluded = f" Left out: {'; '.join(left_out)}." if left_out else ""
    raise ValueError(f"calibration needs {MIN_TURNS} usable turns per tensor-parallel degree; {'; '.join(wanted)}.{excluded}")


def _fit(replicas: Sequence[Sequence[Work]]) -> Engine:
    """Fit the replicas of one degree jointly."""
    parameters = np.zeros(4)
    for _ in range(PASSES):
        parts = [_rows(works, parameters) for works in replicas]
        rows = _Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("sums", "seconds", "batch", "context")))
        parameters = _solve(rows)
    error = np.abs(rows.sums @ parameters / rows.seconds - 1.0)
    a, b, c, p = map(float, parameters)
    quality = FitQuality(
        len(error), float(np.median(error)), float(np.quantile(error, 0.9)), float(rows.batch.max()), float(rows.context.max())
    )
    return Engine(AffineDecode(a, b, c), AffinePrefill(p, base_s=a), fit=quality)


def _solve(rows: _Rows) -> Array:
    """Exact non-negative least squares on relative errors.

    The optimum is the plain least-squares solution over its non-zero columns. There are only 15 non-empty column sets, so all are tried.
    Columns are scaled to equal size: counts and squared tokens are ten orders of magnitude apart.
    """
    relative = rows.sums / rows.seconds[:, None]
    scale = np.maximum(relative.max(axis=0), 1e-300)
    matrix = relative / scale
    gram, target = matrix.T @ matrix, matrix.sum(axis=0)
    best, best_gain = np.zeros(len(scale)), 0.0
    for size in range(1, len(scale) + 1):
        for subset in combinations(range(len(scale)), size):
            columns = list(subset)
            solution = np.linalg.lstsq(gram[np.ix_(columns, columns)], target[columns], rcond=None)[0]
            gain = float(target[columns] @ solution)  # reduction in squared error relative to predicting zero
            if solution.min() >= 0.0 and gain > best_gain:
                best = np.zeros(len(scale))
                best[columns] = solution
                best_gain = gain
    return best / scale


def _rows(works: Sequence[Work], parameters: Array) -> _Rows:
    history = batch_history(works, parameters)
    use = np.array([work.usable for work in works])
    steps = np.array([work.output_tokens for work in works])
    context = np.array([work.context_tokens for work in works])
    # In its first step the turn is prefilled, not yet part of the decoding batch.
    batch, total = steps * history.batch - 1.0, steps * history.total_context - context
    sums = np.maximum(np.column_stack([steps, batch, total, history.prefilled_tokens]), 0.0)
    seconds = np.array([work.end_s - work.begin_s for work in works])
    return _Rows(sums[use], seconds[use], history.batch[use], (history.total_context / history.batch)[use])


ENOUGH_TURNS = 4000
"""Turns per degree that `step_times` aims for: one second of fitting, and far more than four unknowns need. Replicas are taken whole,
because explaining a turn needs the turns that ran beside it."""

WORST_ERROR = 0.5
"""Median error of a turn's time above which planning with the model is no better than not planning. Measured: 0.02 on a GPU, 0.05 to 0.2
on a CPU."""


def step_times(records: Sequence[Trajectory], tps: Mapping[str, int], known: LatencyModel | None = None) -> LatencyModel:
    """The latency model of the replicas of a run in progress, fitted to trajectories recorded live.

    Args:
        tps: tensor-parallel degree by replica; turns on other replicas are ignored.
        known: supplies the times of all other degrees.

    Raises:
        ValueError: some degree has too few usable turns, or the fit exceeds `WORST_ERROR`.
    """
    turns = Counter(turn.replica for record in records for turn in record.steps if turn.replica in tps)
    chosen: dict[str, int] = {}
    for replica, _ in turns.most_common():
        if replica is not None and sum(turns[name] for name, tp in chosen.items() if tp == tps[replica]) < ENOUGH_TURNS:
            chosen[replica] = tps[replica]
    selected = [replace(record, steps=tuple(turn for turn in record.steps if turn.replica in chosen)) for record in records]
    model = calibrate(selected, chosen, base=known, name="learnt from this run")
    for tp in set(chosen.values()):
        fit = model.engines[tp].fit
        if fit is None or not fit.median_error <= WORST_ERROR:
            error = "?" if fit is None else f"{fit.median_error:.0%}"
            raise ValueError(f"the fitted step times have a median error of {error} per turn, more than {WORST_ERROR:.0%}")
    return model


def host_s(table: Engine, fitted: Engine, replicas: Sequence[Sequence[Work]]) -> float:
    """Seconds per step that recorded turns take beyond a table's times; at least 0.

    Args:
        table: decode and prefill times to compare with; its own `host_s` is ignored.
        fitted: the affine engine that best explains these turns; it determines which turns shared steps.
        replicas: the turns of each replica, of one degree.
    """
    decode, prefill = fitted.decode, fitted.prefill
    if not (isinstance(decode, AffineDecode) and isinstance(prefill, AffinePrefill)):
        raise TypeError("needs a fitted engine")
    parameters = (decode.base_s, decode.per_seq_s, decode.per_context_s, prefill.per_token_s)
    found = []
    for works in replicas:
        history = batch_history(works, parameters)
        use = np.array([work.usable for work in works])
        steps = np.array([max(1.0, work.output_tokens) for work in works])
        took = np.array([work.end_s - work.begin_s for work in works])
        new = float(np.mean([work.new_tokens for work in works]))
        context = float(np.mean([work.context_tokens for work in works]))
        rate = (float(table.prefill(new, context - new)) - float(table.prefill(1.0, context - new))) / new if new > 1 else 0.0
        known = steps * np.asarray(table.decode(history.batch, history.total_context / history.batch)) + rate * history.prefilled_tokens
        found.append(((took - known) / steps)[use])
    return max(0.0, float(np.median(np.concatenate(found))))
