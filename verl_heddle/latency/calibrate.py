"""Fit a latency model to a recorded run: which step times explain how long its turns took?

Law: an engine step reads the weights once, moves every decoding sequence on by one token and prefills what has just arrived (chunked
prefill): `a + b*batch + c*batch*context + p*new`. A turn of `N` output tokens is in N steps, the first of them its own prefill, so

    gen_s = a*N + b*sum(batch) + c*sum(batch*context) + p*(tokens prefilled meanwhile, its own and others')

with the sums over its steps: linear in the four unknowns. A prefill alone takes `a + p*new`. Batch and total context over time follow
from the turns' own intervals (`batch_history`). Solved by non-negative least squares on *relative* errors, which bounds what a stalled
turn can do. The sums run over steps, not over time, and steps are denser while the batch is small, so a few passes weigh time by the
step rate of the pass before. Degrees of tensor parallelism are fitted apart.
Limits: a run whose batch never changes cannot tell a from b (`FitQuality.max_batch` says how far it saw); turns without engine
statistics count their queueing as generation; preempted, aborted and resumed turns load the replica but are not fitted.
Source: derived here; the four terms are what a step reads (weights, KV) and computes (decoded tokens, prefilled tokens) once each.
Cost: O(turns log turns) per pass.

Which batch every turn ran in, from the turns' own intervals on one replica.

Law: a turn is in the batch from the end of its prefill to its last token; its context grows evenly from what it read to that plus what
it wrote. Between two events (a turn joining or leaving) the batch is constant and the total context linear in time, so means over any
turn's interval are differences of prefix sums. Source: derived here. Cost: O(n log n) for n turns.

Step times learnt from a run under way: what `calibrate` makes of its last records, bounded in cost, and refused where wrong.
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
    """One turn as its replica saw it: seconds on a common clock, tokens."""

    begin_s: float
    """When it left the queue."""
    end_s: float
    new_tokens: float
    """Prefilled: not in the cache."""
    context_tokens: float
    """Read in all, before the first output token."""
    output_tokens: float
    usable: bool = True
    """Whether its duration is to be explained; all turns load the replica."""


@dataclass(frozen=True, slots=True)
class BatchHistory:
    """Per turn, in the order given, each of shape [turns]."""

    batch: Array
    """Sequences decoding, the mean over the turn's decode steps, itself included."""
    total_context: Array
    """Sum of their contexts, tokens, likewise."""
    prefilled_tokens: Array
    """Tokens that were prefilled during the turn: its own and those of turns that began within it."""


def batch_history(works: Sequence[Work], parameters: Sequence[float] | Array) -> BatchHistory:
    """Rebuild what ran beside each turn.

    Args:
        works: the turns of one replica, at least one.
        parameters: (a, b, c, p) of `verl_heddle.latency.calibrate` as far as known; zeros weigh all times alike and count no prefill time.
    """
    a, b, c, p = map(float, parameters)
    origin = min(work.begin_s for work in works)  # small numbers keep the sums precise
    begin = np.array([work.begin_s for work in works]) - origin
    end = np.array([work.end_s for work in works]) - origin
    new, context, output = (np.array([getattr(work, name) for work in works]) for name in ("new_tokens", "context_tokens", "output_tokens"))
    # A prefill estimate longer than the turn itself cannot be right; half of it leaves time to decode in.
    decode = begin + np.minimum(a + p * new, 0.5 * (end - begin))
    rate = output / (end - decode)

    order = np.argsort(np.concatenate([decode, end]), kind="stable")
    times = np.concatenate([decode, end])[order]
    sign = np.concatenate([np.ones(len(works)), -np.ones(len(works))])[order]
    who = np.concatenate([np.arange(len(works))] * 2)[order]
    middle, length = 0.5 * (times[:-1] + times[1:]), np.diff(times)
    count = np.maximum(np.cumsum(sign)[:-1], 1.0)
    slope = np.cumsum(sign * rate[who])[:-1]
    offset = np.cumsum(sign * (context - rate * decode)[who])[:-1]
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
    # A slot is often taken in the very step that frees it, and clocks differ: half a step decides on which side of an edge a start lies.
    half_step = 0.5 * (end - begin) / np.maximum(output, 1.0)
    low, high = (np.searchsorted(begin[by_begin], edge - half_step, "left") for edge in (begin, end))
    return BatchHistory(np.maximum(batch, 1.0), mean_total, tokens[high] - tokens[low])


MIN_TURNS = 20
"""Usable turns per degree: five for each of the four unknowns."""

PASSES = 6
"""The step weights settle to 1e-3 in three or four."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """One row per fitted turn: the four sums of the law, the recorded seconds, and the mean batch and context it ran in."""

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
    """The affine latency model that explains a recorded run best, with its residuals in `engines[tp].fit`.

    Args:
        records: trajectories as `verl_heddle.traces` records them live: turns with `replica`, `start_s`, `gen_s`, `ctx_tokens` and
            `output_tokens`, and `meta["start_s"]`, all on one clock. The more the batch varies the better; leave out a run's first step
            (compilation).
        tps: tensor-parallel degree by replica name, or one for all.
        base: where memory and weight-load times come from, and engines of degrees that were not recorded; the host's part of a step that
            the recorded degrees show beyond it is added to these.

    Raises:
        ValueError: fewer than `MIN_TURNS` usable turns for some degree (the message says how many more and what was wrong with the others),
            or a replica that `tps` does not name.
    """
    by_tp = _by_tp(records, tps)
    engines = dict(base.engines) if base else {}
    beyond = []
    for tp, replicas in sorted(by_tp.items()):
        fitted = _fit(replicas)
        if tp in engines:
            if engines[tp].fit is None:
                beyond.append(host_s(engines[tp], fitted, replicas))
            fitted = replace(engines[tp], decode=fitted.decode, prefill=fitted.prefill, fit=fitted.fit, host_s=0.0)
        engines[tp] = fitted
    turns = sum(len(works) for replicas in by_tp.values() for works in replicas)
    model = LatencyModel(name, engines, f"calibrated on {turns} recorded turns")
    if beyond and any(engine.fit is None for engine in engines.values()):
        model = model.with_host(max(beyond), f"{base.name if base else name} at other degrees, calibrated")
    return model


def calibrate_host(table: LatencyModel, records: Iterable[Trajectory], tp: int) -> LatencyModel:
    """A table of step times with the host's part of a step measured in a recorded run on replicas of one degree.

    Raises:
        ValueError: as `calibrate`, or the table does not know the degree.
    """
    replicas = _by_tp(records, tp)[tp]
    if tp not in table.engines:
        raise ValueError(f"latency model {table.name} knows tensor-parallel degrees {list(table.tps)}, not {tp}")
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
            raise ValueError(f"tps names no tensor-parallel degree for replica {replica!r}; it names {sorted(tps)}")
        by_tp[tps if isinstance(tps, int) else tps[replica]].append(works)
    _require_enough(by_tp, skipped)
    return by_tp


def _work(trajectory: Trajectory, index: int) -> Work | str:
    """What the turn asked of its replica, or why it cannot be known."""
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
        new = turn.input_tokens  # the engine did not say; its prefix cache most likely still held what it wrote itself
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
    why = [f"{count} turns with {reason}" for reason, count in sorted(skipped.items())]
    unfit = sum(not work.usable for replicas in by_tp.values() for works in replicas for work in works)
    if unfit:
        why.append(f"{unfit} turns preempted or without output")
    wanted = [f"tp={tp} has {count}: record {MIN_TURNS - count} more" for tp, count in sorted(short.items())] or [
        f"there are none: record {MIN_TURNS}"
    ]
    left_out = f" Left out: {'; '.join(why)}." if why else ""
    raise ValueError(f"calibration needs {MIN_TURNS} usable turns per tensor-parallel degree; {'; '.join(wanted)}.{left_out}")


def _fit(replicas: Sequence[Sequence[Work]]) -> Engine:
    """Fit all replicas of one degree together."""
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
    """Non-negative least squares on relative errors, exactly.

    The optimum is the plain least-squares solution over the columns that are not zero in it; there are 15 sets of columns, so all are
    tried. Columns are scaled to one size: counts and squared tokens lie ten orders of magnitude apart.
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
            gain = float(target[columns] @ solution)  # how far the squared error falls below that of predicting nothing
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
"""A second of fitting; four unknowns need far fewer. Whole replicas are taken, because a turn is explained by those beside it."""

WORST_ERROR = 0.5
"""Median error of a turn's time above which a plan made with it is no better than none; seen: 0.02 on a GPU, 0.05 to 0.2 on a CPU."""


def step_times(records: Sequence[Trajectory], tps: Mapping[str, int], known: LatencyModel | None = None) -> LatencyModel:
    """The latency model of the replicas, from what trajectories recorded live tell of their turns.

    Args:
        tps: tensor-parallel degree by replica; turns on other replicas are not looked at.
        known: where the times of degrees come from that are not among them.

    Raises:
        ValueError: of some degree there are too few usable turns, or the model explains them badly.
    """
    turns = Counter(turn.replica for record in records for turn in record.steps if turn.replica in tps)
    chosen: dict[str, int] = {}
    for replica, _ in turns.most_common():
        if replica is not None and sum(turns[name] for name, tp in chosen.items() if tp == tps[replica]) < ENOUGH_TURNS:
            chosen[replica] = tps[replica]
    told = [replace(one, steps=tuple(turn for turn in one.steps if turn.replica in chosen)) for one in records]
    model = calibrate(told, chosen, base=known, name="learnt from this run")
    for tp in set(chosen.values()):
        fit = model.engines[tp].fit
        if fit is None or not fit.median_error <= WORST_ERROR:
            error = "?" if fit is None else f"{fit.median_error:.0%}"
            raise ValueError(f"turns take {error} more or less than the model of them says")
    return model


def host_s(table: Engine, fitted: Engine, replicas: Sequence[Sequence[Work]]) -> float:
    """Seconds a step that recorded turns take beyond a table's.

    Args:
        table: decode and prefill times to compare with; its own `host_s` is not counted.
        fitted: the affine engine that explains these turns best; it says which turns shared their steps.
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
