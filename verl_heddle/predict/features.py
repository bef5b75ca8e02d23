"""Builds the feature rows of the trees: one row of numbers per trajectory, for one or ten thousand at once.

Law: sizes are logarithms, sibling features exclude the trajectory itself, no value is missing (unknown is 0, next to its count), and the
empirical-Bayes estimates are features, since trees cannot subtract. Training rows are built here too, from what was known before the
outcome, with the pool at the time of the fit. Cost: about 60 numpy calls for any number of trajectories.
"""

from __future__ import annotations

from math import log, log1p, sqrt
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from verl_heddle.predict.bayes import FLOORS, Belief, Evidence, One, Pool, believe, one, remaining
from verl_heddle.predict.live import Group, Own
from verl_heddle.predict.quantities import FLOOR, QUANTITIES, TOKENS, TOOL_S, TURNS, Floats

STEP_BLOCK = 4
"""Training steps that the trees cannot distinguish: one step is a draw of prompts, several in a row reflect the policy."""

NAMES = (
    # empirical-Bayes estimates: first the log remaining of each quantity, which the trees correct
    "bayes_tokens", "bayes_turns", "bayes_tool_s", "bayes_spread", "bayes_total", "bayes_turns_total", "bayes_weight", "bayes_by_turns",
    # the trajectory
    "prompt_tokens", "tokens", "turns", "tool_s", "first", "last", "recent", "longest", "per_turn", "trend", "context", "added",
    "calls", "call_s", "call_next", "surprise", "surprises", "step",
    # its prompt
    "text", "history_count", "history", "history_turns", "history_tool_s", "history_spread", "history_last",
    # its siblings
    "started", "finished", "finished_tokens", "finished_turns", "finished_spread", "running", "running_tokens", "running_turns",
    "against_running", "against_longest", "siblings_surprise",
)  # fmt: skip

VERSION = crc32(" ".join(NAMES).encode()) ^ crc32(str(STEP_BLOCK).encode())
"""Changes with the columns: a model is valid only for the columns it was fitted on."""


def believed(own: Floats, group: Floats, pool: Pool) -> tuple[Belief, Floats, Floats]:
    """The empirical-Bayes estimate, and log remaining and log(upper / median) of `bayes.remaining`; arguments as in `build`."""
    o, g = own.T, group.T
    done = o[Own.TOKENS : Own.TOOL_S + 1]
    evidence = Evidence(
        text=g[Group.TEXT],
        history_count=g[Group.HISTORY_COUNT],
        history=g[Group.HISTORY : Group.HISTORY + QUANTITIES],
        finished_count=g[Group.FINISHED],
        finished_sum=g[Group.FINISHED_SUM : Group.FINISHED_SUM + QUANTITIES],
        running_count=np.maximum(g[Group.RUNNING] - 1, 0),
        running_sum=g[Group.RUNNING_SUM : Group.RUNNING_SUM + QUANTITIES] - np.log(np.maximum(done, FLOOR[:, None])),
    )
    belief = believe(pool, evidence)
    return belief, *remaining(belief, done)


def build(own: Floats, group: Floats, pool: Pool) -> NDArray[np.float32]:
    """Rows of `NAMES`: (n, features).

    Args:
        own, group: (n, columns) rows of `Lives` of the same trajectories.
    """
    o, g = own.T, group.T
    logs = np.log(np.maximum(o[Own.TOKENS : Own.TOOL_S + 1], FLOOR[:, None]))
    others = np.maximum(g[Group.RUNNING] - 1, 0)
    running_sum = g[Group.RUNNING_SUM : Group.RUNNING_SUM + QUANTITIES] - logs
    history = g[Group.HISTORY : Group.HISTORY + QUANTITIES]
    finished = g[Group.FINISHED]
    finished_sum = g[Group.FINISHED_SUM : Group.FINISHED_SUM + QUANTITIES]
    belief, left, spread = believed(own, group, pool)

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


def believed_one(own: list[float], group: list[float], pool: Pool) -> One:
    """The empirical-Bayes estimate of one trajectory; arguments as in `build_one`."""
    others = max(group[Group.RUNNING] - 1, 0.0)
    begin = Group.RUNNING_SUM
    logs = [log(max(own[Own.TOKENS + quantity], FLOORS[quantity])) for quantity in range(QUANTITIES)]
    return one(
        pool,
        group[Group.TEXT],
        (group[Group.HISTORY_COUNT], group[Group.HISTORY : Group.HISTORY + QUANTITIES]),
        (group[Group.FINISHED], group[Group.FINISHED_SUM : Group.FINISHED_SUM + QUANTITIES]),
        (others, [group[begin + quantity] - logs[quantity] for quantity in range(QUANTITIES)]),
        own[Own.TOKENS : Own.TOOL_S + 1],
    )


def build_one(own: list[float], group: list[float], pool: Pool, belief: One) -> NDArray[np.float32]:
    """One row of `build`, from plain lists: (features,).

    Args:
        own, group: the rows of `Lives`.
        belief: `believed_one` of them.
    """
    o, g = own, group
    tokens, turns, tool_s = (log(max(o[Own.TOKENS + quantity], FLOORS[quantity])) for quantity in range(QUANTITIES))
    at_least = max(o[Own.TURNS], 1.0)
    counted, others, finished = o[Own.TURNS] > 0, max(g[Group.RUNNING] - 1, 0.0), g[Group.FINISHED]
    per_turn = tokens - log(at_least)
    mean = pool.laws
    known = max(finished, 1.0)
    of_finished = [g[Group.FINISHED_SUM + q] / known - mean[q][0] if finished > 0 else 0.0 for q in (TOKENS, TURNS)]
    running = [(g[Group.RUNNING_SUM + q] - mine) / others if others > 0 else 0.0 for q, mine in ((TOKENS, tokens), (TURNS, turns))]
    company = g[Group.STARTED] > 1
    return np.array(
        (
            *belief.left,
            belief.spread,
            belief.middle[TOKENS],
            belief.middle[TURNS],
            belief.weight,
            belief.left[TURNS] + per_turn if counted else belief.middle[TOKENS],
            log1p(o[Own.PROMPT]),
            tokens,
            o[Own.TURNS],
            tool_s,
            o[Own.FIRST],
            o[Own.LAST],
            o[Own.RECENT],
            o[Own.LONGEST],
            per_turn if counted else 0.0,
            o[Own.RECENT] - per_turn if counted else o[Own.RECENT],
            log1p(o[Own.CONTEXT]),
            o[Own.ADDED],
            o[Own.CALLS] / at_least,
            o[Own.CALL_S],
            o[Own.CALL_NEXT],
            o[Own.SURPRISE],
            o[Own.SURPRISES] / at_least,
            o[Own.STEP] // STEP_BLOCK,
            g[Group.TEXT],
            g[Group.HISTORY_COUNT],
            g[Group.HISTORY + TOKENS],
            g[Group.HISTORY + TURNS],
            g[Group.HISTORY + TOOL_S],
            g[Group.SPREAD],
            g[Group.LAST],
            g[Group.STARTED],
            finished,
            *of_finished,
            sqrt(g[Group.FINISHED_SQUARE] / known),
            others,
            *running,
            tokens - running[0] if others > 0 else 0.0,
            tokens - g[Group.LONGEST] if company else 0.0,
            (g[Group.SURPRISE] - o[Own.SURPRISES]) / max(g[Group.STARTED] - 1, 1.0) if company else 0.0,
        ),
        dtype=np.float32,
    )
