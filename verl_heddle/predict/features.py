"""What the trees see of a trajectory: one row of numbers, built for one or ten thousand at once.

Law: sizes as logarithms, siblings without the trajectory itself, nothing missing (unknown is 0 beside its count), and the
empirical-Bayes estimates as features, since trees cannot subtract. Training rows are made here too, of what was known while the future
was open, with the pool of the moment of the fit. Cost: about 60 numpy calls whatever the number of trajectories.
"""

from __future__ import annotations

from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from verl_heddle.predict.bayes import Evidence, believe, remaining
from verl_heddle.predict.live import Group, Own
from verl_heddle.predict.pool import Pool
from verl_heddle.predict.quantities import FLOOR, QUANTITIES, TOKENS, TOOL_S, TURNS, Floats

STEP_BLOCK = 4
"""Training steps that look the same to the trees: a single step is a draw of prompts, some in a row are a state of the policy."""

NAMES = (
    # the empirical-Bayes estimates: log remaining of each quantity first, the trees correct them
    "bayes_tokens", "bayes_turns", "bayes_tool_s", "bayes_spread", "bayes_total", "bayes_turns_total", "bayes_weight", "bayes_by_turns",
    # itself
    "prompt_tokens", "tokens", "turns", "tool_s", "first", "last", "recent", "longest", "per_turn", "trend", "context", "added",
    "calls", "call_s", "call_next", "surprise", "surprises", "step",
    # its prompt
    "text", "history_count", "history", "history_turns", "history_tool_s", "history_spread", "history_last",
    # its siblings
    "started", "finished", "finished_tokens", "finished_turns", "finished_spread", "running", "running_tokens", "running_turns",
    "against_running", "against_longest", "siblings_surprise",
)  # fmt: skip

VERSION = crc32(" ".join(NAMES).encode()) ^ crc32(str(STEP_BLOCK).encode())
"""Changes with the columns: a model is only good for the rows it was fitted on."""


def build(own: Floats, group: Floats, pool: Pool) -> NDArray[np.float32]:
    """Rows of `NAMES`: (n, features).

    Args:
        own, group: (n, columns) rows of `LiveTables` of the same trajectories.
    """
    o, g = own.T, group.T
    done = o[Own.TOKENS : Own.TOOL_S + 1]
    logs = np.log(np.maximum(done, FLOOR[:, None]))
    others = np.maximum(g[Group.RUNNING] - 1, 0)
    running_sum = g[Group.RUNNING_SUM : Group.RUNNING_SUM + QUANTITIES] - logs
    history = g[Group.HISTORY : Group.HISTORY + QUANTITIES]
    finished = g[Group.FINISHED]
    finished_sum = g[Group.FINISHED_SUM : Group.FINISHED_SUM + QUANTITIES]
    evidence = Evidence(g[Group.TEXT], g[Group.HISTORY_COUNT], history, finished, finished_sum, others, running_sum)
    belief = believe(pool, evidence)
    left, spread = remaining(belief, done)

    turns = np.maximum(o[Own.TURNS], 1)
    per_turn = logs[TOKENS] - np.log(turns)
    known, alone = np.maximum(finished, 1), np.maximum(others, 1)
    finished_mean = np.where(finished > 0, finished_sum / known - pool.mean[:, None], 0.0)
    running_mean = np.where(others > 0, running_sum / alone, 0.0)
    counted = o[Own.TURNS] > 0
    rows = np.stack(
        (
            left[TOKENS],
            left[TURNS],
            left[TOOL_S],
            spread[TOKENS],
            belief.middle[TOKENS],
            belief.middle[TURNS],
            belief.weight[TOKENS],
            np.where(counted, left[TURNS] + per_turn, belief.middle[TOKENS]),
            np.log1p(o[Own.PROMPT]),
            logs[TOKENS],
            o[Own.TURNS],
            logs[TOOL_S],
            o[Own.FIRST],
            o[Own.LAST],
            o[Own.RECENT],
            o[Own.LONGEST],
            np.where(counted, per_turn, 0.0),
            o[Own.RECENT] - per_turn * counted,
            np.log1p(o[Own.CONTEXT]),
            o[Own.ADDED],
            o[Own.CALLS] / turns,
            o[Own.CALL_S],
            o[Own.CALL_NEXT],
            o[Own.SURPRISE],
            o[Own.SURPRISES] / turns,
            o[Own.STEP] // STEP_BLOCK,
            g[Group.TEXT],
            g[Group.HISTORY_COUNT],
            history[TOKENS],
            history[TURNS],
            history[TOOL_S],
            g[Group.SPREAD],
            g[Group.LAST],
            g[Group.STARTED],
            finished,
            finished_mean[TOKENS],
            finished_mean[TURNS],
            np.sqrt(g[Group.FINISHED_SQUARE] / known),
            others,
            running_mean[TOKENS],
            running_mean[TURNS],
            np.where(others > 0, logs[TOKENS] - running_mean[TOKENS], 0.0),
            np.where(g[Group.STARTED] > 1, logs[TOKENS] - g[Group.LONGEST], 0.0),
            np.where(g[Group.STARTED] > 1, (g[Group.SURPRISE] - o[Own.SURPRISES]) / np.maximum(g[Group.STARTED] - 1, 1), 0.0),
        ),
        axis=1,
    )
    return rows.astype(np.float32)
