"""Fits a `Model` to training rows: boosted trees on censored samples, as many as held-out prompts agree with, calibrated on them.

Law
- Features are made of the rows here, all with the pool of this moment.
- Objective: xgboost's accelerated failure time with a logistic error, starting from the empirical-Bayes estimate (`base_margin`). A
  censored row only says "at least so much", so stopping trajectories early does not teach that everything is short.
- The error's scale is that of the empirical-Bayes residuals; it sets how far a censored row pulls.
- The number of trees is where the loss on held-out prompts is lowest, at most `MAX_TREES`: few data, few trees, and the estimate falls
  back on empirical Bayes.
- Held out are whole prompts, a share of 1 / `FOLDS`; while rows are few, each share in turn, so that every row is once predicted by
  trees that do not know its prompt. These residuals give the shift of the median and the width of the upper quantile (split-conformal,
  with product-limit quantiles since residuals are censored too).

Invariants: a pure function of the rows (one thread, fixed seed), callable in any thread. Source: Barnwal, Cho, Hocking 2022
(survival:aft); Romano, Patterson, Candes 2019 (normalised conformal). Cost: 50,000 rows in under 5 s on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verl_heddle.predict.features import build
from verl_heddle.predict.forest import DEPTH
from verl_heddle.predict.live import OWN_COLUMNS
from verl_heddle.predict.model import SPREAD, STAGES, Model, stage
from verl_heddle.predict.pool import Pool
from verl_heddle.predict.quantities import ODDS_UPPER, QUANTITIES, TOKENS, UPPER, Floats
from verl_heddle.predict.survival import quantile
from verl_heddle.predict.window import Batch, Rows

MIN_ROWS = 200
MIN_PROMPTS = 8
"""Below this the empirical-Bayes estimate speaks alone: a quarter of fewer prompts is no judge of anything."""

FOLDS = 4
"""A quarter is held out: enough to calibrate a 0.9 quantile, little enough to leave the trees something."""

FEW_ROWS = 10_000
"""Up to here every share is held out in turn and the final trees see all rows; above, one share is enough and the fit stays within 5 s."""

STAGE_ROWS = 50.0
"""Held-out rows of a stage that outweigh all stages together: a 0.9 quantile of fewer rests on five of them."""

MAX_TREES = 120
PATIENCE = 12
"""Trees without improvement on held-out prompts after which no more are tried."""

PARAMETERS = {
    "objective": "survival:aft",
    "eval_metric": "aft-nloglik",
    "aft_loss_distribution": "logistic",
    "tree_method": "hist",
    "max_depth": DEPTH,
    "max_bin": 64,  # logs of lengths need no finer cuts, and time is proportional
    "learning_rate": 0.08,  # with at most 120 trees: slow enough to stop in time on a hundred trajectories
    "min_child_weight": 4.0,
    "reg_lambda": 8.0,  # rows of one trajectory are alike: a leaf must be more than one of them
    "colsample_bytree": 0.5,  # half of the columns per tree: many say nearly the same
    "subsample": 0.7,
    "nthread": 1,
    "seed": 0,
    "verbosity": 0,
}

SCALES = (0.2, 1.5)
"""Bounds of the error scale: below, a single outlier dominates; above, censored rows teach nothing."""


@dataclass(frozen=True, slots=True)
class FitJob:
    """Rows to be fitted; `run` may be called in a background thread, it shares nothing with the predictor."""

    batch: Batch
    pool: Pool

    def run(self) -> Model | None:
        """The fitted model, or None while there is too little to learn from."""
        state = self.batch.state.astype(np.float64)
        return fit(build(state[:, :OWN_COLUMNS], state[:, OWN_COLUMNS:], self.pool), self.batch)


def fit(features: Rows, batch: Batch) -> Model | None:
    """The model of these feature rows and the bounds in `batch`; None for fewer than `MIN_ROWS` rows or `MIN_PROMPTS` prompts."""
    if len(batch) < MIN_ROWS or len(np.unique(batch.prompt)) < MIN_PROMPTS:
        return None
    share = _shares(batch.prompt)
    few = len(batch) <= FEW_ROWS
    trees, shift = [], np.zeros(QUANTITIES)
    widen = np.ones(len(STAGES) + 1)
    for quantity in range(QUANTITIES):
        lower, upper = batch.lower[:, quantity], batch.upper[:, quantity]
        offset = features[:, quantity]
        scale = _error_scale(lower, upper, offset)
        judged = range(FOLDS) if few else range(1)
        residual, censored, spread, stages, numbers = [], [], [], [], []
        for number in judged:
            out = share == number
            booster = _train(features, batch, quantity, ~out, scale, out)
            numbers.append(booster.best_iteration + 1)
            best = booster[: booster.best_iteration + 1]
            residual.append(np.log(lower[out]) - offset[out] - _sums(best, features[out]))
            censored.append(np.isinf(upper[out]))
            spread.append(features[out, SPREAD])
            stages.append(stage(features[out]))
        if few:
            best = _train(features, batch, quantity, np.ones(len(batch), dtype=bool), scale, None, int(np.median(numbers)))
        trees.append(bytes(best.save_raw("json")))
        off, cut = np.concatenate(residual).astype(np.float64), np.concatenate(censored)
        shift[quantity] = quantile(off, cut, 0.5)
        if quantity == TOKENS:
            widen = _widths((off - shift[quantity]) / np.concatenate(spread), cut, np.concatenate(stages))
    return Model(trees, shift, widen, len(batch))


def _shares(prompt: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Which share each row's prompt is held out with: prompts in the order of their hash, dealt out evenly."""
    _, which = np.unique(prompt, return_inverse=True)
    shares: NDArray[np.int64] = which % FOLDS
    return shares


def _widths(ratio: Floats, censored: NDArray[np.bool_], stages: NDArray[np.intp]) -> Floats:
    """`UPPER` quantile of residual over spread by stage, drawn to that of all rows with the weight of `STAGE_ROWS`; positive."""
    pooled = quantile(ratio, censored, UPPER)
    widths = np.full(len(STAGES) + 1, pooled)
    for number in range(len(widths)):
        if count := int((stages == number).sum()):
            own = quantile(ratio[stages == number], censored[stages == number], UPPER)
            widths[number] = (count * own + STAGE_ROWS * pooled) / (count + STAGE_ROWS)
    return np.maximum(widths, 1e-3)


def _error_scale(lower: Rows, upper: Rows, offset: Rows) -> float:
    """Logistic scale of the residuals before any tree: from median to upper quantile."""
    off, cut = (np.log(lower) - offset).astype(np.float64), np.isinf(upper)
    return float(np.clip((quantile(off, cut, UPPER) - quantile(off, cut, 0.5)) / ODDS_UPPER, *SCALES))


def _train(
    features: Rows,
    batch: Batch,
    quantity: int,
    rows: NDArray[np.bool_],
    scale: float,
    judge: NDArray[np.bool_] | None,
    trees: int | None = None,
) -> Any:
    import xgboost  # here, not above: its import takes a second, and only a process that fits must pay it

    trees = MAX_TREES if trees is None else trees
    parameters = PARAMETERS | {"aft_loss_distribution_scale": scale}
    data = _matrix(xgboost, features, batch, quantity, rows)
    if judge is None:
        return xgboost.train(parameters, data, trees)
    held = [(_matrix(xgboost, features, batch, quantity, judge), "held_out")]
    return xgboost.train(parameters, data, trees, evals=held, early_stopping_rounds=PATIENCE, verbose_eval=False)


def _matrix(xgboost: Any, features: Rows, batch: Batch, quantity: int, rows: NDArray[np.bool_]) -> Any:
    matrix = xgboost.DMatrix(features[rows], base_margin=features[rows, quantity], nthread=1)
    matrix.set_float_info("label_lower_bound", batch.lower[rows, quantity])
    matrix.set_float_info("label_upper_bound", batch.upper[rows, quantity])
    return matrix


def _sums(booster: Any, rows: NDArray[np.float32]) -> Floats:
    sums: Floats = booster.inplace_predict(rows, predict_type="margin", base_margin=np.zeros(len(rows), dtype=np.float32))
    return sums
