"""State of the live trajectories and their groups, each a row of plain numbers, updated on every event.

Law: a trajectory's row holds its own amounts. Its group's row holds those of the siblings (sums only, so that every event is O(1)) and
what was known of the prompt when the group's first trajectory began. A group is one visit to a prompt (verl's `uid`). Samples may start
late, so its row is kept after its last trajectory ended, until `MAX_IDLE_GROUPS` later groups are idle too. Rows are lists: an event
updates single numbers, for which numpy takes five times as long.

Invariants: sums over running siblings return to 0 when none runs; only live trajectories, their groups and idle groups are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import IntEnum, auto
from math import log, log1p

from verl_heddle.predict.bayes import FLOORS
from verl_heddle.predict.prompts import History, Words
from verl_heddle.predict.quantities import QUANTITIES, TOKENS, TOOL_S, TURNS, Floats

MAX_IDLE_GROUPS = 4096
"""Groups kept after all their samples ended: several steps of a usual batch (64 to 1024 prompts); 1 MB."""

RECENT = 0.3
"""Weight of the newest turn in the running mean of turn lengths: about the last three turns."""


class Own(IntEnum):
    """Columns of a trajectory's row."""

    STEP = 0
    PROMPT = auto()
    TOKENS = auto()  # the three amounts so far are adjacent, in the order of `quantities`
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
    """Columns of a group's row; the first four hold one number per quantity."""

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


@dataclass(slots=True)
class Snapshot:
    """State of a trajectory at one moment; becomes a training row once the outcome is known."""

    state: list[float]
    """The trajectory's row, then its group's."""
    done: tuple[float, float, float]
    called: tuple[str, ...]


@dataclass(slots=True)
class Visit:
    """One group: its row, its prompt's words, and its number of running trajectories."""

    row: list[float]
    words: Words
    running: int = 0


@dataclass(slots=True)
class Live:
    """One live trajectory: its row, its group, and its snapshots."""

    row: list[float]
    group: Visit
    uid: str
    prompt: str
    step: int
    teaches: bool
    called: tuple[str, ...] = ()
    tool_known: bool = True
    snapshots: list[Snapshot] = field(default_factory=list)

    @property
    def done(self) -> tuple[float, float, float]:
        """Tokens, turns and tool seconds so far."""
        tokens, turns, tool_s = self.row[Own.TOKENS : Own.TOOL_S + 1]
        return tokens, turns, tool_s

    def look(self) -> None:
        """Take a snapshot for training."""
        self.snapshots.append(Snapshot(self.row + self.group.row, self.done, self.called))


class Lives:
    """Trajectories by key, groups by uid."""

    def __init__(self) -> None:
        self.trajectories: dict[str, Live] = {}
        self.visits: dict[str, Visit] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()

    def visit(self, uid: str, history: History, text: float, words: Words) -> None:
        """Start a group whose prompt has this history and text."""
        row = [0.0] * GROUP_COLUMNS
        row[Group.TEXT], row[Group.HISTORY_COUNT], row[Group.SPREAD], row[Group.LAST] = text, history.samples, history.spread, history.last
        row[Group.HISTORY : Group.HISTORY + QUANTITIES] = history.deviation.tolist()
        self.visits[uid] = Visit(row, words)

    def start(self, key: str, live_of: tuple[str, str, int, bool], prompt_tokens: int) -> Live:
        """Start a trajectory (uid, prompt, step, teaches) of a known visit."""
        uid, prompt, step, teaches = live_of
        visit = self.visits[uid]
        live = self.trajectories[key] = Live([0.0] * OWN_COLUMNS, visit, uid, prompt, step, teaches)
        self._idle.pop(uid, None)
        visit.running += 1
        live.row[Own.STEP], live.row[Own.PROMPT], live.row[Own.CONTEXT] = float(step), float(prompt_tokens), float(prompt_tokens)
        visit.row[Group.RUNNING] += 1
        visit.row[Group.STARTED] += 1
        _add_logs(visit.row, live.row, 1)
        return live

    def begins(self, live: Live, prompt_tokens: int) -> None:
        """The first turn of an announced trajectory; sets its true prompt tokens."""
        live.row[Own.PROMPT] = live.row[Own.CONTEXT] = float(prompt_tokens)

    def caught_up(self, live: Live, tokens: int, turns: int) -> None:
        """Set what the trajectory did before its first event arrived."""
        _add_logs(live.group.row, live.row, -1)
        live.row[Own.TOKENS], live.row[Own.TURNS] = float(tokens), float(turns)
        _add_logs(live.group.row, live.row, 1)

    def turn(self, live: Live, output_tokens: int) -> None:
        """A turn ended: add its tokens to the trajectory and its group."""
        own, group = live.row, live.group.row
        _add_logs(group, own, -1)
        length = log1p(output_tokens)
        turns = own[Own.TURNS] + 1
        own[Own.TURNS], own[Own.LAST] = turns, length
        own[Own.TOKENS] += output_tokens
        own[Own.CONTEXT] += output_tokens
        if turns == 1:
            own[Own.FIRST] = own[Own.RECENT] = length
        else:
            own[Own.RECENT] += RECENT * (length - own[Own.RECENT])
        own[Own.LONGEST] = max(own[Own.LONGEST], length)
        own[Own.SURPRISE] = 0.0
        _add_logs(group, own, 1)
        group[Group.LONGEST] = max(group[Group.LONGEST], log1p(own[Own.TOKENS]))
        live.called, live.tool_known = (), False

    def called(self, live: Live, tools: tuple[str, ...], log_s: float, surprise: float) -> None:
        """All tools known so far to be called by the last turn; replaces the earlier set."""
        own = live.row
        more = surprise - own[Own.SURPRISE]
        own[Own.CALLS] += len(tools) - len(live.called)
        own[Own.CALL_NEXT], own[Own.SURPRISE] = log_s, surprise
        own[Own.SURPRISES] += more
        live.group.row[Group.SURPRISE] += more
        live.called = tools

    def answered(self, live: Live, context_tokens: int, tool_s: float | None) -> float | None:
        """The next turn starts with this context, after tools that took `tool_s` (None: unknown). Returns log seconds if newly known."""
        own, group = live.row, live.group.row
        own[Own.ADDED] = log1p(max(0.0, context_tokens - own[Own.CONTEXT]))
        own[Own.CONTEXT] = float(context_tokens)
        if tool_s is None or live.tool_known:
            return None
        live.tool_known = True
        _add_logs(group, own, -1)
        own[Own.TOOL_S] += tool_s
        own[Own.CALL_S] = log(max(tool_s, FLOORS[TOOL_S]))
        _add_logs(group, own, 1)
        return own[Own.CALL_S]

    def end(self, key: str, logs: Floats) -> Floats | None:
        """The trajectory ended with sizes exp(logs). Returns what it adds to its group's sum of squares, None if it is the first."""
        live = self.trajectories.pop(key)
        visit, group = live.group, live.group.row
        group[Group.RUNNING] -= 1
        _add_logs(group, live.row, -1)
        finished = group[Group.FINISHED]
        inside = None
        if finished:
            inside = (logs - [group[Group.FINISHED_SUM + q] / finished for q in range(QUANTITIES)]) ** 2 * (finished / (finished + 1))
        group[Group.FINISHED] = finished + 1
        for quantity, size in enumerate(logs.tolist()):
            group[Group.FINISHED_SUM + quantity] += size
            if inside is not None:
                group[Group.FINISHED_SQUARE + quantity] += float(inside[quantity])
        group[Group.LONGEST] = max(group[Group.LONGEST], float(logs[TOKENS]))
        visit.running -= 1
        if not visit.running:
            group[Group.RUNNING_SUM : Group.RUNNING_SUM + QUANTITIES] = [0.0] * QUANTITIES
            self._idle[live.uid] = None
            if len(self._idle) > MAX_IDLE_GROUPS:
                uid, _ = self._idle.popitem(last=False)
                del self.visits[uid]
        return inside


def _add_logs(group: list[float], own: list[float], sign: int) -> None:
    """Add (1) a running trajectory's amounts to its group's sums, or subtract them (-1)."""
    for quantity, floor in enumerate(FLOORS):
        group[Group.RUNNING_SUM + quantity] += sign * log(max(own[Own.TOKENS + quantity], floor))


assert (Own.TURNS, Own.TOOL_S) == (Own.TOKENS + TURNS, Own.TOKENS + TOOL_S)
