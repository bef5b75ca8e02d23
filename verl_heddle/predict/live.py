"""The trajectories under way and their groups, as rows of two tables, kept up to date event by event.

Law: a trajectory's row holds what it did itself, its group's row what its siblings did (sums only, so that every event is O(1)) and what
was known of the prompt when the group's first trajectory began. A group is one visit to a prompt (verl's `uid`); its row stays after
its last trajectory ended, since samples may start late, until `MAX_IDLE_GROUPS` later groups are idle too.

Invariants: sums over running siblings return to 0 when none runs; tables shrink to what is alive plus the idle groups.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import IntEnum, auto
from math import log, log1p

import numpy as np

from verl_heddle.predict.prompts import History
from verl_heddle.predict.quantities import FLOOR, LOG_FLOOR, QUANTITIES, TOKENS, TOOL_S, TURNS, Floats
from verl_heddle.predict.table import Table
from verl_heddle.predict.text import Words

MAX_IDLE_GROUPS = 4096
"""Visits whose samples have all ended: several steps of a usual batch (64 to 1024 prompts); 1 MB."""

RECENT = 0.3
"""Weight of the newest turn in the running mean of turn lengths: about the last three turns."""


class Own(IntEnum):
    """Columns of a trajectory's row."""

    GROUP = 0
    STEP = auto()
    PROMPT = auto()
    TOKENS = auto()  # the three amounts done so far stand together, in the order of `quantities`
    TURNS = auto()
    TOOL_S = auto()
    FIRST = auto()
    LAST = auto()
    RECENT = auto()
    LONGEST = auto()
    CONTEXT = auto()
    ADDED = auto()
    CALLS = auto()
    CALL_S = auto()
    CALL_NEXT = auto()
    SURPRISE = auto()
    SURPRISES = auto()


class Group(IntEnum):
    """Columns of a group's row; the four three-fold ones hold one number per quantity."""

    HISTORY = 0
    FINISHED_SUM = QUANTITIES
    FINISHED_SQUARE = 2 * QUANTITIES
    RUNNING_SUM = 3 * QUANTITIES
    TEXT = 4 * QUANTITIES
    HISTORY_COUNT = auto()
    SPREAD = auto()
    LAST = auto()
    FINISHED = auto()
    RUNNING = auto()
    STARTED = auto()
    LONGEST = auto()
    SURPRISE = auto()


OWN_COLUMNS, GROUP_COLUMNS = Own.SURPRISES + 1, Group.SURPRISE + 1
_DONE = slice(Own.TOKENS, Own.TOOL_S + 1)
_RUNNING = slice(Group.RUNNING_SUM, Group.RUNNING_SUM + QUANTITIES)
_FINISHED = slice(Group.FINISHED_SUM, Group.FINISHED_SUM + QUANTITIES)
_SQUARE = slice(Group.FINISHED_SQUARE, Group.FINISHED_SQUARE + QUANTITIES)


@dataclass(slots=True)
class Snapshot:
    """What was known at one moment; becomes a training row when the end is known."""

    state: Floats
    """The trajectory's row and its group's, one after the other."""
    done: tuple[float, float, float]
    called: tuple[str, ...]


@dataclass(slots=True)
class Live:
    """One trajectory under way: where its rows are, and what it has shown."""

    row: int
    uid: str
    prompt: str
    step: int
    teaches: bool
    called: tuple[str, ...] = ()
    tool_known: bool = True
    snapshots: list[Snapshot] = field(default_factory=list)


@dataclass(slots=True)
class Visit:
    """One group: its row, its prompt's words, how many of it run."""

    row: int
    words: Words
    running: int = 0


class LiveTables:
    """Rows of trajectories and groups. `own` and `group` are the tables; `trajectories` and `visits` say whose row is which."""

    def __init__(self) -> None:
        self.own, self.group = Table(OWN_COLUMNS), Table(GROUP_COLUMNS)
        self.trajectories: dict[str, Live] = {}
        self.visits: dict[str, Visit] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()

    def visit(self, uid: str, history: History, text: float, words: Words) -> Visit:
        """A group whose prompt has this history and text begins."""
        visit = self.visits[uid] = Visit(self.group.take(), words)
        row = self.group.rows[visit.row]
        row[Group.TEXT], row[Group.HISTORY_COUNT], row[Group.SPREAD], row[Group.LAST] = text, history.samples, history.spread, history.last
        row[Group.HISTORY : Group.HISTORY + QUANTITIES] = history.deviation
        return visit

    def start(self, key: str, live_of: tuple[str, str, int, bool], prompt_tokens: int) -> Live:
        """A trajectory (uid, prompt, step, teaches) of a known visit begins."""
        uid, prompt, step, teaches = live_of
        live = self.trajectories[key] = Live(self.own.take(), uid, prompt, step, teaches)
        visit = self.visits[uid]
        self._idle.pop(uid, None)
        visit.running += 1
        own, group = self.own.rows[live.row], self.group.rows[visit.row]
        own[Own.GROUP], own[Own.STEP], own[Own.PROMPT], own[Own.CONTEXT] = visit.row, step, prompt_tokens, prompt_tokens
        group[Group.RUNNING] += 1
        group[Group.STARTED] += 1
        group[_RUNNING] += LOG_FLOOR
        return live

    def turn(self, live: Live, output_tokens: int, called: tuple[str, ...], call_log_s: float, surprise: float) -> None:
        """A turn ended and asked for tools."""
        own, group = self.own.rows[live.row], self.group.rows[self.visits[live.uid].row]
        group[_RUNNING] -= _logs(own[_DONE])
        longest = log1p(output_tokens)
        turns = own[Own.TURNS] + 1
        own[Own.TURNS], own[Own.LAST] = turns, longest
        own[Own.TOKENS] += output_tokens
        own[Own.CONTEXT] += output_tokens
        if turns == 1:
            own[Own.FIRST] = own[Own.RECENT] = longest
        else:
            own[Own.RECENT] += RECENT * (longest - own[Own.RECENT])
        own[Own.LONGEST] = max(own[Own.LONGEST], longest)
        own[Own.CALLS] += len(called)
        own[Own.CALL_NEXT], own[Own.SURPRISE] = call_log_s, surprise
        own[Own.SURPRISES] += surprise
        group[_RUNNING] += _logs(own[_DONE])
        group[Group.LONGEST] = max(group[Group.LONGEST], log1p(own[Own.TOKENS]))
        group[Group.SURPRISE] += surprise
        live.called, live.tool_known = called, False

    def answered(self, live: Live, context_tokens: int, tool_s: float | None) -> float | None:
        """The next turn starts: the context it reads, and how long the tools took (None: not known). Returns log seconds if known."""
        own, group = self.own.rows[live.row], self.group.rows[self.visits[live.uid].row]
        own[Own.ADDED] = log1p(max(0.0, context_tokens - own[Own.CONTEXT]))
        own[Own.CONTEXT] = context_tokens
        if tool_s is None or live.tool_known:
            return None
        live.tool_known = True
        group[_RUNNING] -= _logs(own[_DONE])
        own[Own.TOOL_S] += tool_s
        own[Own.CALL_S] = log(max(tool_s, FLOOR[TOOL_S]))
        group[_RUNNING] += _logs(own[_DONE])
        return float(own[Own.CALL_S])

    def done(self, live: Live) -> tuple[float, float, float]:
        """Tokens, turns and tool seconds so far."""
        tokens, turns, tool_s = self.own.rows[live.row, _DONE].tolist()
        return tokens, turns, tool_s

    def look(self, live: Live) -> None:
        """Remember this moment for learning."""
        own = self.own.rows[live.row]
        state = np.concatenate((own, self.group.rows[int(own[Own.GROUP])]))
        live.snapshots.append(Snapshot(state, self.done(live), live.called))

    def end(self, key: str, logs: Floats) -> Floats | None:
        """The trajectory is over with sizes exp(logs). Returns what it adds to its group's sum of squares, None if it is the first."""
        live = self.trajectories.pop(key)
        visit = self.visits[live.uid]
        own, group = self.own.rows[live.row], self.group.rows[visit.row]
        group[Group.RUNNING] -= 1
        group[_RUNNING] -= _logs(own[_DONE])
        finished = group[Group.FINISHED]
        inside = None
        if finished:
            inside = (logs - group[_FINISHED] / finished) ** 2 * (finished / (finished + 1))
            group[_SQUARE] += inside
        group[Group.FINISHED] = finished + 1
        group[_FINISHED] += logs
        group[Group.LONGEST] = max(group[Group.LONGEST], logs[TOKENS])
        self.own.give(live.row)
        visit.running -= 1
        if not visit.running:
            group[_RUNNING] = 0.0
            self._idle[live.uid] = None
            if len(self._idle) > MAX_IDLE_GROUPS:
                uid, _ = self._idle.popitem(last=False)
                self.group.give(self.visits.pop(uid).row)
        return inside


def _logs(done: Floats) -> Floats:
    logs: Floats = np.log(np.maximum(done, FLOOR))
    return logs


assert (Own.TURNS, Own.TOOL_S) == (Own.TOKENS + TURNS, Own.TOKENS + TOOL_S)
