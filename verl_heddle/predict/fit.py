"""Fits a `Model` to training rows: boosted trees on censored samples, stopped early and calibrated on held-out prompts.

Law
- Features are built from the rows here, all with the current pool.
- Objective: xgboost's accelerated failure time with a logistic error, starting from the empirical-Bayes estimate (`base_margin`). A
  censored row is only a lower bound, so stopping trajectories early does not teach that everything is short.
- The error's scale is that of the empirical-Bayes residuals; it sets how strongly a censored row pulls.
- The number of trees minimises the loss on held-out prompts, at most `MAX_TREES`. With few data there are few trees, and the estimate
  falls back to empirical Bayes.
- Whole prompts are held out, a share of 1 / `FOLDS`. While rows are few, each share is held out in turn, so that every row is predicted
  once by trees that have not seen its prompt. The held-out rows set the trust in the trees (stacking): the factor from `TRUSTS` with the
  lowest loss plus one standard error of its difference from no trees, so that trees count only where they have proved better.
  The residuals then give the shift of the median and the width of the upper quantile (split-conformal, with product-limit quantiles
  since residuals are censored too).

Invariants: a pure function of the rows (one thread, fixed seed), callable in any thread. Source: Barnwal, Cho, Hocking 2022
(survival:aft); Breiman 1996 (stacked regressions); Romano, Patterson, Candes 2019 (normalised conformal). Cost: 50,000 rows in under 5 s
on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verl_heddle.predict.bayes import Pool
from verl_heddle.predict.features import build
from verl_heddle.predict.live import OWN_COLUMNS
from verl_heddle.predict.model import DEPTH, SPREAD, STAGES, Model, informed, quantile, stage
from verl_heddle.predict.quantities import ODDS_UPPER, QUANTITIES, TOKENS, UPPER, Floats
from verl_heddle.predict.window import Batch, Rows

MIN_ROWS = 200
MIN_PROMPTS = 8
"""Below this only the empirical-Bayes estimate is used: a quarter of fewer prompts is too few to judge by."""

FOLDS = 4
"""A quarter is held out: enough to calibrate a 0.9 quantile, and leaves the trees enough rows."""

FEW_ROWS = 10_000
"""Up to this, every share is held out in turn and the final trees see all rows; above, one share suffices and a fit stays within 5 s."""

STAGE_ROWS = 50.0
"""Held-out rows at which a stage's quantile weighs as much as the pooled one: a 0.9 quantile of fewer rests on five of them."""

TRUSTS = (0.25, 0.5, 0.75, 1.0)
"""Nonzero factors on the trees to try; the loss is flat between neighbours."""

MAX_TREES = 120
PATIENCE = 12
"""Stop after this many trees without improvement on held-out prompts."""

PARAMETERS = {
    "objective": "survival:aft",
    "eval_metric": "aft-nloglik",
    "aft_loss_distribution": "logistic",
    "tree_method": "hist",
    "max_depth": DEPTH,
    "max_bin": 64,  # logs of lengths need no finer cuts, and time is proportional
    "learning_rate": 0.08,  # with at most 120 trees: slow enough that early stopping works on a hundred trajectories
    "min_child_weight": 4.0,
    "reg_lambda": 8.0,  # rows of one trajectory are alike: a leaf must hold more than one of them
    "colsample_bytree": 0.5,  # half of the columns per tree: many are nearly redundant
    "subsample": 0.7,
    "nthread": 1,
    "seed": 0,
    "verbosity": 0,
}

SCALES = (0.2, 1.5)
"""Bounds of the error scale: below, a single outlier dominates; above, censored rows teach nothing."""


@dataclass(frozen=True, slots=True)
class FitJob:
    """Rows to fit. It shares nothing with the predictor, so `run` may be called in a background thread."""

    batch: Batch
    pool: Pool

    def run(self) -> Model | None:
        """The fitted model, or None if there are too few rows or prompts."""
        state = self.batch.state.astype(np.float64)
        return fit(build(state[:, :OWN_COLUMNS], state[:, OWN_COLUMNS:], self.pool), self.batch)


def fit(features: Rows, batch: Batch) -> Model | None:
    """The model of these feature rows and the bounds in `batch`; None for fewer than `MIN_ROWS` rows or `MIN_PROMPTS` prompts."""
    if len(batch) < MIN_ROWS or len(np.unique(batch.prompt)) < MIN_PROMPTS:
        return None
    share = _shares(batch.prompt)
    few = len(batch) <= FEW_ROWS
    judged = range(FOLDS) if few else range(1)
    held = [share == number for number in judged]
    order = np.concatenate([np.flatnonzero(out) for out in held])
    prompts, known = batch.prompt[order], informed(features[order])
    trees, shift, widen = [], np.zeros(QUANTITIES), np.ones(len(STAGES) + 1)
    trust = np.zeros((QUANTITIES, 2))
    for quantity in range(QUANTITIES):
        lower, upper = batch.lower[:, quantity], batch.upper[:, quantity]
        scale = _error_scale(lower, upper, features[:, quantity])
        sums, numbers = [], []
        for out in held:
            booster = _train(features, batch, quantity, ~out, scale, out)
            numbers.append(booster.best_iteration + 1)
            best = booster[: booster.best_iteration + 1]
            sums.append(_sums(best, features[out]))
        if few:
            best = _train(features, batch, quantity, np.ones(len(batch), dtype=bool), scale, None, int(np.median(numbers)))
        trees.append(bytes(best.save_raw("json")))
        off = (np.log(lower) - features[:, quantity])[order].astype(np.float64)
        cut, says = np.isinf(upper[order]), np.concatenate(sums)
        for which in (0, 1):
            there = known == which
            trust[quantity, which] = _trust(off[there], says[there], cut[there], prompts[there], scale)
        off -= trust[quantity, known] * says
        shift[quantity] = quantile(off, cut, 0.5)
        if quantity == TOKENS:
            ratio = (off - shift[quantity]) / features[order, SPREAD]
            widen = _widths(ratio, cut, stage(features[order]))
    return Model(trees, shift, widen, trust, len(batch))


def _trust(off: Floats, says: Floats, censored: NDArray[np.bool_], prompts: NDArray[np.uint32], scale: float) -> float:
    """Factor on the trees; 0 unless they have proved better than no trees, with prompts as the sampling unit."""
    if not len(off):
        return 0.0
    _, which, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    if len(counts) < MIN_PROMPTS:
        return 0.0
    base, best, lowest = _loss(off / scale, censored), 0.0, 0.0
    for factor in TRUSTS:
        gains = np.bincount(which, _loss((off - factor * says) / scale, censored) - base)
        # Ratio estimate over prompts, which have different numbers of rows.
        mean = gains.sum() / counts.sum()
        error = np.sqrt(np.sum((gains - mean * counts) ** 2)) / counts.sum()
        if mean + error < lowest:
            best, lowest = factor, float(mean + error)
    return best


def _loss(z: Floats, censored: NDArray[np.bool_]) -> Floats:
    """Negative log likelihood of standard logistic residuals, up to a constant; for a censored residual, of being at least z."""
    loss: Floats = np.logaddexp(0.0, z) + np.where(censored, 0.0, np.logaddexp(0.0, -z))
    return loss


def _shares(prompt: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Share that each row's prompt is held out with: prompts in hash order, dealt evenly."""
    _, which = np.unique(prompt, return_inverse=True)
    shares: NDArray[np.int64] = which % FOLDS
    return shares


def _widths(ratio: Floats, censored: NDArray[np.bool_], stages: NDArray[np.intp]) -> Floats:
    """`UPPER` quantile of residual over spread by stage, shrunk towards that of all rows with weight `STAGE_ROWS`; positive."""
    pooled = quantile(ratio, censored, UPPER)
    widths = np.full(len(STAGES) + 1, pooled)
    for number in range(len(widths)):
        if count := int((stages == number).sum()):
            own = quantile(ratio[stages == number], censored[stages == number], UPPER)
            widths[number] = (count * own + STAGE_ROWS * pooled) / (count + STAGE_ROWS)
    return np.maximum(widths, 1e-3)


def _error_scale(lower: Rows, upper: Rows, offset: Rows) -> float:
    """Logistic scale of the residuals without trees, from their median and upper quantile."""
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
    import xgboost  # imported here: it takes a second, and only a process that fits needs it

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
