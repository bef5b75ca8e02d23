"""The online predictor of remaining tokens: learns from the events of a run, and answers at the end of every turn.

Law: pool, prompt history and siblings give an empirical-Bayes estimate (`bayes`); a model fitted between steps corrects it (`fit`). Before
the first fit the estimate stands alone. A trajectory that ends without finishing is censored: for the trees it counts as "at least this
long", for prompts and pool as the median of what was still expected. Validation trajectories are predicted but not learned from.

Invariants
- answers depend only on the events, their order and the adopted models; no clock, no randomness;
- O(1) work per event and bounded memory: live trajectories, and `MAX_IDLE_GROUPS`, `MAX_PROMPTS`, `MAX_TOOLS`, `ROWS` of the past;
- `fit_job` copies, so the fit may run in another thread while events arrive.

Stored state (`pack`, `unpack`): magic, format version, header length, crc32 of the rest, a JSON header, then the arrays as raw
little-endian bytes in the header's order; header and arrays are compressed together. No pickle: a checkpoint from elsewhere must not run
code.

Replay (`recall`): finished trajectories, from a recorded trace or an earlier epoch, are fed from first turn to end, one after the other, so
that later samples of a prompt see their siblings finished.

Source: Heddle (arXiv 2603.28101, section 4.1) re-predicts after every turn with a language model; here the orchestrator's own numbers do.
Cost: an event about 0.1 ms, one prediction 0.2 ms, 10,000 predictions under 100 ms; replay about 0.3 ms per turn.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from math import exp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verl_heddle.predict import tools as tool_names
from verl_heddle.predict.bayes import FLOORS, PRIOR_LOG, Pool
from verl_heddle.predict.features import VERSION, believed, believed_one, build, build_one
from verl_heddle.predict.fit import FitJob
from verl_heddle.predict.live import OWN_COLUMNS, Live, Lives, Own
from verl_heddle.predict.model import SPREAD, Model
from verl_heddle.predict.prompts import Prompts, TextModel, hashed
from verl_heddle.predict.quantities import FLOOR, QUANTITIES, TOKENS, TOOL_S, TURNS, UPPER, Estimate, Estimates, Floats
from verl_heddle.predict.tools import names
from verl_heddle.predict.window import Batch, Window, looked_at, rows_of
from verl_heddle.trajectory import Outcome, ToolStart, Trajectory, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart

MAGIC = b"heddle-predict\n"

FORMAT = 1
"""Version of the layout and of what the header means; other versions are refused."""

MAX_BYTES = 2**31
"""Largest unpacked state accepted: ten times that of full tables; a damaged length must not ask for all memory."""

_HEAD = struct.Struct("<IIQ")  # format, crc32 of the packed body, length of the unpacked header


class StateError(ValueError):
    """A stored predictor that cannot be used, with what is wrong in one line. The remedy is a cold start."""


def pack(header: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> bytes:
    """Header and arrays as bytes."""
    contents = [(name, np.ascontiguousarray(array)) for name, array in arrays.items()]
    listed = [[name, array.dtype.newbyteorder("<").str, list(array.shape)] for name, array in contents]
    text = json.dumps({"header": header, "arrays": listed}, allow_nan=False).encode()
    body = zlib.compress(text + b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for _, array in contents), 1)
    return MAGIC + _HEAD.pack(FORMAT, zlib.crc32(body), len(text)) + body


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Counterpart of `pack`.

    Raises:
        StateError: not such bytes, another version, cut off or damaged.
    """
    start = len(MAGIC) + _HEAD.size
    if not data.startswith(MAGIC) or len(data) < start:
        raise StateError("not a stored predictor")
    version, check, length = _HEAD.unpack_from(data, len(MAGIC))
    if version != FORMAT:
        raise StateError(f"stored in format {version}, this is format {FORMAT}")
    body = data[start:]
    if zlib.crc32(body) != check:
        raise StateError("damaged or cut off (checksum differs)")
    try:
        plain = zlib.decompressobj().decompress(body, MAX_BYTES)
        listed = json.loads(plain[:length])
        arrays, at = {}, length
        for name, kind, shape in listed["arrays"]:
            dtype, size = np.dtype(kind), int(np.prod(shape, dtype=np.int64))
            array = np.frombuffer(plain, dtype, size, at).reshape(shape)
            arrays[name] = array.astype(dtype.newbyteorder("="))
            at += array.nbytes
        return listed["header"], arrays
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise StateError(f"damaged ({type(error).__name__}: {error})") from error


CALIBRATION = ("shift", "widen", "trust")
"""What a `Model` has besides its trees."""


class Predictor:
    """Progressive length prediction.

    Args:
        cap_tokens: most tokens a trajectory may generate (verl's `response_length`); estimates stop there. None: no cap known.
    """

    def __init__(self, cap_tokens: int | None = None) -> None:
        self._cap = float(cap_tokens) if cap_tokens is not None else np.inf
        self._pool, self._prompts, self._text = Pool(), Prompts(), TextModel()
        self._tools = tool_names.Tools(float(PRIOR_LOG[TOOL_S] - PRIOR_LOG[TURNS]))
        self._window, self._live = Window(), Lives()
        self.model: Model | None = None
        """The adopted model; None: empirical Bayes alone."""

    def turn_started(self, turn: TurnStart) -> None:
        """A trajectory wants to generate. `turn.text` is read when the first trajectory of a visit (`uid`) begins."""
        identity = turn.trajectory
        live = self._live.trajectories.get(identity.key)
        if live is None:
            if identity.uid not in self._live.visits:
                words = hashed(turn.text)
                history = self._prompts.look_up(identity.prompt, self._pool)
                self._live.visit(identity.uid, history, self._text.deviation(words), words)
            who = (identity.uid, identity.prompt, identity.step, not identity.validate)
            live = self._live.start(identity.key, who, turn.context_tokens)
            if turn.turn:  # it began before we did
                self._live.caught_up(live, turn.generated_tokens, turn.turn)
            self._look(live)
            return
        if not turn.turn:  # it was announced, with a guess at its prompt's tokens; or its replica was lost in its first turn
            self._live.begins(live, turn.context_tokens)
            live.snapshots.clear()
            self._look(live)
            return
        log_s = self._live.answered(live, turn.context_tokens, turn.tool_s)
        if log_s is not None and live.teaches and live.called:
            self._tools.took(live.called, log_s)

    def turn_finished(self, turn: TurnEnd) -> None:
        """A generation ended."""
        live = self._live.trajectories.get(turn.trajectory.key)
        if live is None or not turn.completed:
            return
        self._live.turn(live, turn.output_tokens)
        self._called(live, ())
        self._look(live)

    def tool_started(self, start: ToolStart) -> None:
        """The turn asked for this tool. The moment to predict: its name says something, and there is time."""
        live = self._live.trajectories.get(start.trajectory.key)
        if live is None or len(live.called) == tool_names.MAX_PARALLEL:
            return
        self._called(live, (*live.called, start.tool))
        if live.snapshots and looked_at(int(live.done[TURNS])):
            live.snapshots.pop()
            self._look(live)

    def trajectory_ended(self, end: TrajectoryEnd) -> None:
        """The episode is over. Not finished (failed, cancelled) or truncated by a limit means: it would have been at least so long."""
        key = end.trajectory.key
        live = self._live.trajectories.get(key)
        if live is None:
            self._unseen(end)
            return
        tokens, turns, tool_s = live.done
        total = (max(tokens, end.output_tokens), turns, tool_s)
        censored = end.truncated or end.outcome is not Outcome.FINISHED
        logs = np.log(np.maximum(total, FLOOR))
        if censored:  # the past is kept in sizes, and the best guess of this one's size is what was still expected of it
            logs_left = believed_one(live.row, live.group.row, self._pool).left
            left = np.exp(np.minimum(logs_left, np.log(1e12)))
            logs = np.log(np.maximum(np.array(total) + left, FLOOR))
        visit = live.group
        inside = self._live.end(key, logs)
        if not live.teaches:
            return
        if not censored:
            self._teach_tools(live, total)
        self._text.observe(visit.words, float(logs[TOKENS] - self._pool.mean[TOKENS]))
        self._pool.observe(logs, live.step, inside)
        self._prompts.observe(live.prompt, live.step, logs, self._pool)
        self._window.add(rows_of(live.prompt, live.snapshots, total, censored))

    def __contains__(self, key: str) -> bool:
        """Whether the trajectory with this `TrajectoryId.key` is under way."""
        return key in self._live.trajectories

    def predict(self, key: str) -> Estimate | None:
        """What the trajectory with this `TrajectoryId.key` has still to do; None if no turn of it has started."""
        live = self._live.trajectories.get(key)
        if live is None:
            return None
        own, group = live.row, live.group.row
        belief = believed_one(own, group, self._pool)
        left: Sequence[float] = belief.left
        spread = belief.spread
        if self.model is not None:
            left, spread = self.model.remaining_one(build_one(own, group, self._pool, belief))
        room = max(self._cap - own[Own.TOKENS], FLOORS[TOKENS])
        tokens, turns, tool_s = (max(exp(log_left), floor) for log_left, floor in zip(left, FLOORS, strict=True))
        median = min(tokens, room)
        return Estimate(median, max(median, min(exp(min(left[TOKENS] + spread, 80.0)), room)), turns, tool_s)

    def predict_many(self, keys: Sequence[str]) -> Estimates:
        """What each of these trajectories has still to do, in order.

        Raises:
            KeyError: one is not under way.
        """
        return self._estimate([self._live.trajectories[key] for key in keys])

    def fit_job(self) -> FitJob:
        """What there is to learn from by now, what still runs included; `run` it anywhere, `adopt` what it returns."""
        running = []
        for live in self._live.trajectories.values():
            if live.teaches:
                running.append(rows_of(live.prompt, live.snapshots, live.done, True))
        return FitJob(self._window.copy(*running), Pool.restore(self._pool.state()))

    def adopt(self, model: Model | None) -> None:
        """Answer with this model from now on; None (too little to learn from) changes nothing."""
        self.model = model or self.model

    def to_bytes(self) -> bytes:
        """Everything learnt; trajectories under way are not in it. For a checkpoint."""
        model = self.model
        names, prompts = self._prompts.state()
        batch = self._window.copy()
        arrays = {name: getattr(batch, name) for name in Batch.__slots__} | {"prompts": prompts, "text": self._text.weights}
        if model is not None:
            arrays |= {f"trees{number}": np.frombuffer(raw, dtype=np.uint8) for number, raw in enumerate(model.trees)}
        header = {
            "features": VERSION,
            "upper": UPPER,
            "pool": self._pool.state(),
            "tools": self._tools.state(),
            "prompts": names,
            "model": None if model is None else {name: getattr(model, name).tolist() for name in CALIBRATION} | {"rows": model.rows},
        }
        return pack(header, arrays)

    @classmethod
    def from_bytes(cls, data: bytes, cap_tokens: int | None = None) -> Predictor:
        """Counterpart of `to_bytes`.

        Raises:
            StateError: not such bytes, another version, cut off or damaged: say so and start cold.
        """
        header, arrays = unpack(data)
        if header.get("features") != VERSION or header.get("upper") != UPPER:
            raise StateError("made by a version with other features")
        predictor = cls(cap_tokens)
        try:
            predictor._pool = Pool.restore(header["pool"])
            predictor._tools = tool_names.Tools.restore(header["tools"])
            predictor._prompts = Prompts.restore(header["prompts"], arrays["prompts"])
            predictor._text = TextModel(arrays["text"])
            predictor._window.add(Batch(*(arrays[name] for name in Batch.__slots__)))
            if header["model"] is not None:
                trees = [arrays[f"trees{number}"].tobytes() for number in range(QUANTITIES)]
                shift, widen, trust = (np.array(header["model"][name], dtype=np.float64) for name in CALIBRATION)
                predictor.model = Model(trees, shift, widen, trust, header["model"]["rows"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise StateError(f"incomplete ({type(error).__name__}: {error})") from error
        return predictor

    def abandon_before(self, step: int) -> list[str]:
        """Forget trajectories of earlier training steps that never ended (their worker died); returns their keys."""
        lost = [(key, live) for key, live in self._live.trajectories.items() if live.step < step]
        for key, live in lost:
            self._live.end(key, np.log(np.maximum(live.done, FLOOR)))
        return [key for key, _ in lost]

    def _unseen(self, end: TrajectoryEnd) -> None:
        """It began before we did (a router that was started again): its size is news all the same, its tool time is not known."""
        if end.outcome is Outcome.FINISHED and not end.truncated and not end.trajectory.validate:
            logs = np.log(np.maximum((end.output_tokens, end.turns, 0.0), FLOOR))
            logs[TOOL_S] = self._pool.mean[TOOL_S]
            self._pool.observe(logs, end.trajectory.step, None)
            self._prompts.observe(end.trajectory.prompt, end.trajectory.step, logs, self._pool)

    def _features(self, lives: Sequence[Live]) -> tuple[NDArray[np.float32], Floats]:
        own = np.array([live.row for live in lives])
        return build(own, np.array([live.group.row for live in lives]), self._pool), own

    def _called(self, live: Live, called: tuple[str, ...]) -> None:
        self._live.called(live, called, *self._tools.says(called))

    def _look(self, live: Live) -> None:
        if live.teaches and looked_at(int(live.done[TURNS])):
            live.look()

    def _estimate(self, lives: Sequence[Live]) -> Estimates:
        if not lives:
            return Estimates(*(np.empty(0) for _ in Estimates._fields))
        rows, own = self._features(lives)
        left, spread = self.model.remaining(rows) if self.model else (rows[:, :QUANTITIES].astype(np.float64), rows[:, SPREAD])
        room = np.maximum(self._cap - own[:, Own.TOKENS], FLOOR[TOKENS])
        amounts = np.maximum(np.exp(left), FLOOR)
        upper = np.exp(np.minimum(left[:, TOKENS] + spread, 80.0))
        median = np.minimum(amounts[:, TOKENS], room)
        return Estimates(median, np.maximum(median, np.minimum(upper, room)), amounts[:, TURNS], amounts[:, TOOL_S])

    def _teach_tools(self, live: Live, total: tuple[float, float, float]) -> None:
        """After each call the trajectory went on so much longer or shorter than the pool of today expects."""
        used = [shot for shot in live.snapshots if shot.called and total[TOKENS] - shot.done[TOKENS] >= FLOOR[TOKENS]]
        if used:
            state = np.array([shot.state for shot in used])
            _, left, _ = believed(state[:, :OWN_COLUMNS], state[:, OWN_COLUMNS:], self._pool)
            expected = left[TOKENS]
            for shot, log_left in zip(used, expected.tolist(), strict=True):
                self._tools.led_to(shot.called, float(np.log(total[TOKENS] - shot.done[TOKENS])) - log_left)


def recall(predictor: Predictor, trajectories: Iterable[Trajectory], step: int) -> None:
    """Tell `predictor` the trajectories as those of training step `step`."""
    for item in trajectories:
        who = TrajectoryId(item.prompt_id, f"{step}:{item.prompt_id}", item.trial, step)
        context, generated = item.prompt_tokens or 0, 0
        tool_s: float | None = None
        for number, turn in enumerate(item.steps):
            context = turn.ctx_tokens if turn.ctx_tokens is not None else context + (turn.input_tokens or 0)
            predictor.turn_started(TurnStart(who, who.key, number, context, generated, tool_s))
            tokens = turn.output_tokens or 0
            predictor.turn_finished(TurnEnd(who, who.key, "", number, tokens))
            for tool in names(turn.tool):
                predictor.tool_started(ToolStart(who, tool))
            tool_s, context, generated = turn.tool_latency_s, context + tokens, generated + tokens
        truncated = bool(item.meta.get("truncated", False))
        outcome = Outcome(item.meta.get("outcome", Outcome.FINISHED))
        predictor.trajectory_ended(TrajectoryEnd(who, outcome, generated, len(item.steps), truncated))
