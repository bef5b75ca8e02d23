"""How much is left of every trajectory: learns from the events of a run, answers at every turn end.

Law: pool, prompt history and siblings give an empirical-Bayes estimate (`bayes`); a model fitted between steps corrects it (`fit`);
before the first fit the estimate stands alone. What ends without finishing is censored: it teaches the trees as "at least so long", and
prompts and pool as the median of what was still to be expected. Validation trajectories are predicted but teach nothing.

Invariants
- answers depend on the events, their order and the adopted models only; no clock, no randomness;
- O(1) work per event and bounded memory: what is alive, and `MAX_IDLE_GROUPS`, `MAX_PROMPTS`, `MAX_TOOLS`, `ROWS` of the past;
- `fit_job` copies, so the fit may run in another thread while events go on.

Source: Heddle (arXiv 2603.28101) section 4.1 re-predicts after every turn with a language model; here the orchestrator's own numbers do.
Cost: an event about 0.1 ms, one prediction 0.2 ms, 10,000 predictions under 100 ms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from verl_heddle.predict import tools as tool_names
from verl_heddle.predict.features import VERSION, build
from verl_heddle.predict.fit import FitJob
from verl_heddle.predict.live import OWN_COLUMNS, Live, LiveTables, Own
from verl_heddle.predict.model import SPREAD, Model
from verl_heddle.predict.pool import PRIOR_LOG, Pool
from verl_heddle.predict.prompts import Prompts
from verl_heddle.predict.quantities import FLOOR, QUANTITIES, TOKENS, TOOL_S, TURNS, UPPER, Estimate, Estimates, Floats
from verl_heddle.predict.store import StateError, pack, unpack
from verl_heddle.predict.text import TextModel, hashed
from verl_heddle.predict.window import Batch, Window, looked_at, rows_of
from verl_heddle.trajectory import Outcome, TrajectoryEnd, TurnEnd, TurnStart


class Predictor:
    """Progressive length prediction.

    Args:
        cap_tokens: most tokens a trajectory may generate (verl's `response_length`); estimates stop there. None: no cap known.
    """

    def __init__(self, cap_tokens: int | None = None) -> None:
        self._cap = float(cap_tokens) if cap_tokens is not None else np.inf
        self._pool, self._prompts, self._text = Pool(), Prompts(), TextModel()
        self._tools = tool_names.Tools(float(PRIOR_LOG[TOOL_S] - PRIOR_LOG[TURNS]))
        self._window, self._live = Window(), LiveTables()
        self.model: Model | None = None
        """The adopted model; None: empirical Bayes alone."""

    def turn_started(self, turn: TurnStart, *, tool_s: float | None = None, text: str | None = None) -> None:
        """A trajectory wants to generate.

        Args:
            tool_s: seconds in tools since its last turn; None if not known.
            text: the prompt's text where known; read when the first trajectory of a visit (`uid`) begins.
        """
        identity = turn.trajectory
        live = self._live.trajectories.get(identity.key)
        if live is None:
            if identity.uid not in self._live.visits:
                words = hashed(text)
                history = self._prompts.look_up(identity.prompt, self._pool)
                self._live.visit(identity.uid, history, self._text.deviation(words), words)
            who = (identity.uid, identity.prompt, identity.step, not identity.validate)
            live = self._live.start(identity.key, who, turn.context_tokens)
            self._look(live)
            return
        log_s = self._live.answered(live, turn.context_tokens, tool_s)
        if log_s is not None and live.teaches and live.called:
            self._tools.took(live.called, log_s)

    def turn_finished(self, turn: TurnEnd, *, called: tuple[str, ...] = ()) -> None:
        """A generation ended; `called` are the tools it asked for. The moment to predict: the tools are about to run."""
        live = self._live.trajectories.get(turn.trajectory.key)
        if live is None or not turn.completed:
            return
        called = called[: tool_names.MAX_PARALLEL]
        log_s, surprise = self._tools.says(called)
        self._live.turn(live, turn.output_tokens, called, log_s, surprise)
        self._look(live)

    def trajectory_ended(self, end: TrajectoryEnd, *, truncated: bool = False) -> None:
        """The episode is over. Not finished (failed, cancelled) or `truncated` by a limit means: it would have been at least so long."""
        key = end.trajectory.key
        live = self._live.trajectories.get(key)
        if live is None:
            return
        tokens, turns, tool_s = self._live.done(live)
        total = (max(tokens, end.output_tokens), turns, tool_s)
        censored = truncated or end.outcome is not Outcome.FINISHED
        logs = np.log(np.maximum(total, FLOOR))
        if censored:  # the past is kept in sizes, and the best guess of this one's size is what was still expected of it
            rows, _ = self._features([live])
            left = np.exp(np.minimum(rows[0, :QUANTITIES], np.log(1e12)))
            logs = np.log(np.maximum(np.array(total) + left, FLOOR))
        visit = self._live.visits[live.uid]
        inside = self._live.end(key, logs)
        if not live.teaches:
            return
        if not censored:
            self._teach_tools(live, total)
        self._text.observe(visit.words, float(logs[TOKENS] - self._pool.mean[TOKENS]))
        self._pool.observe(logs, live.step, inside)
        self._prompts.observe(live.prompt, live.step, logs, self._pool)
        self._window.add(rows_of(live.prompt, live.snapshots, total, censored))

    def predict(self, key: str) -> Estimate | None:
        """What the trajectory with this `TrajectoryId.key` has still to do; None if no turn of it has started."""
        live = self._live.trajectories.get(key)
        if live is None:
            return None
        median, upper, turns, tool_s = self._estimate([live])
        return Estimate(float(median[0]), float(upper[0]), float(turns[0]), float(tool_s[0]))

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
                running.append(rows_of(live.prompt, live.snapshots, self._live.done(live), True))
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
            "model": None if model is None else {"shift": model.shift.tolist(), "widen": model.widen.tolist(), "rows": model.rows},
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
                shift, widen = (np.array(header["model"][name]) for name in ("shift", "widen"))
                predictor.model = Model(trees, shift, widen, header["model"]["rows"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise StateError(f"incomplete ({type(error).__name__}: {error})") from error
        return predictor

    def _features(self, lives: Sequence[Live]) -> tuple[NDArray[np.float32], Floats]:
        own = self._live.own.rows[[live.row for live in lives]]
        rows = build(own, self._live.group.rows[own[:, Own.GROUP].astype(np.intp)], self._pool)
        return rows, own

    def _look(self, live: Live) -> None:
        if live.teaches and looked_at(int(self._live.done(live)[TURNS])):
            self._live.look(live)

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
            expected = build(state[:, :OWN_COLUMNS], state[:, OWN_COLUMNS:], self._pool)[:, TOKENS]
            for shot, log_left in zip(used, expected.tolist(), strict=True):
                self._tools.led_to(shot.called, float(np.log(total[TOKENS] - shot.done[TOKENS])) - log_left)
